"""What the pipeline adds to the embedder: the local model alone against the same model behind cache and claims.

    python -m bench.pipeline [--texts 200] [--words 120] [--rounds 7]

Both embed texts that nobody has seen, in turns that alternate which goes first; the database is the embedded one in a
folder of its own. Ratios are of the same round, wall time and CPU of this process and its threads, PostgreSQL not included.
The same texts asked for again show what a hit costs.
"""

import asyncio
import itertools
import random
import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable

from app import cache, commands, schema, settings

WORDS = [
    "heron",
    "otter",
    "badger",
    "mill",
    "ford",
    "weir",
    "moon",
    "tide",
    "root",
    "star",
    "vacuum",
    "index",
    "tuple",
    "page",
    "river",
    "stone",
    "lamp",
    "door",
    "cloud",
]


def fresh(texts: int, words: int, seed: int) -> list[str]:
    """Texts of so many words, other ones for each seed."""
    generator = random.Random(seed)
    return [f"{seed} {number} " + " ".join(generator.choices(WORDS, k=words)) for number in range(texts)]


async def took(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Seconds on the clock, and of CPU."""
    began, used = time.perf_counter(), time.process_time()
    await work()
    return time.perf_counter() - began, time.process_time() - used


async def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--words", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    seeds = itertools.count()
    with tempfile.TemporaryDirectory() as folder, schema.provided(settings.Settings(data_dir=folder)) as config:
        async with commands.opened(config) as (database, embedder):
            ratios, hits = [], []
            for round_ in range(options.rounds + 1):
                alone, behind = (fresh(options.texts, options.words, next(seeds)) for _ in range(2))
                turns = [
                    lambda texts=alone: embedder.embed(texts, "document"),
                    lambda texts=behind: cache.embed(database, embedder, config, "bench", texts),
                ]
                measured = [await took(turn) for turn in (turns if round_ % 2 else turns[::-1])]
                (wall, cpu), (cached_wall, cached_cpu) = measured if round_ % 2 else measured[::-1]
                hit, _ = await took(turns[1])
                if round_:  # the first warms up
                    ratios.append((cached_wall / wall, cached_cpu / cpu, 1e3 * wall / options.texts))
                    hits.append(1e3 * hit / options.texts)
    walls, cpus, alone_ms = zip(*ratios, strict=True)
    print(f"{options.texts} texts of {options.words} words, {options.rounds} rounds")
    print(f"alone: {statistics.median(alone_ms):.2f} ms a text; a hit: {statistics.median(hits):.3f} ms")
    for name, found in (("wall", walls), ("CPU", cpus)):
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"with the pipeline, {name}: x {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    asyncio.run(main())

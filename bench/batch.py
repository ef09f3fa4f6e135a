"""`POST /search/batch` against the same searches one by one, over one kept connection.

    python -m bench.batch [--rows 200000] [--data-dir .bench] [--rounds 10]

100 searches of one tenant: with vectors that are brought, and with texts that the server embeds, new ones every round
so that none is remembered; recall@10 of the brought ones. Ratios are of the same round.
"""

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from app import terminal
from bench import data, postgres, served, timing
from bench.data import TENANTS
from bench.load import Load, request

SEARCHES = 100
WORKERS = (1, 2)
NOTHING = data.Narrowing()


def bodies(tenant: str, field: str, vectors: data.Vectors, round_: int) -> list[dict[str, Any]]:
    """The searches of a round."""
    values: Sequence[Any] = vectors[:SEARCHES].tolist()
    if field == "query":
        values = [data.content(round_ * SEARCHES + n)[:60] for n in range(SEARCHES)]
    return [postgres.body(tenant, NOTHING, **{field: value}) for value in values]


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tenants", nargs="+", choices=list(TENANTS), default=list(TENANTS), help="whose documents")
    options = timing.arguments(parser)
    results = []
    with postgres.started(options.data_dir) as server, Load() as load, terminal.progress("rounds") as progress:
        loaded = postgres.loaded(server, options.rows)
        where = timing.surroundings(loaded.service_url) | {"rows": f"{options.rows:,} of 384 dimensions"}
        for workers in WORKERS:
            with served.pgrecall(loaded.service_url, workers) as serving:
                cases = [(tenant, field) for tenant in options.tenants for field in ("embedding", "query")]
                for tenant, field in progress.track(cases, description=f"{workers} workers"):
                    took = []
                    recall = None
                    for round_ in range(options.rounds + 1):
                        single, batch = (
                            bodies(tenant, field, loaded.corpus.queries, 2 * round_ + turn) for turn in range(2)
                        )
                        one_by_one = [request(f"{serving.address}/search", body) for body in single]
                        together = [request(f"{serving.address}/search/batch", {"searches": batch})]
                        alone = load.turn(serving.address, one_by_one, 1, 0)
                        joined = load.turn(serving.address, together, 1, 0)
                        if field == "embedding":
                            ids = same(alone.bodies, joined.bodies[0])
                            truth = loaded.corpus.truth(tenant, NOTHING, postgres.TOP_K)
                            recall = fmean(data.recall(found, best) for found, best in zip(ids, truth, strict=True))
                        if round_:  # the first warms up
                            took.append((1e3 * alone.sample.elapsed, 1e3 * joined.sample.elapsed))
                    ratios = np.quantile([a / j for a, j in took], [0.25, 0.5, 0.75]).tolist()
                    alone_ms, joined_ms = np.median(took, axis=0).tolist()
                    results.append(
                        {"workers": workers, "tenant": tenant, "field": field, "ratio": ratios}
                        | {"one_by_one_ms": alone_ms, "batch_ms": joined_ms, "recall": recall}
                    )
    timing.say(where)
    terminal.table(
        f"{SEARCHES} searches",
        [
            *((name, "left") for name in ("tenant", "brought")),
            *(
                (name, "right")
                for name in ("workers", "recall@10", "one by one, ms", "batch, ms", "times faster (quartiles)")
            ),
        ],
        [
            (
                row["tenant"],
                row["field"],
                row["workers"],
                "" if row["recall"] is None else f"{row['recall']:.3f}",
                f"{row['one_by_one_ms']:.0f}",
                f"{row['batch_ms']:.0f}",
                "{1:.2f} ({0:.2f}–{2:.2f})".format(*row["ratio"]),
            )
            for row in results
        ],
    )
    timing.save(options.out, "batch", {"surroundings": where, "results": results}, draw)


def same(alone: Mapping[int, bytes], joined: bytes) -> list[list[str]]:
    """The ids that each search found. Both ways must give the same answers."""
    answers = [answer["results"] for answer in json.loads(joined)["answers"]]
    if [json.loads(alone[n])["results"] for n in range(SEARCHES)] != answers:
        raise SystemExit("the batch gives other results than its searches one by one")
    return [[hit["id"] for hit in hits] for hits in answers]


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """How many times faster, by case."""
    rows = record["results"]
    _, axes = pyplot.subplots(figsize=(9, 4))
    names = [f"{row['tenant']}\n{row['field']}\n{row['workers']}" for row in rows]
    axes.bar(names, [row["ratio"][1] for row in rows], color="#1f6f8b")
    axes.axhline(2, color="#d98324")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("times faster than one by one")


if __name__ == "__main__":
    main()

"""What the ways to fuse cost: hybrid search of one tenant, each question in each way, one client.

    python -m bench.fusion_speed DIR [DIR ...]

The documents of all folders (BEIR layout) are one tenant's, with the local model's vectors, kept as `bench.fusion` keeps
them. The ways take turns at going first; each question is asked twice in each, and its second time counts.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import get_args

import numpy as np
import psycopg

from app import chunking, judgements, search, terminal, text
from app.database import Database
from app.embedding import LocalEmbedder
from app.fusion import Method
from app.search import Options
from app.settings import Settings
from bench import fusion, postgres

TENANT = "acme"
QUESTIONS = 300
METHODS = get_args(Method)


def fill(
    owner: psycopg.Connection[tuple[object, ...]], embedder: LocalEmbedder, folders: list[Path], cache: Path
) -> int:
    """Store the chunks of every folder, once each; how many there are."""
    count = 0
    slow = owner.execute(postgres.SLOW_INDEXES.encode()).fetchall()
    for index, _ in slow:
        owner.execute(f"drop index {index}".encode())
    for folder in folders:
        collection = judgements.read(folder, TENANT)
        cut = fusion.chunks(embedder, collection)
        vectors = fusion.embedded(embedder, list(cut.values()), "document", cache)
        keys: dict[str, list[str]] = {}
        for id_, key in cut:
            keys.setdefault(f"{folder.name}-{id_}", []).append(key)
        columns = "copy sources (tenant_id, id, content, chunk_keys, start_offsets, state) from stdin"
        with owner.cursor().copy(columns) as rows:
            for id_, several in keys.items():
                rows.write_row((TENANT, id_, "", several, [0] * len(several), "ready"))
        with owner.cursor().copy("copy documents (tenant_id, id, chunk_key, content, embedding) from stdin") as rows:
            for ((id_, _), content), vector in zip(cut.items(), vectors, strict=True):
                rows.write_row((TENANT, f"{folder.name}-{id_}", chunking.key(content), content, str(vector.tolist())))
        count += len(cut)
    for _, definition in slow:
        owner.execute(str(definition).encode())
    owner.execute("call fill_terms()")
    owner.execute("vacuum analyze documents, sources, document_terms, term_statistics, collection_statistics")
    return count


async def asked(settings: Settings, embedder: LocalEmbedder, questions: list[str]) -> dict[str, list[float]]:
    """Milliseconds of each question in each way."""
    database = Database(settings, settings.database_url or "")
    took: dict[str, list[float]] = {method: [] for method in METHODS}
    vectors = await embedder.embed(questions, "query")
    for turn, (question, vector) in enumerate(zip(questions, vectors, strict=True)):
        first = turn % len(METHODS)
        for method in (*METHODS[first:], *METHODS[:first]):
            for _ in range(2):
                begun = time.perf_counter()
                await search.search(
                    database,
                    settings,
                    TENANT,
                    vector,
                    question=text.plain(question),
                    options=Options(mode="hybrid", fusion=method),
                )
                milliseconds = 1e3 * (time.perf_counter() - begun)
            took[method].append(milliseconds)
    await database.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="judged collections in the BEIR layout")
    parser.add_argument("--data", type=Path, default=Path(".bench"), help="of the server and the vectors (.bench)")
    args = parser.parse_args()
    embedder = LocalEmbedder()
    each = QUESTIONS // len(args.folders)
    questions = [
        question.text for folder in args.folders for question in judgements.read(folder, TENANT).questions[:each]
    ]
    with postgres.started(args.data) as server:
        settings = postgres.empty(server, "fusion_speed")
        with psycopg.connect(settings.migration_url or "", autocommit=True) as owner:
            count = fill(owner, embedder, args.folders, args.data / "fusion")
        took = asyncio.run(asked(settings, embedder, questions))
    terminal.table(
        f"hybrid search of {count:,} chunks, {len(questions)} questions, ms",
        [("fusion", "left"), ("p50", "right"), ("p95", "right")],
        [(method, *(f"{value:.1f}" for value in np.percentile(times, [50, 95]))) for method, times in took.items()],
    )


if __name__ == "__main__":
    main()

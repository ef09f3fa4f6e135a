"""What the ways to search cost, and how good they are: one tenant, each question in each way, one client.

    python -m bench.fusion_speed DIR [DIR ...]

By vectors, by words, and by both with each fusion; ten documents, each by its best chunk. The documents of all folders
(BEIR layout) are one tenant's, with the local model's vectors, kept as `bench.fusion` keeps them, so that nDCG@10 is not
that of a collection on its own. The ways take turns at going first; each question is asked twice in each, and its second
time counts.
"""

import argparse
import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, get_args

import numpy as np
import psycopg

from app import chunking, evaluation, judgements, search, terminal, text
from app.database import Database
from app.embedding import LocalEmbedder
from app.fusion import Method
from app.judgements import Question
from app.search import Options
from app.settings import Settings
from bench import fusion, postgres, timing
from bench.postgres import TOP_K

TENANT = "acme"
QUESTIONS = 300
WAYS = {mode: Options(mode=mode, grouped=True) for mode in ("vector", "text")} | {
    f"hybrid, {method}": Options(mode="hybrid", fusion=method, grouped=True) for method in get_args(Method)
}


class Answer(NamedTuple):
    """Of one question: how long it took, and nDCG@10."""

    milliseconds: float
    ndcg: float


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


async def asked(settings: Settings, embedder: LocalEmbedder, questions: list[Question]) -> dict[str, list[Answer]]:
    """What each question gave in each way."""
    database = Database(settings, settings.database_url or "")
    given: dict[str, list[Answer]] = {way: [] for way in WAYS}
    vectors = await embedder.embed([question.text for question in questions], "query")
    names = list(WAYS)
    for turn, (question, vector) in enumerate(zip(questions, vectors, strict=True)):
        first = turn % len(names)
        for way in names[first:] + names[:first]:
            for _ in range(2):
                begun = time.perf_counter()
                found = await search.search(
                    database,
                    settings,
                    TENANT,
                    vector,
                    question=text.plain(question.text),
                    top_k=TOP_K,
                    options=WAYS[way],
                )
                milliseconds = 1e3 * (time.perf_counter() - begun)
            ranking = [hit.id for hit in found.hits]
            given[way].append(Answer(milliseconds, evaluation.ndcg(ranking, question.grades, TOP_K)))
    await database.close()
    return given


def judged(folder: Path, most: int) -> list[Question]:
    """The first questions of a collection, judging the documents by their names in the one tenant."""
    found = judgements.read(folder, TENANT).questions[:most]
    return [replace(each, grades={f"{folder.name}-{id_}": g for id_, g in each.grades.items()}) for each in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="judged collections in the BEIR layout")
    options = timing.arguments(parser, rows=0)
    embedder = LocalEmbedder()
    each = QUESTIONS // len(options.folders)
    questions = [question for folder in options.folders for question in judged(folder, each)]
    with postgres.started(options.data_dir) as server:
        settings = postgres.empty(server, "fusion_speed")
        with psycopg.connect(settings.migration_url or "", autocommit=True) as owner:
            count = fill(owner, embedder, options.folders, options.data_dir / "fusion")
        where = timing.surroundings(settings.migration_url or "") | {
            "collections": ", ".join(folder.name for folder in options.folders),
            "chunks": f"{count:,}",
            "questions": str(len(questions)),
        }
        given = asyncio.run(asked(settings, embedder, questions))
    results = [
        {"way": way, "ndcg": fmean(answer.ndcg for answer in answers)}
        | dict(
            zip(
                ("median_ms", "p95_ms"),
                np.percentile([a.milliseconds for a in answers], [50, 95]).tolist(),
                strict=True,
            )
        )
        for way, answers in given.items()
    ]
    timing.say(where)
    terminal.table(
        "search by words, vectors and both",
        [("way", "left"), ("nDCG@10", "right"), ("p50 ms", "right"), ("p95 ms", "right")],
        [(row["way"], f"{row['ndcg']:.3f}", f"{row['median_ms']:.1f}", f"{row['p95_ms']:.1f}") for row in results],
    )
    timing.save(options.out, "fusion", {"surroundings": where, "results": results}, draw)


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """nDCG@10 against latency."""
    _, axes = pyplot.subplots(figsize=(7, 4))
    for row in record["results"]:
        axes.plot([row["median_ms"], row["p95_ms"]], [row["ndcg"]] * 2, marker="o", label=row["way"])
    axes.set_xlabel("ms: median and p95")
    axes.set_xlim(left=0)
    axes.set_ylabel("nDCG@10")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()

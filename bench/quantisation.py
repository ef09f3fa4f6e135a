"""Index kinds × oversampling: size, build time, recall@10, latency and throughput, at 384 and 1,536 dimensions.

    python -m bench.quantisation [--rows 50000] [--texts DIR] [--data-dir .bench] [--rounds 4]

One tenant, no filter, every search through the index. Vectors are those of `bench/data.py`'s mixture at 384 and at
1,536 dimensions; with --texts also the local model's, of passages of the files below a folder (HTML, text, POD, gzipped
or not), asked by windows of 8 to 20 words out of passages that are not stored. Embedding them takes minutes and is kept in
the data folder. Recall is against the exact scan of the same database.
"""

import asyncio
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import psycopg
from msgspec import structs
from psycopg import sql

from app import embedded, indexes, search, terminal
from app.database import Database
from app.embedding import LocalEmbedder
from app.search import Options
from app.tables import Kind
from bench import data, postgres, text, timing
from bench.data import EVERYTHING, Corpus
from bench.postgres import SEED, TOP_K
from bench.timing import Sample

KINDS: tuple[Kind, ...] = ("full", "half", "binary")
OVERSAMPLING = (1, 2, 4, 10)
QUERIES = 100
CLIENTS = 4
_BATCH = 64


def of_texts(folder: Path, rows: int, kept: Path) -> Corpus:
    """Passages' vectors by the local model, each 384 numbers, with fields of any kind; kept in a file."""
    found = sorted(text.passages(folder))
    random = Random(SEED)
    random.shuffle(found)
    stored, asked = found[:rows], found[rows : rows + 3 * QUERIES]
    if len(asked) < QUERIES:
        raise SystemExit(f"only {len(found):,} passages below {folder}; needed: {rows + QUERIES:,}")
    if not kept.exists():
        questions = []
        for passage in asked[:QUERIES]:
            words = passage.split()
            start = random.randrange(max(1, len(words) - 20))
            questions.append(" ".join(words[start : start + random.randint(8, 20)]))
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, vectors=asyncio.run(_vectors(stored)), queries=asyncio.run(_vectors(questions)))
    with np.load(kept) as arrays:
        corpus = data.corpus(rows, layout="single", dimensions=2, seed=SEED)
        return replace(corpus, vectors=arrays["vectors"], queries=arrays["queries"])


async def _vectors(texts: Sequence[str]) -> data.Vectors:
    embedder = LocalEmbedder()
    with terminal.progress("passages") as progress:
        starts = progress.track(range(0, len(texts), _BATCH), description="embedding")
        made = [await embedder.embed(texts[start : start + _BATCH], "document") for start in starts]
    return np.concatenate(made).astype(np.float32)


async def _asked(database: Database, settings: Any, corpus: Corpus, number: int, options: Options) -> list[str]:
    query = corpus.queries[number]
    found = await search.search(database, settings, EVERYTHING, query, top_k=TOP_K, options=options)
    if not options.exact and found.scan.strategy != "index":
        raise SystemExit(f"the index was not used: {found.scan}")
    return [hit.id for hit in found.hits]


async def measured(settings: Any, corpus: Corpus, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each oversampling, and one for the exact scan."""
    database = Database(settings, settings.database_url)
    exact = Options(exact=True)
    truth = [frozenset(await _asked(database, settings, corpus, n, exact)) for n in range(len(corpus.queries))]
    rows = []
    for oversampling in (*OVERSAMPLING, None):
        options = Options(oversampling=oversampling) if oversampling else exact
        found = [await _asked(database, settings, corpus, n, options) for n in range(len(corpus.queries))]
        latencies = []
        for n in list(range(len(corpus.queries))) * rounds:
            begun = time.perf_counter()
            await _asked(database, settings, corpus, n, options)
            latencies.append(time.perf_counter() - begun)

        async def client(first: int, options: Options = options) -> None:
            for n in range(first, rounds * len(corpus.queries), CLIENTS):
                await _asked(database, settings, corpus, n % len(corpus.queries), options)

        begun = time.perf_counter()
        await asyncio.gather(*map(client, range(CLIENTS)))
        elapsed = time.perf_counter() - begun
        rows.append(
            {"oversampling": oversampling, "recall": fmean(map(data.recall, found, truth))}
            | timing.figures([Sample(latencies, sum(latencies))])
            | {"requests_per_s": rounds * len(corpus.queries) / elapsed}
        )
    await database.close()
    return iter(rows)


def vectors_of(server: embedded.Server, name: str, corpus: Corpus, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each kind and oversampling over these vectors."""
    dimensions = corpus.vectors.shape[1]
    settings = structs.replace(postgres.empty(server, "quantisation", dimensions), exact_rows=0, statement_timeout=600)
    owner_url = settings.migration_url or ""
    postgres.fill(owner_url, corpus, name)
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("alter database quantisation set maintenance_work_mem = '2GB'"))
    for kind in ("binary", "half", "full"):
        begun = time.perf_counter()
        with terminal.progress("share") as progress:
            task = progress.add_task(f"{name}: {kind}", total=1.0)
            kept = indexes.change(
                owner_url,
                kind,
                oversampling=None,
                told=lambda said, share, task=task, p=progress: p.update(task, completed=share, description=said),  # type: ignore[misc]
                patience=0,
            )
        took = time.perf_counter() - begun
        size = next(each.bytes for each in kept if each.kind == kind)
        for row in asyncio.run(measured(settings, corpus, rounds)):
            yield {"vectors": name, "kind": kind, "bytes": size, "build_s": took} | row


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help=f"of {QUERIES} queries (4)")
    parser.add_argument("--texts", type=Path, help="folder of texts to embed with the local model")
    options = timing.arguments(parser, rows=50_000)
    corpora = {
        f"mixture, {dimensions:,}": data.corpus(options.rows, layout="single", dimensions=dimensions, seed=SEED)
        for dimensions in (384, 1_536)
    }
    if options.texts:
        kept = options.data_dir / f"texts-{options.rows}.npz"
        corpora = {"texts, 384": of_texts(options.texts, options.rows, kept)} | corpora
    with postgres.started(options.data_dir) as server:
        results = [row for name, each in corpora.items() for row in vectors_of(server, name, each, options.rounds)]
        where = timing.surroundings(server.url(database="quantisation"))
        where |= {"rows": f"{options.rows:,}", "clients": f"1, and {CLIENTS} for requests/s"}
    timing.say(where)
    show(results)
    timing.save(options.out, "quantisation", {"surroundings": where, "results": results}, draw)


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table per kind of vectors."""
    columns = ("index MB", "build s", "oversampling", "recall@10", "median ms", "p95 ms", "requests/s")
    for name in dict.fromkeys(row["vectors"] for row in results):
        terminal.table(
            name,
            [("kind", "left"), *((column, "right") for column in columns)],
            [
                (
                    row["kind"],
                    f"{row['bytes'] / 2**20:.0f}",
                    f"{row['build_s']:.0f}",
                    str(row["oversampling"] or "exact"),
                    f"{row['recall']:.3f}",
                    f"{row['median_ms']:.2f}",
                    f"{row['p95_ms']:.2f}",
                    f"{row['requests_per_s']:.0f}",
                )
                for row in results
                if row["vectors"] == name
            ],
        )


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """Recall against median, a line for each kind, a panel for each kind of vectors."""
    names = list(dict.fromkeys(row["vectors"] for row in record["results"]))
    _, panels = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 4), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for kind, colour in zip(KINDS, ("#1f6f8b", "#d98324", "#777777"), strict=True):
            rows = [
                row
                for row in record["results"]
                if (row["vectors"], row["kind"]) == (name, kind) and row["oversampling"]
            ]
            panel.plot(
                [row["median_ms"] for row in rows], [row["recall"] for row in rows], "o-", color=colour, label=kind
            )
            for row in rows:
                panel.annotate(f"×{row['oversampling']}", (row["median_ms"], row["recall"]), fontsize=7)
        panel.set_title(name)
        panel.set_xlabel("median, ms")
    panels[0][0].set_ylabel("recall@10")
    panels[0][0].legend(frameon=False)


if __name__ == "__main__":
    main()

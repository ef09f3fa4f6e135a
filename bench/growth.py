"""How it grows: a database of one tenant at each size, loaded anew.

    python -m bench.growth [--sizes 10000 50000 200000] [--data-dir .bench] [--seconds 20]

Loading is COPY, then the vector and GIN indexes, then vacuum, each timed; `memory` is the most the server's processes
held together (PSS: shared pages counted once) while loading and while searching. Searches are `app.search.search` for
queries without a filter, with 1 and 4 clients, in turns, after a warm-up; recall is against the exact answer.
"""

import asyncio
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg
from psycopg import sql

from app import embedded, search, terminal
from app.database import Database
from app.settings import LOCAL_DIMENSIONS
from bench import data, postgres, timing
from bench.data import EVERYTHING, FILTERS
from bench.postgres import SEED, TOP_K, Loaded
from bench.timing import Sample

SIZES = (10_000, 50_000, 200_000)
CLIENTS = (1, 4)
TURN = 0.5

INDEX_SIZES = """
select coalesce(sum(pg_relation_size(indexrelid)) filter (where am.amname = 'hnsw'), 0)::float8 as hnsw,
       coalesce(sum(pg_relation_size(indexrelid)) filter (where am.amname <> 'hnsw'), 0)::float8 as other,
       (select sum(pg_table_size(oid)) from pg_class where relname in ('documents', 'sources') and relkind = 'r')::float8 as tables
  from pg_index join pg_class on pg_class.oid = indexrelid join pg_am am on am.oid = relam
 where indrelid in ('documents'::regclass, 'sources'::regclass)
"""
"""Bytes of the vector indexes, of the others, and of both tables with what is beside them."""


class Memory:
    """The most that the server's processes held, in MB, since the last `peak()`."""

    def __init__(self, server: embedded.Server) -> None:
        lines = (server.data_path / "postgres" / "postmaster.pid").read_text().splitlines()
        self._postmaster = psutil.Process(int(lines[0]))
        self._most = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            held = 0
            for process in (self._postmaster, *self._postmaster.children()):
                with suppress(psutil.Error):
                    held += process.memory_full_info().pss
            self._most = max(self._most, held / 2**20)

    def peak(self) -> float:
        """And begin again."""
        most, self._most = self._most, 0.0
        return most

    def close(self) -> None:
        """Look no longer."""
        self._over.set()
        self._thread.join()


@contextmanager
def database(server: embedded.Server, rows: int) -> Iterator[Loaded]:
    """A new database of this size, dropped afterwards."""
    name = f"growth_{rows}"
    corpus = data.corpus(rows, layout="single", dimensions=LOCAL_DIMENSIONS, seed=SEED)
    settings = postgres.empty(server, name)
    try:
        took = postgres.fill(settings.migration_url or "", corpus, f"{rows:,} rows")
        yield Loaded(name, settings, corpus, took)
    finally:
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


async def searched(loaded: Loaded, seconds: float) -> dict[str, Any]:
    """Figures for each number of clients, and recall."""
    opened = Database(loaded.settings, loaded.service_url)
    ids: dict[int, list[str]] = {}

    async def ask(number: int) -> None:
        query = loaded.corpus.queries[number]
        found = await search.search(opened, loaded.settings, EVERYTHING, query, top_k=TOP_K)
        ids[number] = [hit.id for hit in found.hits]

    numbers = range(len(loaded.corpus.queries))
    samples: dict[int, list[Sample]] = {clients: [] for clients in CLIENTS}
    for number in numbers:
        await ask(number)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for clients in CLIENTS:
            samples[clients].append(await timing.measured([ask] * clients, numbers, TURN))
    await opened.close()
    truth = loaded.corpus.truth(EVERYTHING, FILTERS["none"], TOP_K)
    one, many = (timing.figures(samples[clients]) for clients in CLIENTS)
    return {
        "recall": fmean(data.recall(found, truth[number]) for number, found in ids.items()),
        "median_ms": one["median_ms"],
        "p95_ms": one["p95_ms"],
        "requests_per_s": one["requests_per_s"],
        "requests_per_s_4": many["requests_per_s"],
    }


def grown(data_dir: Path, sizes: Sequence[int], seconds: float) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The surroundings, and a row for each size."""
    results: list[dict[str, Any]] = []
    with postgres.started(data_dir) as server:
        memory = Memory(server)
        where: dict[str, str] = {}
        for rows in sizes:
            with database(server, rows) as loaded:
                where = where or timing.surroundings(loaded.service_url)
                loading = memory.peak()
                found = asyncio.run(searched(loaded, seconds))
                with psycopg.connect(loaded.owner_url) as owner:
                    sizes_ = owner.execute(INDEX_SIZES).fetchone() or (0, 0, 0)
                held = dict(zip(("hnsw_mb", "other_indexes_mb", "tables_mb"), (n / 2**20 for n in sizes_), strict=True))
                took = {f"{step}_s": round(each, 2) for step, each in loaded.took.items()}
                results.append(
                    {"rows": rows, **took, **held, "loading_mb": loading, "searching_mb": memory.peak(), **found}
                )
        memory.close()
    return where, results


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows of each database (to 500000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="to search for at each size (20)")
    options = timing.arguments(parser)
    where, results = grown(options.data_dir, options.sizes, options.seconds)
    timing.say(where)
    show(results)
    timing.save(options.out, "growth", {"surroundings": where, "results": results}, draw)


COLUMNS = {
    "rows": "rows",
    "copy_s": "COPY s",
    "hnsw_s": "HNSW s",
    "gin_s": "GIN s",
    "tables_mb": "tables MB",
    "hnsw_mb": "HNSW MB",
    "other_indexes_mb": "other indexes MB",
    "loading_mb": "memory loading MB",
    "searching_mb": "searching MB",
    "recall": "recall@10",
    "median_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "requests_per_s": "requests/s",
    "requests_per_s_4": "4 clients",
}


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """One table, a row for each size."""

    def shown(name: str, value: float) -> str:
        return f"{value:.3f}" if name == "recall" else f"{value:.2f}" if name.endswith("_ms") else f"{value:,.0f}"

    rows = [[shown(name, row.get(name, 0)) for name in COLUMNS] for row in results]
    terminal.table("growth, one tenant, 384 dimensions", [(heading, "right") for heading in COLUMNS.values()], rows)


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """Build time, size, latency and throughput over rows."""
    rows = record["results"]
    panels = {
        "build, s": ("copy_s", "hnsw_s", "gin_s"),
        "size, MB": ("tables_mb", "hnsw_mb", "other_indexes_mb", "searching_mb"),
        "latency, ms": ("median_ms", "p95_ms"),
        "requests/s": ("requests_per_s", "requests_per_s_4"),
    }
    _, drawn = pyplot.subplots(1, len(panels), figsize=(13, 3.6))
    for panel, (title, names) in zip(drawn, panels.items(), strict=True):
        for name in names:
            panel.plot([row["rows"] for row in rows], [row.get(name, 0) for row in rows], "o-", label=COLUMNS[name])
        panel.set_title(title)
        panel.set_xlabel("rows")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)


if __name__ == "__main__":
    main()

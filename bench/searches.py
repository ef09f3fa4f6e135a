"""Every tenant × every filter: does the search find what is nearest, all of it, and how fast.

    python -m bench.searches [--rows 200000] [--data-dir .bench] [--rounds 30] [--without-guide]

`pgrecall` is `app.search.search` through `app.database.Database`, one client: what a request waits for the database. The
guide's statement is the one that is copied everywhere, on a table of its own with the indexes it comes with:
`select … where tenant_id = $1 … order by embedding <=> $2 limit 10`, every setting at its default. Recall is against the
exact answer by numpy; every query of every cell counts, also for rows returned and for whether an answer is the same
the next time. Turns are short and go round: all cells, again and again.
"""

import asyncio
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from statistics import fmean
from typing import Any, NamedTuple

import pgvector.psycopg
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from app import search, terminal
from app.database import Database
from bench import data, postgres, timing
from bench.data import EVERYTHING, FILTERS, TENANTS, Layout, Narrowing, Vectors
from bench.postgres import TOP_K, Loaded
from bench.timing import Sample

TURN = 10
"""Queries of one turn."""
PLAIN = (EVERYTHING, "none")
"""The plain search, which the worst one is compared with."""
MOST = 4.0
"""What the p95 of the worst cell may be of the plain search's."""
LEAST_RECALL = 0.99

Answer = tuple[list[str], str]
"""Ids, and how they were found."""
Ask = Callable[[int], Awaitable[Answer]]
"""One search for the query of this number."""


class Cell(NamedTuple):
    """What is asked again and again: the variant, the tenant, the filter."""

    variant: str
    tenant: str
    filter: str


class Seen:
    """What one cell was found to do."""

    def __init__(self, ask: Ask, truth: Sequence[frozenset[str]]) -> None:
        self.ask, self.truth = ask, truth
        self.samples: list[Sample] = []
        self.answers: dict[int, Answer] = {}
        self.changed = 0

    async def turn(self, queries: Sequence[int]) -> None:
        """Ask these queries and remember what came back."""
        latencies: list[float] = []
        for number in queries:
            start = time.perf_counter()
            answer = await self.ask(number)
            latencies.append(time.perf_counter() - start)
            self.changed += self.answers.setdefault(number, answer)[0] != answer[0]
        self.samples.append(Sample(latencies, sum(latencies)))

    def record(self) -> dict[str, Any]:
        """Figures over all turns, and over every query once."""
        expected = {n: len(self.truth[n]) for n in self.answers}
        strategies = [found[1] for found in self.answers.values()]
        return timing.figures(self.samples) | {
            "recall": fmean(data.recall(found[0], self.truth[n]) for n, found in self.answers.items()),
            "rows": fmean(len(found[0]) for found in self.answers.values()),
            "expected_rows": fmean(expected.values()),
            "short": sum(len(found[0]) < expected[n] for n, found in self.answers.items()),
            "changed": self.changed,
            "strategy": ", ".join(sorted(set(strategies), key=strategies.count, reverse=True)),
        }


def pgrecall(database: Database, loaded: Loaded, tenant: str, narrowing: Narrowing) -> Ask:
    """The search as served."""
    asked = postgres.conditions(narrowing)

    async def ask(number: int) -> Answer:
        query = loaded.corpus.queries[number]
        found = await search.search(database, loaded.settings, tenant, query, top_k=TOP_K, conditions=asked)
        how = str(found.scan.strategy) + (", completed" if found.scan.completed else "")
        return [hit.id for hit in found.hits], how

    return ask


GUIDE = (
    "create schema guide",
    "create table guide.documents as select tenant_id, id, doc_type, metadata, created_at, content, embedding from documents",
    "create index on guide.documents (tenant_id)",
    "create index on guide.documents using gin (metadata)",
    "set maintenance_work_mem = '2GB'",
    "create index on guide.documents using hnsw (embedding vector_cosine_ops)",
    "vacuum analyze guide.documents",
)
"""The guide's table and indexes, at their defaults."""


def prepare_guide(loaded: Loaded) -> None:
    """Make the guide's table unless it is there."""
    with psycopg.connect(loaded.owner_url, autocommit=True) as owner:
        if owner.execute("select to_regclass('guide.documents')").fetchone() != (None,):
            return
        owner.execute("drop schema if exists guide cascade")
        with terminal.progress("steps") as progress:
            for statement in progress.track(GUIDE, description=f"{loaded.name}: the guide's table"):
                owner.execute(statement.encode())


def guide(connection: psycopg.AsyncConnection[Any], vectors: Vectors, tenant: str, narrowing: Narrowing) -> Ask:
    """The statement of the guides, with a condition for each part of the filter."""
    clauses = [sql.SQL("tenant_id = %(tenant)s")]
    values: dict[str, Any] = {"tenant": tenant, "top_k": TOP_K}
    if narrowing.doc_type is not None:
        clauses.append(sql.SQL("doc_type = %(doc_type)s"))
        values["doc_type"] = narrowing.doc_type
    if narrowing.metadata is not None:
        clauses.append(sql.SQL("metadata @> %(metadata)s"))
        values["metadata"] = Jsonb(dict(narrowing.metadata))
    if narrowing.window is not None:
        clauses.append(sql.SQL("created_at >= %(after)s and created_at < %(before)s"))
        values["after"], values["before"] = narrowing.window
    statement = sql.SQL(
        "select id, content, doc_type, metadata, created_at, 1 - (embedding <=> %(embedding)s) as similarity "
        "from guide.documents where {} order by embedding <=> %(embedding)s limit %(top_k)s"
    ).format(sql.SQL(" and ").join(clauses))

    async def ask(number: int) -> Answer:
        cursor = connection.cursor(binary=True)
        await cursor.execute(statement, {**values, "embedding": vectors[number]})
        return [row[0] for row in await cursor.fetchall()], ""

    return ask


async def measure(loads: Mapping[Layout, Loaded], rounds: int, *, with_guide: bool) -> dict[Cell, Seen]:
    """Turns of all cells, round after round."""
    cells: dict[Cell, Seen] = {}
    async with AsyncExitStack() as opened:
        for layout, loaded in loads.items():
            database = Database(loaded.settings, loaded.service_url)
            opened.push_async_callback(database.close)
            connection = await psycopg.AsyncConnection.connect(loaded.owner_url, autocommit=True)
            await opened.enter_async_context(connection)
            await pgvector.psycopg.register_vector_async(connection)
            for tenant in [EVERYTHING] if layout == "single" else TENANTS:
                for name, narrowing in FILTERS.items():
                    truth = loaded.corpus.truth(tenant, narrowing, TOP_K)
                    own = pgrecall(database, loaded, tenant, narrowing)
                    cells[Cell("pgrecall", tenant, name)] = Seen(own, truth)
                    if with_guide:
                        theirs = guide(connection, loaded.corpus.queries, tenant, narrowing)
                        cells[Cell("guide", tenant, name)] = Seen(theirs, truth)
        count = len(next(iter(loads.values())).corpus.queries)
        for found in cells.values():
            await found.ask(0)
        # One variant after the other within a round: each finds its own pages in memory, not the other's.
        ordered = sorted(cells, key=lambda cell: cell.variant, reverse=True)
        with terminal.progress("turns") as progress:
            for cell_round in progress.track(range(rounds), description="measuring"):
                asked = [number % count for number in range(cell_round * TURN, (cell_round + 1) * TURN)]
                for cell in ordered:
                    await cells[cell].turn(asked)
    return cells


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help=f"of {TURN} queries of 100 each (30)")
    parser.add_argument("--without-guide", action="store_true", help="leave the guide's statement out")
    options = timing.arguments(parser)
    with postgres.started(options.data_dir) as server:
        layouts: tuple[Layout, ...] = ("mixed", "single")
        loads = {layout: postgres.loaded(server, options.rows, layout) for layout in layouts}
        if not options.without_guide:
            for loaded in loads.values():
                prepare_guide(loaded)
        where = timing.surroundings(loads["mixed"].service_url) | {"rows": f"{options.rows:,} of 384 dimensions"}
        seen = asyncio.run(measure(loads, options.rounds, with_guide=not options.without_guide))
    results = [cell._asdict() | found.record() for cell, found in seen.items()]
    verdict = judged([row for row in results if row["variant"] == "pgrecall"])
    timing.say(where)
    show(results)
    timing.say(verdict)
    timing.save(options.out, "searches", {"surroundings": where, "verdict": verdict, "results": results}, draw)


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures that are promised, over pgrecall's cells."""
    plain = next(row["p95_ms"] for row in rows if (row["tenant"], row["filter"]) == PLAIN)
    worst = max(rows, key=lambda row: row["p95_ms"])
    missed = [f"{r['tenant']} / {r['filter']} {r['recall']:.3f}" for r in rows if r["recall"] < LEAST_RECALL]
    short = [f"{r['tenant']} / {r['filter']}" for r in rows if r["short"]]
    changed = [f"{r['tenant']} / {r['filter']}" for r in rows if r["changed"]]
    return {
        "worst p95 / p95 of the plain search": f"{worst['p95_ms'] / plain:.1f} (at most {MOST:g}): "
        f"{worst['p95_ms']:.2f} ms, {worst['tenant']} / {worst['filter']}, against {plain:.2f} ms",
        f"recall@10 under {LEAST_RECALL}": "; ".join(missed) or "none",
        "searches short of rows": "; ".join(short) or "none",
        "answers that changed": "; ".join(changed) or "none",
    }


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table per variant."""
    columns = ["recall@10", "rows", "short of", "changed", "median ms", "p95 ms", "requests/s"]
    for variant, title in (("pgrecall", "pgrecall, database time"), ("guide", "the guide's statement")):
        shown = [row for row in results if row["variant"] == variant]
        if not shown:
            continue
        headings = [
            ("tenant", "left"),
            ("filter", "left"),
            *((name, "right") for name in columns),
            ("strategy", "left"),
        ]
        terminal.table(
            title,
            headings,
            [
                (
                    row["tenant"],
                    row["filter"],
                    f"{row['recall']:.3f}",
                    f"{row['rows']:.1f}/{row['expected_rows']:.0f}",
                    row["short"],
                    row["changed"],
                    f"{row['median_ms']:.2f}",
                    f"{row['p95_ms']:.2f}",
                    f"{row['requests_per_s']:.0f}",
                    row["strategy"],
                )
                for row in shown
            ],
        )


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """Recall and p95 of each cell, both variants."""
    cells = list(dict.fromkeys((row["tenant"], row["filter"]) for row in record["results"]))
    _, (left, right) = pyplot.subplots(1, 2, figsize=(11, 9), sharey=True)
    for offset, (variant, colour) in enumerate((("pgrecall", "#1f6f8b"), ("guide", "#d98324"))):
        rows = [row for row in record["results"] if row["variant"] == variant]
        places = [cells.index((row["tenant"], row["filter"])) + 0.36 * offset for row in rows]
        if rows:
            left.barh(places, [row["recall"] for row in rows], 0.36, color=colour, label=variant)
            right.barh(places, [row["p95_ms"] for row in rows], 0.36, color=colour, label=variant)
    left.set_yticks([n + 0.18 for n in range(len(cells))], [f"{tenant} · {name}" for tenant, name in cells])
    left.invert_yaxis()
    left.margins(y=0.01)
    left.set_xlabel("recall@10")
    right.set_xlabel("p95, ms (log)")
    right.set_xscale("log")
    left.legend(loc="upper left", bbox_to_anchor=(0, 1.06), ncols=2, frameon=False)


if __name__ == "__main__":
    main()

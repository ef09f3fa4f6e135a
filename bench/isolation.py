"""What keeping tenants apart costs a search: the service's role and views, against the owner on the tables.

    python -m bench.isolation [--rows 200000] [--data-dir .bench] [--rounds 100]

The statements are those `app.search.search` sends for a tenant and a filter. As served, each is run as the service runs
it: the role and the tenant set in its transaction, read through the views. As owner, the same text names the tables for
the views, and no role and no tenant are set. Both go through `app.pool`, on one connection each, query by query.
"""

import asyncio
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

from msgspec.structs import replace

from app import search, terminal
from app.database import Database
from app.pool import Pool
from app.statements import Statement
from bench import postgres, timing
from bench.data import FILTERS, TENANTS
from bench.postgres import TOP_K, Loaded
from bench.timing import Sample

QUERIES = 20
ROUNDS_A_CONNECTION = 4
MOST = 1.10
"""What the median and the p95 as served may be of those as owner."""
CHOSEN = ("none", "type 20 %", "both 2 %")
"""Filters that are measured: none, a column, a column and metadata."""
VIEWS = {"tenant_documents": "documents", "tenant_sources": "sources"}

Ask = Callable[[int], Awaitable[object]]


class Prepared(NamedTuple):
    """A statement with its values and settings, for one query."""

    statement: Statement
    config: dict[str, str]


class Cell(NamedTuple):
    """A tenant with a filter, asked both ways, and the indexes each plan uses."""

    tenant: str
    filter: str
    strategy: str
    served: Ask
    owner: Ask
    indexes: tuple[frozenset[str], frozenset[str]]


def on_tables(statement: Statement) -> Statement:
    """The same statement on the tables."""
    text = statement.sql
    for view, table in VIEWS.items():
        text = text.replace(view, table)
    return statement._replace(sql=text)


def explained(statement: Statement) -> Statement:
    """The statement's plan."""
    return statement._replace(sql=f"explain (format json) {statement.sql}")


def indexes(node: Any) -> frozenset[str]:
    """The indexes in a plan."""
    if isinstance(node, list):
        return frozenset().union(*map(indexes, node))
    if not isinstance(node, dict):
        return frozenset()
    own = {node["Index Name"]} if "Index Name" in node else set()
    return frozenset(own).union(*map(indexes, node.values()))


async def cell(service: Database, owner: Pool, loaded: Loaded, tenant: str, name: str) -> Cell:
    """The last statement of each query's search, ready to be run both ways."""
    asked = postgres.conditions(FILTERS[name])
    several = []
    for query in loaded.corpus.queries[:QUERIES]:
        for _ in range(2):  # the second time it is remembered which way it goes
            found = await search.search(service, loaded.settings, tenant, query, top_k=TOP_K, conditions=asked)
        step = found.steps[-1]
        several.append(Prepared(step.statement, step.config))
    timeout = {"statement_timeout": "10000"}

    async def served(number: int) -> object:
        each = several[number]
        return await service.fetch(tenant, [each.statement], each.config)

    async def as_owner(number: int) -> object:
        each = several[number]
        return await owner.run(timeout | each.config, [on_tables(each.statement)])

    assert await served(0) == await as_owner(0), (tenant, name)
    first = several[0]
    ((one,),) = await service.fetch(tenant, [explained(first.statement)], first.config)
    ((other,),) = await owner.run(timeout | first.config, [explained(on_tables(first.statement))])
    plans = tuple(indexes(next(iter(row.values()))) for row in (one, other))
    return Cell(tenant, name, first.statement.name, served, as_owner, (plans[0], plans[1]))


async def pairs(asked: Cell, turn: int) -> dict[str, Sample]:
    """Every query both ways, one right after the other: what else the machine does meets both."""
    latencies: dict[str, list[float]] = {"served": [], "owner": []}
    ways = [("served", asked.served), ("owner", asked.owner)]
    for number in range(QUERIES):
        for way, ask in ways if (turn + number) % 2 else reversed(ways):
            start = time.perf_counter()
            await ask(number)
            latencies[way].append(time.perf_counter() - start)
    return {way: Sample(each, sum(each)) for way, each in latencies.items()}


async def measure(loaded: Loaded, rounds: int) -> list[dict[str, Any]]:
    """Both ways in pairs, round after round, the first of the two changing places.

    On new connections every `ROUNDS_A_CONNECTION` rounds: where the scheduler puts a connection's server process was worth up to a
    quarter of a short search for as long as the connection lived, whichever way it was used.
    """
    settings = replace(loaded.settings, pool_size=1)
    samples: dict[tuple[str, str, str], list[Sample]] = {}
    with terminal.progress("rounds") as progress:
        for turn in progress.track(range(rounds), description="measuring"):
            if turn % ROUNDS_A_CONNECTION == 0:
                opened = AsyncExitStack()
                service, owner = Database(settings, loaded.service_url), Pool(loaded.owner_url, settings)
                opened.push_async_callback(service.close)
                opened.push_async_callback(owner.close)
                cells = [await cell(service, owner, loaded, tenant, name) for tenant in TENANTS for name in CHOSEN]
                for each in cells:
                    await pairs(each, turn)  # from here on the statements are prepared
            for each in cells:
                for way, sample in (await pairs(each, turn)).items():
                    samples.setdefault((each.tenant, each.filter, way), []).append(sample)
            if (turn + 1) % ROUNDS_A_CONNECTION == 0 or turn + 1 == rounds:
                await opened.aclose()
    results = []
    for each in cells:
        served, as_owner = (timing.figures(samples[each.tenant, each.filter, way]) for way in ("served", "owner"))
        results.append(
            {
                "tenant": each.tenant,
                "filter": each.filter,
                "strategy": each.strategy,
                "same_indexes": each.indexes[0] == each.indexes[1],
                "indexes": sorted(each.indexes[0]),
                "served": served,
                "owner": as_owner,
                "median_ratio": served["median_ms"] / as_owner["median_ms"],
                "p95_ratio": served["p95_ms"] / as_owner["p95_ms"],
            }
        )
    return results


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help=f"of {QUERIES} queries of each cell, both ways (100)")
    parser.add_argument("--load-only", action="store_true", help="make the data and stop, before asking for quiet")
    options = timing.arguments(parser)
    with postgres.started(options.data_dir) as server:
        loaded = postgres.loaded(server, options.rows)
        if options.load_only:
            return
        where = timing.surroundings(loaded.service_url) | {"rows": f"{options.rows:,} of 384 dimensions"}
        results = asyncio.run(measure(loaded, options.rounds))
    verdict = judged(results)
    timing.say(where)
    show(results)
    timing.say(verdict)
    timing.save(options.out, "isolation", {"surroundings": where, "verdict": verdict, "results": results}, draw)


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is promised, over all cells."""

    def worst(name: str) -> str:
        row = max(rows, key=lambda row: row[name])
        return f"{row[name]:.3f} (at most {MOST:.3f}): {row['tenant']} / {row['filter']}"

    other = [f"{row['tenant']} / {row['filter']}" for row in rows if not row["same_indexes"]]
    return {
        "largest ratio of medians": worst("median_ratio"),
        "largest ratio of p95": worst("p95_ratio"),
        "plans with other indexes": "; ".join(other) or "none",
    }


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table."""
    columns = ["served ms", "p95", "owner ms", "p95", "median ratio", "p95 ratio"]
    headings = [("tenant", "left"), ("filter", "left"), ("scan", "left"), *((name, "right") for name in columns)]
    terminal.table(
        "as served, and as owner on the tables",
        [*headings, ("same indexes", "left")],
        [
            (
                row["tenant"],
                row["filter"],
                row["strategy"],
                *(f"{row[way][name]:.2f}" for way in ("served", "owner") for name in ("median_ms", "p95_ms")),
                f"{row['median_ratio']:.2f}",
                f"{row['p95_ratio']:.2f}",
                "yes" if row["same_indexes"] else "no",
            )
            for row in results
        ],
    )


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """The ratio of each cell."""
    rows = record["results"]
    _, axes = pyplot.subplots(figsize=(8, 4))
    names = [f"{row['tenant']} / {row['filter']}" for row in rows]
    for offset, (name, colour) in enumerate((("median_ratio", "#1f6f8b"), ("p95_ratio", "#d98324"))):
        places = [number + 0.36 * offset for number in range(len(rows))]
        axes.barh(places, [row[name] for row in rows], 0.36, color=colour, label=name.replace("_", " "))
    axes.set_yticks([number + 0.18 for number in range(len(rows))], names)
    axes.axvline(MOST, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("as served / as owner on the tables")
    axes.legend()


if __name__ == "__main__":
    main()

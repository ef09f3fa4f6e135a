"""What the choice of driver costs the search transaction: the same statements, data and server through each of them.

    python -m bench.drivers [--admin URL] [--seconds 50] [--uvloop] [--json]

Every variant asks what `search.search` asks: BEGIN; role, tenant, time limit and planner settings; the statement `few`;
COMMIT; and where `few` finds the tenant too large to be measured row by row, the same again with `nearest`. Ten rows
come back. Variants take short turns, round after round, so that whatever else the machine does meets all of them. The bare
drivers keep one connection per client; `search.search`, `Database.fetch` and SQLAlchemy take one from a pool each time.
"""

import argparse
import asyncio
import contextlib
import importlib
import itertools
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import asyncpg  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import pgvector.asyncpg
import pgvector.psycopg
import psycopg
from pgvector import Vector
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy import Select, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import create_async_engine

from app import embedded, local, roles, scans, schema, search, terminal
from app.conditions import Conditions
from app.database import Database
from app.settings import LOCAL_DIMENSIONS, Settings
from app.statements import Rendered, rendered
from bench import postgres, timing, transactions
from bench.timing import Sample
from bench.transactions import Search

TENANTS = {"small": 1_500, "large": 18_500}
CLIENTS = (1, 4)
TOP_K = 10
QUERIES = 16
SLICE = 0.1
"""Seconds of one variant's turn: short, because the machine's other work comes in waves."""
LEAST_ROUNDS = 3
WARM_UP = 8
"""Requests of each client and tenant before anything is measured; psycopg prepares a statement when it comes again."""

PGBENCH = "pgbench, pipeline"
YARDSTICK = "search.search"
BOUND, CANDIDATES = 5_000, 4 * TOP_K
"""The variant that the ratios are against."""

Kind = Literal["few", "nearest"]
KINDS: tuple[Kind, ...] = ("few", "nearest")
Embedding = npt.NDArray[np.float32]
Rows = Sequence[Mapping[str, Any]]
Ask = Callable[[str, Embedding], Awaitable[list[str]]]
"""One search by one client: tenant and query to the ids found."""


class Corpus(NamedTuple):
    """A loaded database: the URL of its service login, the service's settings, what to ask."""

    url: str
    settings: Settings
    queries: list[Embedding]

    def config(self, tenant: str, kind: Kind) -> dict[str, str]:
        """What `Database.fetch` and the search set for a transaction."""
        limit = str(int(self.settings.statement_timeout * 1000))
        identity = {"role": roles.APP, "pgrecall.tenant_id": tenant, "statement_timeout": limit}
        return identity | (
            scans.index_config(self.settings.ef_search, CANDIDATES) if kind == "nearest" else scans.EXACT
        )

    def values(self, tenant: str, kind: Kind, embedding: object) -> dict[str, Any]:
        """What a statement is run with."""
        values: dict[str, Any] = {"tenant_id": tenant, "top_k": TOP_K, "embedding": embedding}
        return values | (
            {"bound": BOUND + 1} if kind == "few" else {"candidates": CANDIDATES} if kind == "nearest" else {}
        )

    async def ids(self, run: Callable[[Kind, str, Embedding], Awaitable[Rows]], tenant: str, query: Embedding) -> Any:
        """The decision of `search.search`, over any driver."""
        rows = await run("few", tenant, query)
        if rows[0]["candidates"] > BOUND:
            rows = await run("nearest", tenant, query)
        return [row["id"] for row in rows]


def statement(kind: Kind) -> Select[Any]:
    return scans.build(kind, Conditions(), scans.Wanted(LOCAL_DIMENSIONS))


@cache
def text(kind: Kind) -> Rendered:
    return rendered(statement(kind))


@contextlib.asynccontextmanager
async def own_search(corpus: Corpus, clients: int) -> AsyncIterator[Sequence[Ask]]:
    database = Database(corpus.settings, corpus.url)

    async def ask(tenant: str, query: Embedding) -> list[str]:
        return [hit.id for hit in (await search.search(database, corpus.settings, tenant, query, top_k=TOP_K)).hits]

    yield [ask] * clients
    await database.close()


@contextlib.asynccontextmanager
async def own_fetch(corpus: Corpus, clients: int) -> AsyncIterator[Sequence[Ask]]:
    database = Database(corpus.settings, corpus.url)

    async def run(kind: Kind, tenant: str, query: Embedding) -> Rows:
        ready = text(kind).with_values(kind, corpus.values(tenant, kind, query))
        (rows,) = await database.fetch(tenant, [ready], corpus.config(tenant, kind))
        return rows

    yield [partial(corpus.ids, run)] * clients
    await database.close()


def set_config(config: Mapping[str, str]) -> sql.Composed:
    """One SELECT that sets everything for this transaction, values quoted in place."""
    calls = [sql.SQL("set_config({}, {}, true)").format(*pair) for pair in config.items()]
    return sql.SQL("select {}").format(sql.SQL(", ").join(calls))


Transaction = Literal["commit()", "explicit", "implicit", "stepwise"]


@contextlib.asynccontextmanager
async def bare_psycopg(transaction: Transaction, corpus: Corpus, clients: int) -> AsyncIterator[Sequence[Ask]]:
    """How the transaction begins and ends decides how often psycopg waits for the server, pipeline or not.

    `commit()`: psycopg waits for the BEGIN it adds, in commit() and at the pipeline's end: three round trips. `explicit`:
    autocommit, BEGIN and COMMIT are statements like the others: one. `implicit`: autocommit, the pipeline itself is the
    transaction, which PostgreSQL ends at its Sync: one. `stepwise`: no pipeline: four.
    """

    async def run(connection: psycopg.AsyncConnection[Any], kind: Kind, tenant: str, query: Embedding) -> Rows:
        config = corpus.config(tenant, kind)
        values = {**text(kind).constants, **corpus.values(tenant, kind, query)}
        cursor = connection.cursor(row_factory=dict_row, binary=True)
        async with contextlib.nullcontext() if transaction == "stepwise" else connection.pipeline():
            if transaction == "explicit":
                await connection.execute("begin")
            await connection.execute(
                "select " + ", ".join("set_config(%s, %s, true)" for _ in config),
                [part for pair in config.items() for part in pair],
            )
            await cursor.execute(text(kind).sql.encode(), values)
            if transaction == "explicit":
                await connection.execute("commit")
            elif transaction != "implicit":
                await connection.commit()
        return await cursor.fetchall()

    async with contextlib.AsyncExitStack() as opened:
        asks: list[Ask] = []
        for _ in range(clients):
            connection = await opened.enter_async_context(
                await psycopg.AsyncConnection.connect(corpus.url, autocommit=True, prepare_threshold=3)
            )
            await pgvector.psycopg.register_vector_async(connection)
            await connection.set_autocommit(transaction in ("explicit", "implicit"))
            asks.append(partial(corpus.ids, partial(run, connection)))
        yield asks


@contextlib.asynccontextmanager
async def bare_asyncpg(corpus: Corpus, clients: int) -> AsyncIterator[Sequence[Ask]]:
    """BEGIN and the settings as one simple query, the prepared statement, COMMIT: three round trips, it has no pipeline."""
    dialect = postgresql.asyncpg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy does not type its dialects
    compiled = {kind: statement(kind).compile(dialect=dialect) for kind in KINDS}

    async def run(connection: Any, prepared: Mapping[Kind, Any], kind: Kind, tenant: str, query: Embedding) -> Rows:
        values = {**compiled[kind].params, **corpus.values(tenant, kind, query)}
        await connection.execute("begin; " + set_config(corpus.config(tenant, kind)).as_string(None))
        rows: Rows = await prepared[kind].fetch(*(values[name] for name in compiled[kind].positiontup or ()))
        await connection.execute("commit")
        return rows

    connections = [await asyncpg.connect(corpus.url) for _ in range(clients)]
    asks: list[Ask] = []
    for connection in connections:
        await pgvector.asyncpg.register_vector(connection)
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        prepared = {kind: await connection.prepare(str(made)) for kind, made in compiled.items()}
        asks.append(partial(corpus.ids, partial(run, connection, prepared)))
    yield asks
    for connection in connections:
        await connection.close()


@contextlib.asynccontextmanager
async def by_hand(driver: str, corpus: Corpus, clients: int) -> AsyncIterator[Sequence[Ask]]:
    """SQLAlchemy as guides show it: a statement built for the request, run on an AsyncConnection, the vector as text."""
    connect: Callable[[str], Any] = {"psycopg": psycopg.AsyncConnection.connect, "asyncpg": asyncpg.connect}[driver]
    engine = create_async_engine(
        f"postgresql+{driver}://", async_creator=lambda: connect(corpus.url), pool_size=clients, max_overflow=0
    )

    async def run(kind: Kind, tenant: str, query: Embedding) -> Rows:
        config = corpus.config(tenant, kind)
        values = corpus.values(tenant, kind, Vector(query).to_text())
        async with engine.connect() as connection, connection.begin():
            await connection.execute(select(*(func.set_config(name, value, True) for name, value in config.items())))
            rows: Any = (await connection.execute(statement(kind), values)).mappings()
            return list(rows)

    yield [partial(corpus.ids, run)] * clients
    await engine.dispose()


VARIANTS: dict[str, Callable[[Corpus, int], contextlib.AbstractAsyncContextManager[Sequence[Ask]]]] = {
    YARDSTICK: own_search,
    "Database.fetch": own_fetch,
    "psycopg, pipeline, commit()": partial(bare_psycopg, "commit()"),
    "psycopg, pipeline, explicit": partial(bare_psycopg, "explicit"),
    "psycopg, pipeline, implicit": partial(bare_psycopg, "implicit"),
    "psycopg, no pipeline": partial(bare_psycopg, "stepwise"),
    "asyncpg": bare_asyncpg,
    "SQLAlchemy + psycopg by hand": partial(by_hand, "psycopg"),
    "SQLAlchemy + asyncpg by hand": partial(by_hand, "asyncpg"),
}


async def warmed(opened: Mapping[str, Sequence[Ask]], queries: Sequence[Embedding]) -> None:
    """Ask through every connection, and stop where a variant finds something else than the others."""
    expected: dict[tuple[str, int], list[str]] = {}
    for name, asks in opened.items():
        for tenant in TENANTS:
            for ask in asks:
                for number, query in enumerate(queries[:WARM_UP]):
                    ids = await ask(tenant, query)
                    if len(ids) != TOP_K or expected.setdefault((tenant, number), ids) != ids:
                        raise SystemExit(f"{name} found {ids} for query {number} of {tenant}")


def as_search(corpus: Corpus, tenant: str, query: Embedding) -> Search:
    """The transactions of one search of this tenant."""
    kinds = KINDS if TENANTS[tenant] > BOUND else KINDS[:1]
    return [
        transactions.Transaction(
            corpus.config(tenant, kind),
            [(text(kind).sql, {**text(kind).constants, **corpus.values(tenant, kind, query)})],
        )
        for kind in kinds
    ]


def pgbench(corpus: Corpus, tenant: str, clients: int, folder: Path) -> Sample:
    """The same transactions from C, each in one packet: what remains is the server and the socket."""
    searches = [as_search(corpus, tenant, query) for query in corpus.queries[:4]]
    scripts = transactions.write_scripts(searches, folder)
    return transactions.pgbench(corpus.url, scripts, clients, round(SLICE * 400), folder)


@contextlib.contextmanager
def loaded(admin: str) -> Iterator[Corpus]:
    """A database of its own on the server of `admin`, filled and indexed; dropped afterwards."""
    name = f"pgrecall_bench_{secrets.token_hex(4)}"

    def url(user: str) -> str:
        parts = urlsplit(admin)
        return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}", path=f"/{name}"))

    settings = Settings(migration_url=url(local.OWNER), embedder="local", pool_size=max(CLIENTS))
    local.bootstrap(admin, name)
    try:
        schema.migrate(settings)
        generator = np.random.default_rng(7)
        centres = generator.standard_normal((200, LOCAL_DIMENSIONS))

        def clustered(count: int) -> Embedding:
            around = centres[generator.integers(0, len(centres), count)]
            return (around + 0.7 * generator.standard_normal(around.shape)).astype(np.float32)

        with psycopg.connect(url(local.OWNER), autocommit=True) as owner:
            pgvector.psycopg.register_vector(owner)
            indexes = postgres.dropped(owner)
            for tenant, count in TENANTS.items():
                fill(owner, tenant, clustered(count))
            owner.execute("set maintenance_work_mem = '512MB'")
            for definition in indexes:
                owner.execute(definition)
            owner.execute("vacuum analyze sources, documents")
        yield Corpus(url(local.SERVICE), settings, list(clustered(QUERIES)))
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))


def fill(owner: psycopg.Connection[Any], tenant: str, embeddings: Embedding) -> None:
    """One document of one chunk per vector; the texts are so short that the vector lies in the row, not in TOAST."""
    prose = "\n".join(topics.values())
    pieces = [prose[start : start + 80] for start in range(0, len(prose) - 80, 80)]
    contents = [pieces[n % len(pieces)] for n in range(len(embeddings))]
    with owner.cursor().copy(
        "copy sources (tenant_id, id, content, chunk_keys, start_offsets, state) from stdin"
    ) as rows:
        for n, content in enumerate(contents):
            rows.write_row((tenant, f"d{n}", content, ["k"], [0], "ready"))
    with owner.cursor().copy(
        "copy documents (tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding) "
        "from stdin (format binary)"
    ) as rows:
        rows.set_types(["text", "text", "text", "text", "jsonb", "timestamptz", "text", "vector"])
        for n, (content, embedding) in enumerate(zip(contents, embeddings, strict=True)):
            kept = Jsonb({"lang": "de" if n % 10 == 0 else "en", "n": n})
            created_at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=n % 672)
            rows.write_row(
                (tenant, f"d{n}", "k", "faq" if n % 5 == 0 else "manual", kept, created_at, content, embedding)
            )


def rounds(corpus: Corpus, seconds: float, loop: Any) -> dict[tuple[str, int, str], list[Sample]]:
    """Whole rounds until the time is over, by tenant, number of clients and variant; each begins with another variant."""
    samples: dict[tuple[str, int, str], list[Sample]] = {}
    with asyncio.Runner(loop_factory=loop) as runner, tempfile.TemporaryDirectory() as folder:
        stack = contextlib.AsyncExitStack()
        try:
            opened = {
                name: runner.run(stack.enter_async_context(variant(corpus, max(CLIENTS))))
                for name, variant in VARIANTS.items()
            }
            runner.run(warmed(opened, corpus.queries))
            names = [*opened, PGBENCH]
            end = time.monotonic() + seconds
            for number in itertools.count():
                if number >= LEAST_ROUNDS and time.monotonic() > end:
                    break
                for tenant, clients in itertools.product(TENANTS, CLIENTS):
                    for name in names:
                        if name == PGBENCH:
                            sample = pgbench(corpus, tenant, clients, Path(folder))
                        else:
                            asks = [partial(ask, tenant) for ask in opened[name][:clients]]
                            sample = runner.run(timing.measured(asks, corpus.queries, SLICE))
                        samples.setdefault((tenant, clients, name), []).append(sample)
                names = names[3:] + names[:3]
        finally:
            runner.run(stack.aclose())
    return samples


def row(samples: Sequence[Sample], yardstick: Sequence[Sample]) -> dict[str, Any]:
    """Figures over all rounds; `ratio` are the quartiles of the rounds' ratios of medians."""
    ratios = np.quantile(
        [
            statistics.median(ours.latencies) / statistics.median(theirs.latencies)
            for ours, theirs in zip(samples, yardstick, strict=True)
        ],
        [0.25, 0.5, 0.75],
    )
    return timing.figures(samples) | {"ratio": ratios.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--admin", help="URL of a superuser on a server that asks local roles for no password")
    parser.add_argument("--seconds", type=float, default=50.0, help="to measure for, apart from loading")
    parser.add_argument("--uvloop", action="store_true", help="its event loop instead of asyncio's")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    loop = importlib.import_module("uvloop").new_event_loop if args.uvloop else asyncio.new_event_loop
    with contextlib.ExitStack() as opened:
        admin = args.admin
        if admin is None:
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            admin = opened.enter_context(embedded.start(folder / "pg", durable=False)).url()
        corpus = opened.enter_context(loaded(admin))
        where = timing.surroundings(corpus.url, ("asyncpg",)) | {"loop": "uvloop" if args.uvloop else "asyncio"}
        samples = rounds(corpus, args.seconds, loop)
    where["rounds"] = str(len(samples["small", 1, YARDSTICK]))
    results: list[dict[str, Any]] = [
        {"tenant": tenant, "clients": clients, "variant": name} | row(found, samples[tenant, clients, YARDSTICK])
        for (tenant, clients, name), found in samples.items()
    ]
    if args.json:
        terminal.json({"surroundings": where, "results": results})
        return
    timing.say(where)
    show(results)


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table for each tenant and number of clients; ratios are of medians, against `search.search`."""
    figures = ("median ms", "p95 ms", "requests/s", "client CPU ms", "ratio (quartiles)")
    for (tenant, count), clients in itertools.product(TENANTS.items(), CLIENTS):
        shown = [found for found in results if (found["tenant"], found["clients"]) == (tenant, clients)]
        terminal.table(
            f"{tenant} tenant ({count:,} rows), {clients} client{'s' * (clients > 1)}",
            [("variant", "left"), *((name, "right") for name in figures)],
            [
                (
                    found["variant"],
                    f"{found['median_ms']:.2f}",
                    f"{found['p95_ms']:.2f}",
                    f"{found['requests_per_s']:.0f}",
                    "" if found["client_cpu_ms"] is None else f"{found['client_cpu_ms']:.2f}",
                    "{1:.2f} ({0:.2f}–{2:.2f})".format(*found["ratio"]),
                )
                for found in shown
            ],
        )


if __name__ == "__main__":
    main()

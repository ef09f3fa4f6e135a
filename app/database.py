"""The way to PostgreSQL: connections, who they act as, and what their errors become.

Every transaction drops its rights first: it becomes the role `pgrecall_app` and names its tenant, both only until it
ends, so that nothing is left on a pooled connection. Nobody but `Database.write` commits.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import psycopg
from pgvector.psycopg import halfvec, vector
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from sqlalchemy import ClauseElement, Connection, Engine, create_engine, event, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from app import roles
from app.errors import DatabaseUnavailable, PgrecallError, PoolExhausted, TimedOut
from app.settings import Settings

IDLE_BEFORE_PING = 5.0
"""Seconds a pooled connection may lie idle and still be trusted without asking the server."""

_dialect = postgresql.psycopg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy does not type its dialects


class Statement(NamedTuple):
    """SQL text with its values, apart from being run."""

    name: str
    sql: str
    values: Mapping[str, Any]


class Rendered(NamedTuple):
    """SQL text as psycopg takes it, `%(name)s` for every value, and the values that were fixed when it was built."""

    sql: str
    constants: Mapping[str, Any]

    def with_values(self, name: str, values: Mapping[str, Any]) -> Statement:
        """Ready to be run."""
        return Statement(name, self.sql, {**self.constants, **values})


def rendered(statement: ClauseElement) -> Rendered:
    """The text of a SQLAlchemy statement; worth keeping, because making it takes longer than most searches."""
    compiled = statement.compile(dialect=_dialect)
    return Rendered(str(compiled), {name: value for name, value in compiled.params.items() if value is not None})


def connect(url: str) -> psycopg.Connection[Any]:
    """One connection, not pooled, for commands that are no part of the service.

    Raises DatabaseUnavailable without the driver's words where the server cannot be reached.
    """
    with translated():
        return psycopg.connect(url, autocommit=True, connect_timeout=10)


def sync_engine(url: str) -> Engine:
    """An engine without a pool, for migrations. libpq reads the URL, so `sslmode=` and the like work as they do in psql."""
    return create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=NullPool)


class Database:
    """Pooled connections to the primary and, where there is one, to a replica for searches."""

    def __init__(self, settings: Settings, url: str) -> None:
        """`url` is a libpq URL. Nothing connects before the first use."""
        self._timeout_ms = str(int(settings.statement_timeout * 1000))
        self._engine = _engine(url, settings)
        read_url = settings.database_read_url
        self._read_engine = _engine(read_url, settings) if read_url else self._engine

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()
        if self._read_engine is not self._engine:
            await self._read_engine.dispose()

    @asynccontextmanager
    async def write(self, tenant_id: str) -> AsyncIterator[AsyncConnection]:
        """A transaction as this tenant on the primary; commits when the block ends, leaves nothing when it fails."""
        with translated():
            async with self._engine.connect() as connection, connection.begin():
                await connection.execute(
                    select(*(func.set_config(name, value, True) for name, value in self._identity(tenant_id).items()))
                )
                yield connection

    async def fetch(
        self,
        tenant_id: str,
        statements: Sequence[Statement],
        config: Mapping[str, str] | None = None,
        *,
        primary: bool = False,
    ) -> list[list[dict[str, Any]]]:
        """The rows of each statement, all read in one transaction as this tenant and in one round trip.

        `config` holds settings for this transaction only. A connection that turns out to be dead is replaced once.
        """
        identity = {**self._identity(tenant_id), **(config or {})}
        engine = self._engine if primary else self._read_engine
        for last_try in (False, True):
            with translated():
                async with engine.connect() as pooled:
                    connection = await _driver(pooled)
                    try:
                        return await _pipelined(connection, identity, statements)
                    except psycopg.OperationalError:
                        if connection.broken and not last_try:
                            await pooled.invalidate()
                            continue
                        raise
        raise DatabaseUnavailable  # pragma: no cover - the second try returns or raises

    async def fetch_public(self, statement: Statement, *, as_login: bool = False) -> list[dict[str, Any]]:
        """Rows that belong to no tenant: the schema's revision and the embedding model.

        `as_login`: without dropping the login's rights, for looking at what they are.
        """
        role = {} if as_login else {"role": roles.APP}
        config = role | {"statement_timeout": self._timeout_ms}
        with translated():
            async with self._engine.connect() as pooled:
                (rows,) = await _pipelined(await _driver(pooled), config, [statement])
                return rows

    def _identity(self, tenant_id: str) -> dict[str, str]:
        return {
            "role": roles.APP,
            "pgrecall.tenant_id": tenant_id,
            "statement_timeout": self._timeout_ms,
        }


async def _driver(pooled: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    connection = (await pooled.get_raw_connection()).driver_connection
    if not isinstance(connection, psycopg.AsyncConnection):
        raise TypeError(f"expected a psycopg connection, have {type(connection)}")
    return connection


async def _pipelined(
    connection: psycopg.AsyncConnection[Any], config: Mapping[str, str], statements: Sequence[Statement]
) -> list[list[dict[str, Any]]]:
    # One round trip and one transaction: the connection is in autocommit mode, where PostgreSQL begins a transaction with
    # the first statement of a pipeline and ends it at the Sync that closes it. With its own BEGIN and in commit() psycopg
    # would wait for the server twice more (bench/drivers.py).
    try:
        async with connection.pipeline():
            await connection.execute(
                "select " + ", ".join("set_config(%s, %s, true)" for _ in config),
                [part for pair in config.items() for part in pair],
            )
            cursors = []
            for statement in statements:
                cursor = connection.cursor(row_factory=dict_row, binary=True)
                await cursor.execute(statement.sql, statement.values)
                cursors.append(cursor)
        return [await cursor.fetchall() for cursor in cursors]
    except (psycopg.Error, asyncio.CancelledError):
        if not connection.closed:
            await connection.rollback()
        raise


def _engine(url: str, settings: Settings) -> AsyncEngine:
    async def open_connection() -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(
            url, autocommit=True, connect_timeout=5, application_name="pgrecall"
        )
        connection.prepare_threshold = 3 if settings.prepared_statements else None
        return connection

    engine = create_async_engine(
        "postgresql+psycopg://",
        async_creator=open_connection,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
    )

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("begin")

    @event.listens_for(engine.sync_engine, "checkout")
    def trust(dbapi_connection: Any, record: Any, _proxy: Any) -> None:
        idle = time.monotonic() - record.info.get("used", float("-inf"))
        record.info["used"] = time.monotonic()
        if "vectors" in record.info and idle < IDLE_BEFORE_PING:
            return
        try:
            record.info["vectors"] = dbapi_connection.run_async(_register_vectors)
        except psycopg.Error as error:
            raise DisconnectionError from error

    return engine


async def _register_vectors(connection: psycopg.AsyncConnection[Any]) -> bool:
    # Also the ping of a connection that lay idle. The extension may be missing, or be in another schema, or come later.
    found = False
    for name, register in (("vector", vector.register_vector_info), ("halfvec", halfvec.register_halfvec_info)):
        info = await TypeInfo.fetch(connection, name)
        if info is not None:
            register(connection, info)
            found = True
    await connection.rollback()
    return found


@contextmanager
def translated() -> Iterator[None]:
    """Driver errors change into ours here, once, and lose the driver's words."""
    try:
        yield
    except PgrecallError:
        raise
    except PoolTimeout as error:
        raise PoolExhausted("every database connection is in use; try again") from error
    except DBAPIError as error:
        raise _ours(error.orig) from error
    except psycopg.Error as error:
        raise _ours(error) from error


def _ours(error: BaseException | None) -> BaseException:
    match error:
        case psycopg.errors.QueryCanceled():
            return TimedOut("the database did not finish within PGRECALL_STATEMENT_TIMEOUT")
        case psycopg.errors.TooManyConnections():
            return PoolExhausted("the database accepts no more connections; try again")
        case psycopg.errors.OperationalError() if error.sqlstate is None or error.sqlstate[:2] in ("08", "57", "53"):
            return DatabaseUnavailable("the database cannot be reached; try again")
    return error or DatabaseUnavailable()

"""The way to PostgreSQL: connections, who they act as, and what their errors become.

Every transaction drops its rights first: it becomes the role `pgrecall_app` and names its tenant, both only until it
ends, so that nothing is left on a pooled connection. Nobody but `Database.write` commits.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import psycopg
from pgvector.psycopg import halfvec, vector
from psycopg.rows import dict_row
from psycopg.types import TypeInfo
from sqlalchemy import ClauseElement, Engine, create_engine, event, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from app import roles
from app.errors import DatabaseUnavailable, PgrecallError, PoolExhausted, SchemaTooOld, TimedOut, Unavailable
from app.replica import Replayed, Replica
from app.settings import Settings

log = logging.getLogger(__name__)

IN_THE_WAY = frozenset({"40001", "40P01", "55P03"})
"""SQLSTATEs of a statement that another transaction got the better of: serialisation, deadlock, lock not to be had."""

GRACE = 2.0
"""Seconds beyond PGRECALL_STATEMENT_TIMEOUT after which the server is not waited for any more."""

IDLE_BEFORE_PING = 5.0
"""Seconds a pooled connection may lie idle and still be trusted without asking the server."""

PGVECTOR = """
select t.typname, t.oid, t.typarray,
       case when pg_type_is_visible(t.oid) then ''
            else concat_ws(', ', nullif(current_setting('search_path'), ''), quote_ident(n.nspname)) end as search_path
  from pg_extension e
  join pg_namespace n on n.oid = e.extnamespace
  join pg_type t on t.typnamespace = n.oid and t.typname in ('vector', 'halfvec')
 where e.extname = 'vector'
"""
"""pgvector's types in whatever schema they are, and the search path under which its operators are found."""

WRITTEN = """
select pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
                       '0/0')::bigint as position
"""
"""How far the primary has written its log, in bytes."""

REPLAYED = """
select case when pg_is_in_recovery() then pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')::bigint end as position,
       extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp())::float8 as age
"""
"""How far a streaming replica has replayed the log; no position for what is a replica by other means."""

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
        connection = psycopg.connect(url, autocommit=True, connect_timeout=10)
        connection.execute("set lock_timeout = '4s'")
        return connection


def sync_engine(url: str) -> Engine:
    """An engine without a pool, for migrations. libpq reads the URL, so `sslmode=` and the like work as they do in psql."""

    def open_connection() -> psycopg.Connection[Any]:
        connection = psycopg.connect(url, connect_timeout=10)
        connection.add_notice_handler(_warn)
        return connection

    return create_engine("postgresql+psycopg://", creator=open_connection, poolclass=NullPool, hide_parameters=True)


def _warn(notice: psycopg.errors.Diagnostic) -> None:
    if notice.severity_nonlocalized == "WARNING":
        log.warning("%s. %s", notice.message_primary, notice.message_hint or "")


class Database:
    """Pooled connections to the primary and, where there is one, to a replica for searches."""

    def __init__(self, settings: Settings, url: str) -> None:
        """`url` is a libpq URL. Nothing connects before the first use."""
        self._timeout_ms = str(int(settings.statement_timeout * 1000))
        self._primary = _Pool(url, settings)
        read_url = settings.database_read_url
        self._replica = _Pool(read_url, settings) if read_url else self._primary
        self.replica = Replica(self._written, self._replayed, settings.replica_lag) if read_url else None

    async def close(self) -> None:
        """Close every connection."""
        if self.replica is not None:
            await self.replica.close()
            await self._replica.engine.dispose()
        await self._primary.engine.dispose()

    @asynccontextmanager
    async def write(self, tenant_id: str) -> AsyncIterator[AsyncConnection]:
        """A transaction as this tenant on the primary; commits when the block ends, leaves nothing when it fails.

        A connection that turns out to be dead before the block begins is replaced once.
        """
        identity = self._identity(tenant_id)
        with translated():
            async with AsyncExitStack() as stack:
                for last_try in (False, True):
                    connection = await stack.enter_async_context(self._primary.engine.connect())
                    config = {**identity, **self._primary.search_path}
                    try:
                        await connection.begin()
                        await connection.execute(select(*(func.set_config(*pair, True) for pair in config.items())))
                        break
                    except DBAPIError as error:
                        self._primary.suspect()
                        if not error.connection_invalidated or last_try:
                            raise
                        await connection.close()
                yield connection
                await connection.commit()

    async def fetch(
        self,
        tenant_id: str,
        statements: Sequence[Statement],
        config: Mapping[str, str] | None = None,
        *,
        primary: bool = False,
    ) -> list[list[dict[str, Any]]]:
        """The rows of each statement, all read in one transaction as this tenant and in one round trip.

        `config` holds settings for this transaction only. A connection that turns out to be dead is replaced once. What
        the replica could not do, because it is away or its replay was in the way, the primary does.
        """
        config = {**self._identity(tenant_id), **(config or {})}
        if not primary and self.replica is not None and await self.replica.usable():
            try:
                return await self._replica.run(config, statements)
            except PoolExhausted:
                raise  # the replica is there to keep load off the primary
            except DatabaseUnavailable:
                self.replica.lost()
            except Unavailable:
                log.info("the replica gave up a search in favour of its replay; the primary answers it")
        return await self._primary.run(config, statements)

    async def fetch_public(
        self, statement: Statement, *, as_login: bool = False, replica: bool = False
    ) -> list[dict[str, Any]]:
        """Rows that belong to no tenant: the schema's revision and the embedding model.

        `as_login`: without dropping the login's rights, for looking at what they are.
        """
        config = {"statement_timeout": self._timeout_ms} if as_login else self._public
        pool = self._replica if replica else self._primary
        (rows,) = await pool.run(config, [statement])
        return rows

    async def _written(self) -> int:
        ((row,),) = await self._primary.run(self._public, [Statement("written", WRITTEN, {})])
        return int(row["position"])

    async def _replayed(self) -> Replayed:
        ((row,),) = await self._replica.run(self._public, [Statement("replayed", REPLAYED, {})])
        return Replayed(row["position"], row["age"])

    @property
    def _public(self) -> dict[str, str]:
        return {"role": roles.APP, "statement_timeout": self._timeout_ms}

    def _identity(self, tenant_id: str) -> dict[str, str]:
        return {**self._public, "pgrecall.tenant_id": tenant_id}


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


def _hang_up(connection: psycopg.AsyncConnection[Any]) -> None:
    # statement_timeout does not run while the server waits for the rest of a message, and a cancelled psycopg waits for
    # the server's answer: only the end of the connection ends that.
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


class _Pool:
    """Connections to one server. Once one is found dead, all that are older are asked before they are used again."""

    def __init__(self, url: str, settings: Settings) -> None:
        async def open_connection() -> psycopg.AsyncConnection[Any]:
            connection = await psycopg.AsyncConnection.connect(
                url, autocommit=True, connect_timeout=5, tcp_user_timeout=30_000, application_name="pgrecall"
            )
            connection.prepare_threshold = 3 if settings.prepared_statements else None
            return connection

        self.search_path: dict[str, str] = {}
        """Set in each transaction where the session's own search path does not find pgvector; known once connected."""
        self._suspected = float("-inf")
        self._patience = settings.statement_timeout + GRACE
        self.engine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=open_connection,
            pool_size=settings.pool_size,
            max_overflow=0,
            pool_timeout=settings.pool_timeout,
            hide_parameters=True,
        )
        event.listen(self.engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("begin"))
        event.listen(self.engine.sync_engine, "checkout", self._trust)

    def suspect(self) -> None:
        """A connection was found dead: the others may be."""
        self._suspected = time.monotonic()

    async def run(self, config: Mapping[str, str], statements: Sequence[Statement]) -> list[list[dict[str, Any]]]:
        """The rows of each statement, under these settings; a connection that turns out to be dead is replaced once."""
        for last_try in (False, True):
            with translated():
                async with self.engine.connect() as pooled:
                    connection = await _driver(pooled)
                    deadline = asyncio.get_running_loop().call_later(self._patience, _hang_up, connection)
                    try:
                        return await _pipelined(connection, {**self.search_path, **config}, statements)
                    except BaseException as error:
                        # What psycopg believes of a pipeline that failed (prepared names, its mode) cannot be trusted.
                        died = connection.broken
                        await pooled.invalidate()
                        if died and deadline.when() <= asyncio.get_running_loop().time():
                            raise TimedOut("the database did not answer in time") from error
                        if died:
                            self.suspect()
                        if not died or last_try:
                            raise
                    finally:
                        deadline.cancel()
        raise DatabaseUnavailable  # pragma: no cover - the second try returns or raises

    def _trust(self, dbapi_connection: Any, record: Any, _proxy: Any) -> None:
        used = record.info.get("used", float("-inf"))
        record.info["used"] = time.monotonic()
        if record.info.get("vectors") and used > max(self._suspected, time.monotonic() - IDLE_BEFORE_PING):
            return
        try:
            search_path = dbapi_connection.run_async(_register_vectors)
        except psycopg.Error as error:
            raise DisconnectionError from error
        record.info["vectors"] = search_path is not None
        self.search_path = {"search_path": search_path} if search_path else {}


async def _register_vectors(connection: psycopg.AsyncConnection[Any]) -> str | None:
    """The search path that finds pgvector: empty where the session's own does, None where there is no pgvector."""
    # Also the ping of a connection that lay idle. The extension may be missing, or come later.
    found = await (await connection.execute(PGVECTOR)).fetchall()
    register = {"vector": vector.register_vector_info, "halfvec": halfvec.register_halfvec_info}
    for name, oid, array_oid, _ in found:
        register[name](connection, TypeInfo(name, oid, array_oid))
    return found[0][-1] if found else None


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


def _ours(error: BaseException | None) -> BaseException:  # noqa: PLR0911  one for each kind of error
    match error:
        case psycopg.errors.QueryCanceled():
            return TimedOut("the database did not finish within PGRECALL_STATEMENT_TIMEOUT")
        case psycopg.errors.TooManyConnections():
            return PoolExhausted("the database accepts no more connections; try again")
        case psycopg.errors.DatabaseError() if error.sqlstate in IN_THE_WAY:
            return Unavailable("other work was in the way; try again")
        case psycopg.errors.UndefinedTable():
            return SchemaTooOld("a table is missing from the database: run `pgrecall migrate`")
        case psycopg.errors.ReadOnlySqlTransaction():
            return DatabaseUnavailable("the database takes no writes now; try again")
        case psycopg.errors.OperationalError() if error.sqlstate is None or error.sqlstate[:2] in ("08", "57", "53"):
            return DatabaseUnavailable("the database cannot be reached; try again")
    return error or DatabaseUnavailable()

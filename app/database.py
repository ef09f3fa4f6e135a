"""The way to PostgreSQL: connections, who they act as, and what their errors become.

Every transaction drops its rights first: it becomes the role `pgrecall_app` and names its tenant, both only until it
ends, so that nothing is left on a pooled connection. Nobody but `Database.write` commits.
"""

import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import psycopg
from msgspec import structs
from sqlalchemy import Engine, Select, create_engine, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from app import roles
from app.errors import (
    BeingErased,
    DatabaseUnavailable,
    NotAllowed,
    NotAuthenticated,
    NotRegistered,
    PgrecallError,
    PoolExhausted,
    SchemaTooOld,
    SpaceChanged,
    StorageFull,
    TimedOut,
    Unavailable,
)
from app.pool import Pool, within
from app.replica import Replayed, Replica
from app.settings import Settings
from app.statements import Statement

log = logging.getLogger(__name__)

IN_THE_WAY = frozenset({"40001", "40P01", "55P03"})
"""SQLSTATEs of a statement that another transaction got the better of: serialisation, deadlock, lock not to be had."""

_OTHER_LENGTH = re.compile(r"different (vector|halfvec) dimensions|expected \d+ dimensions, not \d+")
"""What pgvector says of a vector that has another length than the column."""

_OF_KEYS = re.compile(r"\b(keys_in_use|find_key)\(")
"""Functions that a database has from revision 0010 on. An operator that is missing has the same SQLSTATE."""

_RAISED: Mapping[str | None, type[PgrecallError]] = {
    "RK401": NotAuthenticated,
    "RK403": NotAllowed,
    "RK404": NotRegistered,
}
"""SQLSTATEs that functions of revision 0010 raise, in words of ours."""

SETTLE = 1.0
"""Seconds a write waits while its tenant is being erased before it is told to come again; it holds a connection so long."""

WRITERS_END = 60.0
"""Seconds an erasure waits for the writes of its tenant that are under way."""

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


def connect(url: str) -> psycopg.Connection[Any]:
    """One connection, not pooled, for commands that are no part of the service. Its settings stay: not through a pooler.

    Raises DatabaseUnavailable without the driver's words where the server cannot be reached.
    """
    with translated():
        connection = psycopg.connect(url, autocommit=True, connect_timeout=10)
        connection.execute("set lock_timeout = '4s'")
        return connection


@contextmanager
def across(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that sees the state of every tenant's documents and no texts, for commands.

    `url` is the service's; nothing is left on the session, which a pooler may give to others.
    """
    with translated(), psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        connection.prepare_threshold = None
        with connection.transaction():
            settings = {"role": roles.WORKER, "lock_timeout": "4s"}
            for name, value in settings.items():
                connection.execute("select set_config(%s, %s, true)", (name, value))
            yield connection


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
        self._primary = Pool(url, settings)
        self._apart = Pool(url, structs.replace(settings, pool_size=1))
        read_url = settings.database_read_url
        self._replica = Pool(read_url, settings) if read_url else self._primary
        self.replica = Replica(self._written, self._replayed, settings.replica_lag) if read_url else None

    async def close(self) -> None:
        """Close every connection."""
        if self.replica is not None:
            await self.replica.close()
            await self._replica.close()
        await self._apart.close()
        await self._primary.close()

    @asynccontextmanager
    async def write(
        self, tenant_id: str, *, alone: bool = False, limit: float | None = None
    ) -> AsyncIterator[AsyncConnection]:
        """A transaction as this tenant on the primary; commits when the block ends, leaves nothing when it fails.

        `alone`: no other write of the tenant runs beside it, which is for erasing. `limit`: seconds a statement may take,
        PGRECALL_STATEMENT_TIMEOUT unless given. Raises Unavailable where an erasure does not end soon. A connection that
        turns out to be dead before the block begins is replaced once; where none answers soon it is TimedOut.
        """
        identity = self._identity(tenant_id)
        if limit is not None:
            identity["statement_timeout"] = str(int(limit * 1000))
        with translated():
            for last_try in (False, True):
                async with self._primary.lend() as lent:
                    connection, config = lent.connection, lent.search_path | identity
                    try:
                        # From here on the server's own limits hold; only for a session may a pooler let it wait for ever.
                        with within(self._primary.patience + (WRITERS_END if alone else 0), lent.driver):
                            await connection.begin()
                            await connection.execute(_begun(config, tenant_id, alone=alone))
                    except DBAPIError as error:
                        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
                            await connection.rollback()
                            raise _busy(tenant_id, alone=alone) from error
                        self._primary.suspect()
                        if not error.connection_invalidated or last_try:
                            raise
                        continue
                    try:
                        yield connection
                        await connection.commit()
                    except Exception:
                        with suppress(DBAPIError):
                            await connection.rollback()
                        raise
                    return

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
                return await _run(self._replica, config, statements)
            except PoolExhausted:
                raise  # the replica is there to keep load off the primary
            except DatabaseUnavailable:
                self.replica.lost()
            except Unavailable:
                log.info("the replica gave up a search in favour of its replay; the primary answers it")
        return await _run(self._primary, config, statements)

    async def fetch_public(
        self,
        statement: Statement,
        *,
        as_login: bool = False,
        replica: bool = False,
        apart: bool = True,
        config: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Rows that belong to no tenant: the schema's revision and the embedding model.

        `as_login`: without dropping the login's rights, for looking at what they are. `config`: settings besides.

        Over a connection of its own, unless not `apart`: whether this process is ready, and who is asking, is told while
        all others are in use.
        """
        config = dict(config or {}) | ({"statement_timeout": self._timeout_ms} if as_login else self._public)
        pool = self._replica if replica else self._apart if apart else self._primary
        (rows,) = await _run(pool, config, [statement])
        return rows

    async def fetch_across(self, statement: Statement) -> list[dict[str, Any]]:
        """Rows of every tenant, read as pgrecall_worker, which sees the state of documents and not their texts."""
        (rows,) = await _run(self._primary, {**self._public, "role": roles.WORKER}, [statement])
        return rows

    async def _written(self) -> int:
        ((row,),) = await _run(self._primary, self._public, [Statement("written", WRITTEN, {})])
        return int(row["position"])

    async def _replayed(self) -> Replayed:
        ((row,),) = await _run(self._replica, self._public, [Statement("replayed", REPLAYED, {})])
        return Replayed(row["position"], row["age"])

    @property
    def _public(self) -> dict[str, str]:
        return {"role": roles.APP, "statement_timeout": self._timeout_ms}

    def _identity(self, tenant_id: str) -> dict[str, str]:
        return {**self._public, "pgrecall.tenant_id": tenant_id}


def _begun(config: Mapping[str, str], tenant_id: str, *, alone: bool) -> Select[Any]:
    """What a writing transaction begins with: its settings, then the lock that writers share and an erasure has alone."""
    lock = func.pg_advisory_xact_lock if alone else func.pg_advisory_xact_lock_shared
    return select(
        *(func.set_config(*pair, True) for pair in config.items()),
        func.set_config("lock_timeout", str(int(1000 * (WRITERS_END if alone else SETTLE))), True),
        lock(func.hashtextextended(f"pgrecall tenant {tenant_id}", 0)),
        func.set_config("lock_timeout", "0", True),
    )


def _busy(tenant_id: str, *, alone: bool) -> Unavailable:
    if alone:
        return Unavailable(f"writes to tenant {tenant_id!r} did not end within {WRITERS_END:.0f} s; try again", 10)
    return BeingErased(f"tenant {tenant_id!r} is being erased; what is put afterwards stays; try again")


async def _run(pool: Pool, config: Mapping[str, str], statements: Sequence[Statement]) -> list[list[dict[str, Any]]]:
    with translated():
        return await pool.run(config, statements)


@contextmanager
def translated() -> Iterator[None]:
    """Driver errors change into ours here, once, and lose the driver's words."""
    try:
        yield
    except PgrecallError:
        raise
    except DBAPIError as error:
        raise _ours(error.orig) from error
    except psycopg.Error as error:
        raise _ours(error) from error


def _ours(error: BaseException | None) -> BaseException:
    if isinstance(error, psycopg.Error) and (raised := _RAISED.get(error.sqlstate)):
        return raised(error.diag.message_primary or "")
    return _by_kind(error)


def _by_kind(error: BaseException | None) -> BaseException:  # noqa: PLR0911  one for each kind of error
    match error:
        case psycopg.errors.QueryCanceled():
            return TimedOut("the database did not finish within PGRECALL_STATEMENT_TIMEOUT")
        case psycopg.errors.TooManyConnections():
            return PoolExhausted("the database accepts no more connections; try again")
        case psycopg.errors.DatabaseError() if error.sqlstate in IN_THE_WAY:
            return Unavailable("other work was in the way; try again")
        case psycopg.errors.DataException() if _OTHER_LENGTH.search(str(error)):
            return SpaceChanged()
        case psycopg.errors.DiskFull():
            return StorageFull(
                "the database's disk is full and nothing of this was stored: free space there, or move the database to a "
                "larger disk, then try again"
            )
        case psycopg.errors.UndefinedTable():
            return SchemaTooOld("a table is missing from the database: run `pgrecall migrate`")
        case psycopg.errors.UndefinedFunction() if _OF_KEYS.search(str(error)):
            return SchemaTooOld("the database knows no keys: run `pgrecall migrate`")
        case psycopg.errors.ReadOnlySqlTransaction():
            return DatabaseUnavailable("the database takes no writes now; try again")
        case psycopg.errors.OperationalError() if error.sqlstate is None or error.sqlstate[:2] in ("08", "57", "53"):
            return DatabaseUnavailable("the database cannot be reached; try again")
    return error or DatabaseUnavailable()

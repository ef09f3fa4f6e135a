"""Connections to one server: lent, looked after, replaced.

A list and a semaphore where SQLAlchemy has a queue behind greenlets: taking and giving back costs microseconds, of which
every search takes two. SQLAlchemy's connection around the driver's stays for writes.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psycopg
from pgvector.psycopg import halfvec, vector
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.types import TypeInfo
from psycopg.types.json import set_json_loads
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from app import roundtrip
from app.errors import PoolExhausted, TimedOut
from app.roundtrip import PREPARE_FROM, Prepared
from app.settings import Settings
from app.statements import Statement

log = logging.getLogger(__name__)

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

_OUTDATED = (psycopg.errors.FeatureNotSupported, psycopg.errors.InvalidSqlStatementName)
"""What a prepared statement fails with after a migration changed what it returns, or behind a pooler that lost it."""


@dataclass(eq=False)
class Lent:
    """A connection that one caller has for itself: SQLAlchemy's, and the driver's below it."""

    connection: AsyncConnection
    driver: psycopg.AsyncConnection[Any]
    prepared: Prepared | None
    search_path: dict[str, str] = field(default_factory=dict)
    """Set in each transaction where the session's own search path does not find pgvector."""
    has_vectors: bool = False
    used: float = float("-inf")

    async def look(self) -> None:
        """See that it lives, and where pgvector is, which may come later than the connection. Raises psycopg.Error."""
        found = await (await self.driver.execute(PGVECTOR)).fetchall()
        register = {"vector": vector.register_vector_info, "halfvec": halfvec.register_halfvec_info}
        for name, oid, array_oid, _ in found:
            register[name](self.driver, TypeInfo(name, oid, array_oid))
        self.has_vectors = bool(found)
        self.search_path = {"search_path": found[0][-1]} if found and found[0][-1] else {}

    @property
    def clean(self) -> bool:
        """Whether nothing is left of what was done with it."""
        pgconn = self.driver.pgconn
        return (
            not self.driver.closed
            and pgconn.transaction_status == TransactionStatus.IDLE
            and pgconn.pipeline_status == PipelineStatus.OFF
            and not self.connection.in_transaction()
            and not (self.prepared and self.prepared.full)
        )

    async def end(self) -> None:
        """Close it, whatever state it is in."""
        # What psycopg believes of a conversation that was cut short cannot be trusted; libpq only closes the socket.
        self.driver.pgconn.finish()
        with contextlib.suppress(Exception):
            await self.connection.invalidate()
        with contextlib.suppress(Exception):
            await self.connection.close()


class Pool:
    """At most PGRECALL_POOL_SIZE connections. Once one is found dead, all that are older are asked before their next use."""

    def __init__(self, url: str, settings: Settings) -> None:
        """`url` is a libpq URL. Nothing connects before the first use."""
        self._url = url
        self._handed: list[psycopg.AsyncConnection[Any]] = []
        self._settings = settings
        self._suspected = float("-inf")
        self._free: list[Lent] = []
        self._open = True
        self._told = False
        self._turns = asyncio.Semaphore(settings.pool_size)
        self._engine = create_async_engine(
            "postgresql+psycopg://", async_creator=self._taken, poolclass=NullPool, hide_parameters=True
        )
        event.listen(self._engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("begin"))

    @property
    def patience(self) -> float:
        """Seconds an answer is waited for: from the server, or from a pooler that has no session to give."""
        return self._settings.statement_timeout + GRACE

    async def close(self) -> None:
        """Close every connection; those that are lent, once they are given back."""
        self._open = False
        while self._free:
            await self._free.pop().end()
        await self._engine.dispose()

    def suspect(self) -> None:
        """A connection was found dead: the others may be."""
        self._suspected = time.monotonic()

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Lent]:
        """A connection that works, for the length of the block; it is replaced where the block leaves something on it.

        Raises PoolExhausted where none is given back within PGRECALL_POOL_TIMEOUT, and psycopg's errors.
        """
        if self._turns.locked():
            try:
                async with asyncio.timeout(self._settings.pool_timeout):
                    await self._turns.acquire()
            except TimeoutError:
                raise PoolExhausted("every database connection is in use; try again") from None
        else:
            await self._turns.acquire()
        try:
            lent = await self._trusted()
            try:
                yield lent
            finally:
                lent.used = time.monotonic()
                if self._open and lent.clean:
                    self._free.append(lent)
                else:
                    await lent.end()
        finally:
            self._turns.release()

    async def _trusted(self) -> Lent:
        while self._free:
            lent = self._free.pop()
            if lent.has_vectors and lent.used > max(self._suspected, time.monotonic() - IDLE_BEFORE_PING):
                return lent
            try:
                with within(self.patience, lent.driver):
                    await lent.look()
            except psycopg.Error:
                await lent.end()
            except BaseException:
                await lent.end()
                raise
            else:
                return lent
        driver = await _opened(self._url)
        with within(self.patience, driver):
            lent = Lent(await self._wrapped(driver), driver, None)
            try:
                await lent.look()
                if self._settings.prepared_statements and await self._prepares(driver):
                    lent.prepared = Prepared()
                    driver.prepare_threshold = PREPARE_FROM
            except BaseException:
                await lent.end()
                raise
        return lent

    async def _wrapped(self, driver: psycopg.AsyncConnection[Any]) -> AsyncConnection:
        """SQLAlchemy's connection around the driver's. Before it gives the first one out it asks the server for its version."""
        self._handed.append(driver)
        try:
            return await self._engine.connect()
        except BaseException:
            driver.pgconn.finish()
            raise

    async def _taken(self) -> psycopg.AsyncConnection[Any]:
        return self._handed.pop()

    async def _prepares(self, driver: psycopg.AsyncConnection[Any]) -> bool:
        """Whether statements prepared on it are there when they are used."""
        if not await roundtrip.pooled(driver) or await roundtrip.follows(driver):
            return True
        if not self._told:
            self._told = True
            log.info("the pooler before the database does not keep track of prepared statements: none are used")
        return False

    async def run(self, config: Mapping[str, str], statements: Sequence[Statement]) -> list[list[dict[str, Any]]]:
        """The rows of each statement, under these settings; a connection that turns out to be dead is replaced once."""
        last_try = False
        while True:
            async with self.lend() as lent:
                try:
                    with within(self.patience, lent.driver):
                        return await roundtrip.run(
                            lent.driver, lent.prepared, {**lent.search_path, **config}, statements
                        )
                except _OUTDATED:
                    if last_try or lent.prepared is None:
                        raise
                    for each in (lent, *self._free):
                        if each.prepared is not None:
                            each.prepared.forget()
                except psycopg.Error:
                    if not lent.driver.broken:
                        raise
                    self.suspect()
                    if last_try:
                        raise
            last_try = True


async def _opened(url: str) -> psycopg.AsyncConnection[Any]:
    connection = await psycopg.AsyncConnection.connect(
        url,
        autocommit=True,
        connect_timeout=5,
        tcp_user_timeout=30_000,
        # A server that is gone without a word is noticed in a minute, not in the kernel's two hours.
        keepalives_idle=30,
        keepalives_interval=10,
        keepalives_count=3,
        application_name="pgrecall",
        client_encoding=roundtrip.ENCODING,
    )
    set_json_loads(_decoded, connection)
    connection.prepare_threshold = None  # until it is known what is at the other end
    return connection


@contextmanager
def within(seconds: float, driver: psycopg.AsyncConnection[Any]) -> Iterator[None]:
    """Hang up where the other end does not answer in this time. Raises TimedOut."""
    loop = asyncio.get_running_loop()
    deadline = loop.call_later(seconds, _hang_up, driver)
    try:
        yield
    except (psycopg.Error, DBAPIError) as error:
        if driver.closed and deadline.when() <= loop.time():
            raise TimedOut("the database did not answer in time") from error
        raise
    finally:
        deadline.cancel()


def _decoded(value: str | bytes) -> Any:
    try:
        return msgspec.json.decode(value)
    except msgspec.ValidationError:
        return json.loads(value)  # a fraction beyond double precision, which only SQL can have stored


def _hang_up(connection: psycopg.AsyncConnection[Any]) -> None:
    # statement_timeout does not run while the server waits for the rest of a message, and a cancelled psycopg waits for
    # the server's answer: only the end of the connection ends that.
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)

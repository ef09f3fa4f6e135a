"""Limits of keys and tenants, right across server processes without a write per request.

A process takes shares of what a key may in this minute, or a tenant today, out of a row in the database, and spends them by
itself. So of requests never more are let through than the limit says; too few by what other processes have taken and do
not need: less than a SHARE of the limit each, or one request each where that is more. Tokens are known when they are
spent: work that was begun below the limit is finished. Streams are counted one by one.
"""

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from app.database import Database
from app.errors import LimitReached, PgrecallError
from app.keys import Caller
from app.statements import Statement

log = logging.getLogger(__name__)

SHARE = 20
"""A process takes a twentieth of a limit at a time: so many writes a minute, or a day, at most for all of them together."""

USED = 60.0
"""Seconds in which a key's use is written down once, by each process."""

RENEWED = 20.0
"""Seconds after which a process says again which streams it has open; they count for a minute from then on."""

FULL = 3600
"""Seconds after which to try again where a tenant has as many rows as it may: nobody knows when it will delete some."""

MOST = 10_000
"""Keys or tenants whose shares a process has in mind at most; those whose time is over go first."""

USE_KEY = "select granted, ends_in from use_key(%(prefix)s, %(digest)s, %(wanted)s)"
"""Takes a share of a minute's requests and writes down that the key was used. Waits for no disk."""

HOLD_STREAMS = "select hold_streams(%(prefix)s, %(digest)s, %(holder)s, %(wanted)s) as granted"
"""Says how many streams this process has open with a key, or would have."""

TAKE_TOKENS = "select granted, ends_in from take_tokens(%(wanted)s)"
"""Takes a share of the tokens of the tenant's day."""

ROWS = """
select coalesce((select sum(chunks) from collection_statistics where tenant_id = %(tenant_id)s), 0)::bigint
       + (select count(*) from (select from tenant_sources where state = 'pending' limit %(max_rows)s) waiting) as rows
"""
"""Chunks of a tenant, and documents that will become some; these are counted up to the limit only."""


@dataclass
class Share:
    """What a process may spend until a moment of `time.monotonic`. `left` below 0: spent already, out of the next share."""

    left: int = 0
    ends: float = float("-inf")
    spent: bool = False
    """There is no more to be had until then, of this limit."""
    limit: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class _Open:
    """Streams of one key in this process."""

    count: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    renewing: asyncio.Task[None] | None = None


@dataclass
class Limits:
    """The shares of one process."""

    database: Database
    holder: uuid.UUID = field(default_factory=uuid.uuid4)
    _requests: dict[str, Share] = field(default_factory=dict)
    _tokens: dict[str, Share] = field(default_factory=dict)
    _open: dict[str, _Open] = field(default_factory=dict)
    _used: dict[str, float] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def close(self) -> None:
        """Write down nothing more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def request(self, caller: Caller) -> None:
        """Count one request. Raises LimitReached."""
        limit = caller.requests_per_minute
        if limit is None:
            self._note(caller)
            return
        share = _of(self._requests, caller.prefix)
        if share.left <= 0 or share.ends <= time.monotonic():
            await self._take_requests(share, caller, limit)
        share.left -= 1

    async def _take_requests(self, share: Share, caller: Caller, limit: int) -> None:
        async with share.turn:
            begun = time.monotonic()
            if share.ends <= begun:
                share.left, share.spent = 0, False
            if share.left > 0:
                return
            if not share.spent:
                values = {"prefix": caller.prefix, "digest": caller.digest, "wanted": max(1, math.ceil(limit / SHARE))}
                rows = await self.database.fetch_public(Statement("use key", USE_KEY, values))
                share.left = rows[0]["granted"] if rows else 0
                share.ends = begun + (rows[0]["ends_in"] if rows else 1.0)
                share.spent = share.left == 0
            if share.spent:
                raise LimitReached(
                    f"{limit:,} requests a minute are what this key may make", _whole(share.ends - begun)
                )

    def _note(self, caller: Caller) -> None:
        """Have it written down, beside the request, that the key was used."""
        now = time.monotonic()
        if now - self._used.get(caller.prefix, float("-inf")) < USED:
            return
        if len(self._used) >= MOST:
            self._used.clear()
        self._used[caller.prefix] = now
        self._beside(partial(self._write_down, caller))

    async def _write_down(self, caller: Caller) -> None:
        values = {"prefix": caller.prefix, "digest": caller.digest, "wanted": 0}
        await self.database.fetch_public(Statement("use key", USE_KEY, values))

    def _beside(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        async def done() -> None:
            try:
                await work()
            except PgrecallError as error:
                log.warning("the use of a key was not written down: %s", error)

        task = asyncio.create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def open_stream(self, caller: Caller | None) -> Callable[[], None]:
        """Count one stream until what is returned is called. Raises LimitReached."""
        limit = None if caller is None else caller.concurrent_streams
        if caller is None or limit is None:
            return lambda: None
        held = self._open.setdefault(caller.prefix, _Open())
        async with held.turn:
            if not await self._hold(caller, held.count + 1):
                raise LimitReached(f"{limit:,} streams at once are what this key may have open")
            held.count += 1
            if held.renewing is None:
                held.renewing = self._beside(partial(self._renew, caller, held))
        return lambda: self._ended(caller, held)

    def _ended(self, caller: Caller, held: _Open) -> None:
        held.count -= 1
        self._beside(partial(self._tell, caller, held))

    async def _tell(self, caller: Caller, held: _Open) -> None:
        async with held.turn:
            if held.count == 0 and held.renewing is not None:
                held.renewing.cancel()
                held.renewing = None
            await self._hold(caller, held.count)

    async def _renew(self, caller: Caller, held: _Open) -> None:
        while True:
            await asyncio.sleep(RENEWED)
            with contextlib.suppress(PgrecallError):
                async with held.turn:
                    await self._hold(caller, held.count)

    async def _hold(self, caller: Caller, wanted: int) -> bool:
        values = {"prefix": caller.prefix, "digest": caller.digest, "holder": self.holder, "wanted": wanted}
        ((row),) = await self.database.fetch_public(Statement("hold streams", HOLD_STREAMS, values))
        return bool(row["granted"])

    async def storing(self, caller: Caller | None) -> None:
        """Before anything is stored. Raises LimitReached where the tenant has as many rows as it may, or is out of tokens."""
        if caller is None or caller.tenant_id is None:
            return
        await self.embedding(caller)
        if caller.max_rows is not None:
            values = {"tenant_id": caller.tenant_id, "max_rows": caller.max_rows}
            ((row,),) = await self.database.fetch(
                caller.tenant_id, [Statement("rows of a tenant", ROWS, values)], primary=True
            )
            if row["rows"] >= caller.max_rows:
                raise LimitReached(
                    f"{caller.max_rows:,} chunks are what this tenant may have, pending documents counted as one; delete some",
                    FULL,
                )

    async def embedding(self, caller: Caller | None) -> None:
        """Before tokens are spent. Raises LimitReached where the tenant has none left today."""
        if caller is None or caller.tenant_id is None or caller.tokens_per_day is None:
            return
        share = _of(self._tokens, caller.tenant_id)
        if share.left > 0 and share.ends > time.monotonic():
            return
        async with share.turn:
            begun = time.monotonic()
            if share.ends <= begun:
                share.left, share.spent = 0, False
            if share.left <= 0 and not (share.spent and share.limit == caller.tokens_per_day):
                share.limit = caller.tokens_per_day  # it may have been raised since
                wanted = max(1, math.ceil(caller.tokens_per_day / SHARE)) - share.left
                ((row,),) = await self.database.fetch(
                    caller.tenant_id, [Statement("take tokens", TAKE_TOKENS, {"wanted": wanted})], primary=True
                )
                share.left += row["granted"]
                share.ends = begun + row["ends_in"]
                share.spent = row["granted"] < wanted
            if share.left <= 0:
                raise LimitReached(
                    f"{caller.tokens_per_day:,} tokens a day are what this tenant may spend", _whole(share.ends - begun)
                )

    def spent(self, caller: Caller | None, tokens: int) -> None:
        """Tokens that were spent in the tenant's name."""
        if caller is not None and caller.tenant_id is not None and caller.tokens_per_day is not None:
            _of(self._tokens, caller.tenant_id).left -= tokens


def _of(shares: dict[str, Share], name: str) -> Share:
    share = shares.get(name)
    if share is None:
        if len(shares) >= MOST:
            now = time.monotonic()
            for other in [key for key, each in shares.items() if each.ends <= now] or list(shares):
                del shares[other]
        share = shares[name] = Share()
    return share


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))


@asynccontextmanager
async def opened(database: Database) -> AsyncIterator[Limits]:
    """The limits of a process, until it ends."""
    made = Limits(database)
    try:
        yield made
    finally:
        await made.close()

"""API keys: how one is made, and whose it is when it comes back.

A key is `pgr_PREFIX_SECRET`. The prefix names it in lists and logs; the secret has 190 bits out of the operating system's
generator. So it is stored as one SHA-256: slow hashes make up for secrets that can be guessed, which this one cannot, and
would cost every request what a search costs.
"""

import asyncio
import hmac
import logging
import re
import secrets
import string
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from app.database import Database
from app.errors import LimitReached, NotAuthenticated, PoolExhausted
from app.settings import Settings
from app.statements import Statement

log = logging.getLogger(__name__)

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")

_IN_PREFIX = string.ascii_lowercase + string.digits
_IN_SECRET = string.ascii_letters + string.digits
PATTERN = r"pgr_([a-z0-9]{8})_[A-Za-z0-9]{32}"
_TOKEN = re.compile(PATTERN)
_BEARER = re.compile(rb"(?i:bearer) +([\x21-\x7e]+) *")
_NOBODY = bytes(32)
"""Compared with where there is no key of a prefix."""

KEPT = 10_000
"""Keys a process remembers at most, and keys it remembers to have refused."""

REFUSED = "a valid key is required: Authorization: Bearer pgr_…"
"""Whatever was wrong: that a key exists, was revoked or has expired is for its owner to know."""

WRONG_AT_ONCE = 100
"""Wrong keys that a process looks up one after the other before it lets keys it does not remember wait."""

WRONG_A_SECOND = 10
"""Wrong keys that a process looks up in a second then, however many come."""

IN_USE = Statement("keys in use", "select keys_in_use() as used", {})
"""Whether the database ever had a key."""

FIND = "select * from find_key(%(prefix)s)"
"""What there is to know of the key with a prefix."""


class Minted(NamedTuple):
    """A new key: shown once as `token`, stored as `digest`."""

    prefix: str
    token: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, by a key that is valid, and what it may: None stands for no limit, and for no tenant.

    `digest` is the hash of the key, which the database asks for before it does something in its name.
    """

    prefix: str
    digest: bytes
    tenant_id: str | None
    scopes: frozenset[str]
    requests_per_minute: int | None = None
    concurrent_streams: int | None = None
    max_rows: int | None = None
    tokens_per_day: int | None = None


def mint() -> Minted:
    """A new key; nothing of it is stored."""
    prefix = "".join(secrets.choice(_IN_PREFIX) for _ in range(8))
    token = f"pgr_{prefix}_" + "".join(secrets.choice(_IN_SECRET) for _ in range(32))
    return Minted(prefix, token, digest(token))


def digest(token: str) -> bytes:
    """What is stored of a key."""
    return sha256(token.encode()).digest()


def token_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What stands behind `Authorization: Bearer`; empty where it is something else, None where there is no such header."""
    given = [value for name, value in headers if name == b"authorization"]
    if not given:
        return None
    found = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    return found[1].decode() if found else ""


@dataclass
class Doubt:
    """Bounds what keys that a process does not remember cost, as anybody can make some up.

    One is looked up at a time, so that those of valid keys, which share the connection, wait for one of them at most. What
    turns out to be wrong is counted; a valid key costs nothing.
    """

    patience: float
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _left: float = WRONG_AT_ONCE
    _counted: float = field(default_factory=time.monotonic)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the others. Raises LimitReached where too many keys were wrong, PoolExhausted where it takes too long."""
        self._check()
        try:
            async with asyncio.timeout(self.patience):
                await self._turn.acquire()
        except TimeoutError:
            raise PoolExhausted("other keys are being looked up; try again") from None
        try:
            self._check()  # those before may have been wrong
            yield
        finally:
            self._turn.release()

    def wrong(self) -> None:
        """Count one."""
        self._left -= 1

    def _check(self) -> None:
        now = time.monotonic()
        self._left = min(WRONG_AT_ONCE, self._left + WRONG_A_SECOND * (now - self._counted))
        self._counted = now
        if self._left < 1:
            raise LimitReached("too many wrong keys have come to look this one up now; try again")


@dataclass
class Keys:
    """The keys that came lately, remembered for PGRECALL_KEY_CACHE seconds: so long a revoked one may still be taken.

    A key is remembered under its hash as a whole, so that of a wrong one nothing is answered out of memory, whatever its
    prefix: the database is asked, and hashes are compared in constant time, for known and unknown prefixes alike.
    """

    database: Database
    settings: Settings
    _known: OrderedDict[bytes, tuple[float, Caller | None]] = field(default_factory=OrderedDict)
    _asking: dict[bytes, asyncio.Task[tuple[float, Caller | None]]] = field(default_factory=dict)
    _refused: OrderedDict[bytes, tuple[float, Caller | None]] = field(default_factory=OrderedDict)
    _used: bool = False
    _looked: float = float("-inf")
    _doubt: Doubt = field(init=False)

    def __post_init__(self) -> None:
        self._doubt = Doubt(self.settings.pool_timeout)

    async def required(self, *, now: bool = False) -> bool:
        """Whether requests need a key. Once the database was seen to have one, this process asks for keys until it ends.

        `now`: do not trust that there was none a few seconds ago.
        """
        if self._used or self.settings.auth == "keys":
            return True
        begun = time.monotonic()
        if now or begun - self._looked >= self.settings.key_cache:
            used = (await self.database.fetch_public(IN_USE))[0]["used"]
            if used and not self._used and self._looked > float("-inf"):
                log.info("the database has a key now: every request needs one from here on (docs/keys.md)")
            self._used = self._used or used
            self._looked = begun
        return self._used

    async def caller(self, token: str | None) -> Caller | None:
        """Who is asking; None where no keys are asked for. Raises NotAuthenticated, LimitReached, DatabaseUnavailable."""
        if not self._used and not await self.required(now=bool(token)):
            return None
        if not token or not _TOKEN.fullmatch(token):
            raise NotAuthenticated(REFUSED)
        return await self._valid(digest(token), token[4:12])

    async def still(self, caller: Caller | None) -> Caller | None:
        """Who is asking, as of now, in a request that goes on for long. Raises as `caller` does."""
        if caller is not None:
            return await self._valid(caller.digest, caller.prefix)
        if await self.required():
            raise NotAuthenticated(REFUSED)
        return None

    async def _valid(self, key: bytes, prefix: str) -> Caller:
        found = self._known.get(key) or self._refused.get(key)
        if found is None or found[0] <= time.monotonic():
            found = await self._asked(key, prefix)
        if found[1] is None:
            raise NotAuthenticated(REFUSED)
        return found[1]

    async def _asked(self, key: bytes, prefix: str) -> tuple[float, Caller | None]:
        """What the database says, asked once for all that want to know at the same time."""
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = asyncio.create_task(self._look_up(key, prefix))
            asking.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(asking)

    async def _look_up(self, key: bytes, prefix: str) -> tuple[float, Caller | None]:
        if key in self._known:  # and its time is over
            return await self._found(key, prefix)
        async with self._doubt.turn():
            found = await self._found(key, prefix)
            if found[1] is None:
                self._doubt.wrong()
            return found

    async def _found(self, key: bytes, prefix: str) -> tuple[float, Caller | None]:
        begun = time.monotonic()
        rows = await self.database.fetch_public(Statement("find key", FIND, {"prefix": prefix}))
        row: dict[str, Any] = rows[0] if rows else {"key_hash": _NOBODY, "revoked": True, "expires_in": None}
        lasts = self.settings.key_cache
        same = hmac.compare_digest(row["key_hash"], key)
        if row["expires_in"] is not None:
            lasts = min(lasts, row["expires_in"])
        caller = None
        if same and not row["revoked"] and (row["expires_in"] is None or row["expires_in"] > 0):
            caller = Caller(
                prefix,
                key,
                row["tenant_id"],
                frozenset(row["scopes"]),
                row["requests_per_minute"],
                row["concurrent_streams"],
                row["max_rows"],
                row["tokens_per_day"],
            )
        found = (begun + (lasts if caller else self.settings.key_cache), caller)
        self._known.pop(key, None)
        kept = self._known if caller else self._refused
        kept[key] = found
        if len(kept) > KEPT:
            kept.popitem(last=False)
        return found

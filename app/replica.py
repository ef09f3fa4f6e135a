"""Whether searches may read from the replica: how far behind it is, measured beside requests and not in them.

Lag is bounded without comparing clocks. Each measurement notes when it asked the primary how far its write-ahead log
goes; a replica that has replayed as far shows everything that was committed by then. That holds for an idle primary, a
replay that is paused and a replica that is cut off from its primary alike.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

import psycopg

from app.errors import PgrecallError, PoolExhausted, SchemaTooOld, SetupError

log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two measurements, at least; made only while there are requests."""

TRUSTED = 5.0
"""Seconds after which a measurement is too old to decide by, so that a request after a quiet time waits for a new one."""

WAIT = 1.0
"""Seconds such a request waits at most; then what was known last decides. So long a server that hangs costs."""

LOOKS = (0.0, 0.1, 0.4)
"""Pauses before the replica is looked at for what the primary had written: a moment's way is no lag."""

REMEMBERED = 1_000
"""Positions of the primary that the replica has yet to reach."""


class Replayed(NamedTuple):
    """Where a replica is: position in the log, None where the server states none; seconds since its last commit."""

    position: int | None
    age: float | None


class Standing(NamedTuple):
    """`lag` is in seconds, an upper bound; None where it is not known.

    serving: searches read from it. behind: its lag is above the limit. unreachable, unfit (not this database, or the
    login may not what it should): as named. In all but the first searches read from the primary.
    """

    state: Literal["serving", "behind", "unreachable", "unfit"]
    lag: float | None = None


class Replica:
    """What is known of the replica.

    `written` gives the primary's position in the log, `replayed` the replica's; `limit` is in seconds.
    """

    def __init__(
        self, written: Callable[[], Awaitable[int]], replayed: Callable[[], Awaitable[Replayed]], limit: float
    ) -> None:
        self.standing = Standing("unreachable")
        self._written, self._replayed, self._limit = written, replayed, limit
        self._check: Callable[[], Awaitable[object]] | None = None
        self._checked = False
        self._fault: SetupError | None = None
        self._pending: deque[tuple[float, int]] = deque()
        self._shown: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._measured = self._began = float("-inf")

    async def usable(self) -> bool:
        """Whether a search may read from it, by a measurement at most `TRUSTED` seconds old if the servers answer."""
        if time.monotonic() - self._measured > EVERY:
            task = self._measure()
            patience = self._began + WAIT - time.monotonic()
            if time.monotonic() - self._measured > TRUSTED and patience > 0:
                await asyncio.wait({task}, timeout=patience)
        return self.standing.state == "serving"

    async def examine(self, check: Callable[[], Awaitable[object]]) -> Standing:
        """Measure now. Nothing reads from the replica before `check` has passed on it, now and after each absence.

        Raises the SetupError of the check, but for SchemaTooOld: the migration is on its way there.
        """
        if self._task:
            await asyncio.wait({self._task})
        self._check, self._checked = check, False
        await asyncio.wait({self._measure()})
        if self._fault is not None:
            raise self._fault
        return self.standing

    def lost(self) -> None:
        """A request could not reach it."""
        self._stands(Standing("unreachable"))

    async def close(self) -> None:
        """End the measurement under way."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _measure(self) -> asyncio.Task[None]:
        if self._task is None or self._task.done():
            self._began = time.monotonic()
            self._task = asyncio.create_task(self._look())
        return self._task

    async def _look(self) -> None:
        self._fault = None
        try:
            lag = await self._lag()
            if lag is not None and lag > self._limit:
                self._stands(Standing("behind", None if lag == float("inf") else round(lag, 3)))
                return
            if self._check is not None and not self._checked:
                await self._check()
            self._checked = True
            self._stands(Standing("serving", None if lag is None else round(lag, 3)))
        except PoolExhausted:
            pass  # busy is not away
        except SetupError as error:
            log.warning("the replica is not read from: %s", error)
            self._fault = None if isinstance(error, SchemaTooOld) else error
            self._stands(Standing("unfit"))
        except PgrecallError:
            self._stands(Standing("unreachable"))
        except psycopg.Error as error:
            log.warning("the replica is not read from: %s", error)
            self._stands(Standing("unfit"))
        finally:
            self._measured = time.monotonic()

    async def _lag(self) -> float | None:
        """Seconds behind, an upper bound: infinity where there is none, None where one of the two states no position.

        Without a primary to compare with the replica is as good as it gets.
        """
        asked = time.monotonic()
        try:
            written = await self._written()
        except PgrecallError:
            await self._replayed()
            return None
        for pause in LOOKS:
            await asyncio.sleep(pause)
            position, age = await self._replayed()
            if position is None:
                return None
            if position >= written:
                self._shown = asked
                self._pending.clear()
                return time.monotonic() - asked if pause else 0.0
            while self._pending and self._pending[0][1] <= position:
                self._shown, _ = self._pending.popleft()
        if len(self._pending) < REMEMBERED:
            self._pending.append((asked, written))
        if self._shown is None:
            return float("inf") if age is None else age
        return time.monotonic() - self._shown

    def _stands(self, standing: Standing) -> None:
        if standing.state != self.standing.state:
            log.log(
                logging.INFO if standing.state == "serving" else logging.WARNING,
                "the replica is %s; searches read from %s",
                standing.state,
                "it" if standing.state == "serving" else "the primary",
            )
        self._checked = self._checked and standing.state == "serving"
        self.standing = standing

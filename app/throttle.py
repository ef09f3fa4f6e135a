"""How many requests to one server may be under way at once: as many as are allowed while it keeps up, fewer when it does not."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LEAST = 1.0


class Throttle:
    """Lets requests through, `most` at a time.

    When the server complains, the limit is halved and nobody but the urgent begins before the wait it asked for is over;
    each success adds to the limit what makes one more request per round. Urgent requests go before the others and have
    a lane of their own beside the limit, so they never wait for work in bulk to end.
    """

    def __init__(self, most: int) -> None:
        self.limit = float(most)
        self._most = float(most)
        self._under_way = 0
        self._urgent: deque[asyncio.Future[None]] = deque()
        self._patient: deque[asyncio.Future[None]] = deque()
        self._closed_until = 0.0
        self._slowed_at = float("-inf")

    @asynccontextmanager
    async def turn(self, *, urgent: bool = False) -> AsyncIterator[float]:
        """Wait for a turn; it ends with the block. Yields when it began, in monotonic seconds."""
        queue = self._urgent if urgent else self._patient
        if queue or not self._has_room(urgent=urgent):
            place = asyncio.get_running_loop().create_future()
            queue.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self._end()  # let through and called off at once
                else:
                    queue.remove(place)
                raise
        else:
            self._under_way += 1
        try:
            yield time.monotonic()
        finally:
            self._end()

    def succeeded(self) -> None:
        """The server has answered."""
        self.limit = min(self._most, self.limit + 1 / self.limit)
        self._admit()

    def slow_down(self, began: float, wait: float) -> None:
        """The server asks for less, in answer to a request that began at this moment; `wait` is in seconds."""
        now = time.monotonic()
        # Requests that were under way together bring one complaint each about the same crowd.
        if began > self._slowed_at:
            self.limit = max(LEAST, self.limit / 2)
            self._slowed_at = now
        if now + wait > self._closed_until:
            self._closed_until = now + wait
            asyncio.get_running_loop().call_later(wait, self._admit)

    def _has_room(self, *, urgent: bool) -> bool:
        if urgent:
            return self._under_way < int(self.limit) + 1
        return self._under_way < int(self.limit) and time.monotonic() >= self._closed_until

    def _end(self) -> None:
        self._under_way -= 1
        self._admit()

    def _admit(self) -> None:
        for queue, urgent in ((self._urgent, True), (self._patient, False)):
            while queue and (urgent or not self._urgent) and self._has_room(urgent=urgent):
                place = queue.popleft()
                if not place.done():
                    self._under_way += 1
                    place.set_result(None)

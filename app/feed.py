"""Documents as they arrive, without end: each is answered once it is stored, and no more are taken than are in hand.

What arrives while batches are under way becomes the next batch, so that a slow sender has every document stored at once
and a fast one has them stored by the hundred. Whoever takes the answers slowly slows down the taking of documents.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from app import loading
from app.database import Database
from app.drafts import Draft
from app.embedding import Embedder
from app.errors import BadInput, PgrecallError
from app.loading import BATCH_CHARACTERS, BATCH_DOCUMENTS, UnderWay
from app.meter import Meter
from app.outcomes import Outcome
from app.settings import Settings

MOST_ENTRIES = 2_000
MOST_BYTES = 16_000_000
"""What has arrived and is not answered yet, at most, but for one entry that is larger by itself."""


class Entry(NamedTuple):
    """Something that arrived: its number, its bytes, and the document or what is wrong with it."""

    line: int
    size: int
    made: Draft | BadInput


class Answer(NamedTuple):
    """What became of an entry. `id`: its document's, where that is known."""

    line: int
    id: str | None
    outcome: Outcome | PgrecallError


@dataclass
class Feed:
    """One stream of documents into a tenant."""

    database: Database
    embedder: Embedder
    settings: Settings
    tenant_id: str
    meter: Meter = field(default_factory=Meter)
    gate: Callable[[], Awaitable[None]] | None = None
    """Asked before each batch; what it raises ends the stream."""
    stopped: Exception | None = None
    """Why no more was taken, if not because nothing more arrived."""
    _arrived: asyncio.Queue[Entry | None] = field(default_factory=asyncio.Queue)
    _answers: asyncio.Queue[list[tuple[Answer, int]] | None] = field(default_factory=asyncio.Queue)
    _room: asyncio.Condition = field(default_factory=asyncio.Condition)
    _entries: int = 0
    _bytes: int = 0
    _over: bool = False
    _taking: asyncio.Task[None] | None = None

    async def answers(self, entries: AsyncIterator[Entry]) -> AsyncGenerator[list[Answer], None]:
        """Store what arrives; answers in the order in which documents were stored.

        `stopped` says afterwards what ended it: an error raised by `entries`, or one that is no document's fault, such
        as BudgetSpent. What arrived before is answered in any case.
        """
        self._taking = taking = asyncio.create_task(self._take(entries))
        storing = asyncio.create_task(self._store())
        try:
            while (answered := await self._answers.get()) is not None:
                yield [answer for answer, _ in answered]
                async with self._room:
                    self._entries -= len(answered)
                    self._bytes -= sum(size for _, size in answered)
                    self._room.notify_all()
            await storing
        finally:
            for task in (taking, storing):
                task.cancel()
            await asyncio.gather(taking, storing, return_exceptions=True)

    async def _take(self, entries: AsyncIterator[Entry]) -> None:
        try:
            async for entry in entries:
                async with self._room:
                    while not self._fits(entry):
                        await self._room.wait()
                    self._entries += 1
                    self._bytes += entry.size
                self._arrived.put_nowait(entry)
        except Exception as error:  # noqa: BLE001  told in `stopped`; what arrived is still to be stored
            self.stopped = self.stopped or error
        finally:
            self._arrived.put_nowait(None)

    def _fits(self, entry: Entry) -> bool:
        return not self._entries or (self._entries < MOST_ENTRIES and self._bytes + entry.size <= MOST_BYTES)

    async def _store(self) -> None:
        try:
            async with UnderWay() as under_way:
                rest: list[Entry] = []
                ended = False
                while rest or not ended:
                    if not rest:
                        first = await self._arrived.get()
                        if first is None:
                            break
                        rest.append(first)
                    await under_way.room(loading.lanes(self.settings))
                    while not ended and not self._arrived.empty():
                        entry = self._arrived.get_nowait()
                        ended = entry is None
                        if entry is not None:
                            rest.append(entry)
                    batch, rest = _batch(rest)
                    ids = {entry.made.id for entry in batch if isinstance(entry.made, Draft)}
                    await under_way.wait_for(ids)
                    under_way.start(self._put(batch), ids)
        finally:
            self._answers.put_nowait(None)

    async def _put(self, batch: list[Entry]) -> None:
        outcomes: dict[int, Outcome | PgrecallError] = {
            entry.line: entry.made for entry in batch if isinstance(entry.made, BadInput)
        }
        drafts = {entry.line: entry.made for entry in batch if isinstance(entry.made, Draft)}
        if self._over and isinstance(self.stopped, PgrecallError):
            outcomes |= dict.fromkeys(drafts, self.stopped)
        elif drafts:
            outcomes |= await self._outcomes(drafts)
        answered = []
        for entry in batch:
            identity = entry.made.id if isinstance(entry.made, Draft) else None
            answered.append((Answer(entry.line, identity, outcomes[entry.line]), entry.size))
        self._answers.put_nowait(answered)

    async def _outcomes(self, drafts: dict[int, Draft]) -> dict[int, Outcome | PgrecallError]:
        try:
            if self.gate is not None:
                await self.gate()
            found = await loading.put_each(
                self.database, self.embedder, self.settings, self.tenant_id, list(drafts.values()), meter=self.meter
            )
        except PgrecallError as error:
            self._stop(error)
            return dict.fromkeys(drafts, error)
        outcomes: dict[int, Outcome | PgrecallError] = {}
        for line, outcome in zip(drafts, found, strict=True):
            outcomes[line] = outcome if isinstance(outcome, Outcome) else outcome.error
            if not isinstance(outcome, Outcome) and not outcome.lasting:
                self._stop(outcome.error)
        return outcomes

    def _stop(self, error: PgrecallError) -> None:
        """Take nothing more: what comes would fail the same way."""
        self.stopped = self.stopped or error
        self._over = True
        if self._taking is not None:
            self._taking.cancel()


def _batch(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """The first entries, as many as go together and with no document twice; and the rest."""
    ids: set[str] = set()
    characters = 0
    for number, entry in enumerate(entries):
        if isinstance(entry.made, Draft):
            characters += len(entry.made.content)
            full = number and (characters > BATCH_CHARACTERS or number >= BATCH_DOCUMENTS)
            if full or entry.made.id in ids:
                return entries[:number], entries[number:]
            ids.add(entry.made.id)
    return entries, []

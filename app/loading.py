"""Many documents into a tenant, read ahead, compared, embedded and written at the same time.

A thread reads and converts files. What is read is compared with what is stored, some hundred documents in one round
trip, and what did not change is let go before anything is cut. The rest is put in batches, several under way: while one
is embedded, another is cut, and a third is written. Nothing is held but what is under way, so that a million files or a
file of gigabytes need no more memory than ten.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from app import upsert
from app.database import Database
from app.difference import compare
from app.drafts import Draft, check
from app.embedding import Embedder
from app.errors import BadInput, PgrecallError, Unavailable
from app.files import Noted, Step, Unreadable
from app.meter import Meter
from app.outcomes import Fault, Outcome
from app.settings import Settings

log = logging.getLogger(__name__)

HANDFUL = 500
"""Documents compared with what is stored in one round trip."""
HANDFUL_CHARACTERS = 1_000_000
BATCH_CHARACTERS = 60_000
"""Text of the documents that are written in one transaction."""
BATCH_DOCUMENTS = 250
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between two tries where the database is away, as when it restarts."""
AHEAD = 2
"""Handfuls that are read before they are wanted."""


@dataclass
class Counts:
    """What a load has done so far. `bytes` are those of files and records that are dealt with."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    embedded: int = 0
    reused: int = 0
    removed: int = 0
    skipped: int = 0
    bytes: int = 0

    @property
    def documents(self) -> int:
        """Documents that are stored as they were read."""
        return self.created + self.updated + self.unchanged


@dataclass
class Seen:
    """Which ids a run has read: their hashes, so that a million take 60 MB. Two alike make a document stay, not go."""

    _hashes: set[int] = field(default_factory=set)

    def add(self, identity: str) -> None:
        """This document is there."""
        self._hashes.add(hash(identity))

    def __contains__(self, identity: str) -> bool:
        return hash(identity) in self._hashes

    def __len__(self) -> int:
        return len(self._hashes)


class Read(NamedTuple):
    """A draft, and the bytes of its file or record."""

    draft: Draft
    size: int


Told = Callable[[Unreadable | Noted], None]
"""Told of what was left out and why."""


async def load(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    steps: Iterable[Step],
    *,
    counts: Counts,
    told: Told,
    meter: Meter | None = None,
    seen: Seen | None = None,
    advanced: Callable[[], None] = lambda: None,
) -> None:
    """Put every draft of `steps`; what cannot be put is told and left out, and the rest goes on.

    `counts` is added to and `advanced` called as documents are stored; `seen` learns every id, also of what is left out.
    `meter` counts what embedding takes and may limit it. Of two drafts of one id the later one is stored last.

    A load that is cancelled, or ends with an error that is no document's fault (BudgetSpent, a server that is away),
    leaves whole documents only; the same load goes on from there.
    """
    slots = lanes(settings)

    async def put(batch: Sequence[Read]) -> None:
        drafts = [each.draft for each in batch]
        passing = None
        for each, outcome in zip(
            batch, await put_each(database, embedder, settings, tenant_id, drafts, meter=meter), strict=True
        ):
            if isinstance(outcome, Outcome):
                _count(counts, outcome)
            elif outcome.lasting:
                _skip(Unreadable(outcome.id, str(outcome), outcome.id), counts, told)
            else:
                passing = outcome.error
                continue
            counts.bytes += each.size
        advanced()
        if passing is not None:
            raise passing

    async with UnderWay() as under_way:
        async for run in readable(steps, embedder.dimensions, counts, told, seen):
            await under_way.wait_for({each.draft.id for each in run})
            found = await compare(database, embedder, settings, tenant_id, [each.draft for each in run])
            changed = []
            for each, difference in zip(run, found, strict=True):
                if difference.status == "unchanged":
                    counts.unchanged += 1
                    counts.reused += difference.reused
                    counts.bytes += each.size
                else:
                    changed.append(each)
            advanced()
            for batch in _batches(changed):
                await under_way.room(slots)
                under_way.start(put(batch), {each.draft.id for each in batch})


async def put_each(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    drafts: Sequence[Draft],
    *,
    meter: Meter | None = None,
) -> list[Outcome | Fault]:
    """As `upsert.put_each`, but a database that is away for a moment is waited for."""
    for wait in WAITS:
        try:
            return await upsert.put_each(database, embedder, settings, tenant_id, drafts, meter=meter)
        except Unavailable as error:
            log.warning("%s; trying again in %g s", error, wait)
            await asyncio.sleep(wait)
    return await upsert.put_each(database, embedder, settings, tenant_id, drafts, meter=meter)


async def readable(
    steps: Iterable[Step], dimensions: int, counts: Counts, told: Told, seen: Seen | None
) -> AsyncIterator[list[Read]]:
    """Runs of drafts that are within the limits, none with the same id twice, read ahead in a thread."""
    async for handful in _ahead(steps):
        for run in _distinct(_checked(handful, dimensions, counts, told, seen)):
            yield run


def lanes(settings: Settings) -> int:
    """Batches of a load that are under way at once: one is cut and one written while others are embedded."""
    return min(settings.pool_size, 2 + (settings.embedding_concurrency if settings.uses_openai else 1))


class UnderWay:
    """Batches that are worked on, with the documents in each. Left by an error, it lets the others finish."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], set[str]] = {}

    def start(self, work: Coroutine[Any, Any, None], ids: set[str]) -> None:
        """Begin a batch."""
        self._tasks[asyncio.create_task(work)] = ids

    async def room(self, most: int) -> None:
        """Until fewer than `most` are under way."""
        while len(self._tasks) >= most:
            await self._one()

    async def wait_for(self, ids: set[str]) -> None:
        """Until none of these documents is under way."""
        while any(not each.isdisjoint(ids) for each in self._tasks.values()):
            await self._one()

    async def _one(self) -> None:
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            del self._tasks[task]
            task.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._tasks and kind is None:
                await self._one()
            if kind is not None and issubclass(kind, PgrecallError):
                await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _count(counts: Counts, outcome: Outcome) -> None:
    for name in (outcome.status, "embedded", "reused", "removed"):
        more = 1 if name == outcome.status else getattr(outcome, name)
        setattr(counts, name, getattr(counts, name) + more)


def _skip(item: Unreadable, counts: Counts, told: Told) -> None:
    counts.skipped += 1
    told(item)


def _checked(handful: Iterable[Step], dimensions: int, counts: Counts, told: Told, seen: Seen | None) -> Iterator[Read]:
    """The drafts that are within the limits."""
    for item, size in handful:
        if isinstance(item, Noted):
            told(item)
            continue
        if seen is not None and item.id is not None:
            seen.add(item.id)
        if isinstance(item, Unreadable):
            _skip(item, counts, told)
        else:
            try:
                check(item, dimensions)
            except BadInput as fault:
                _skip(Unreadable(item.id, str(fault), item.id), counts, told)
            else:
                yield Read(item, size)
                continue
        counts.bytes += size


def _distinct(read: Iterable[Read]) -> Iterator[list[Read]]:
    """Runs without the same id twice."""
    run: dict[str, Read] = {}
    for each in read:
        if each.draft.id in run:
            yield list(run.values())
            run = {}
        run[each.draft.id] = each
    if run:
        yield list(run.values())


def _batches(read: Iterable[Read]) -> Iterator[list[Read]]:
    """Runs of drafts of about the same amount of text."""
    batch: list[Read] = []
    size = 0
    for each in read:
        # What brings its vector along is written at once, nothing waits for its text.
        length = len(each.draft.content) if each.draft.embedding is None else 0
        if batch and (size + length > BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS):
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += length
    if batch:
        yield batch


async def _ahead(steps: Iterable[Step]) -> AsyncIterator[list[Step]]:
    """Handfuls of steps, read in a thread of their own while others are worked on.

    The thread is a daemon: one that waits for standard input must not keep the program from ending.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Queue[list[Step] | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(AHEAD)
    over = threading.Event()

    def tell(what: list[Step] | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody listens any more
            loop.call_soon_threadsafe(ready.put_nowait, what)

    def read() -> None:
        try:
            for handful in _handfuls(steps):
                room.acquire()
                if over.is_set():
                    return
                tell(handful)
        except BaseException as error:  # noqa: BLE001  raised where the handfuls are taken
            tell(error)
        else:
            tell(None)

    threading.Thread(target=read, name="reader", daemon=True).start()
    try:
        while (handful := await ready.get()) is not None:
            if isinstance(handful, BaseException):
                raise handful
            room.release()
            yield handful
    finally:
        over.set()
        room.release()


def _handfuls(steps: Iterable[Step]) -> Iterator[list[Step]]:
    handful: list[Step] = []
    size = 0
    for step in steps:
        handful.append(step)
        size += len(step.item.content) if isinstance(step.item, Draft) else 0
        if len(handful) >= HANDFUL or size >= HANDFUL_CHARACTERS:
            yield handful
            handful, size = [], 0
    if handful:
        yield handful

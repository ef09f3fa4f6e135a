"""The worker: takes pending documents in hand, tenant by tenant, cuts and embeds them, and makes them searchable.

A round gives each tenant that has something due one turn; a turn claims a few small documents, which are embedded and
written together, and at most one big document and one suspect, each by itself. So a tenant with a million documents waits
for one with ten, not the other way round. Claims are renewed while the work goes on and given back when the worker ends.

Failures are told apart. Where the database or the model's server is away, documents are put back as they were and the
worker pauses; that never counts against a document. A text over the limits, or one that the server refuses while it takes
others, is given up at once; what fails otherwise is tried again later, PGRECALL_WORKER_ATTEMPTS times in all.
"""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import psycopg
from sqlalchemy import ARRAY, Text, bindparam, func, select

from app import pending, schema, spaces, upsert
from app.database import Database, translated
from app.drafts import MAX_TEXT_BYTES, Draft
from app.embedding import Embedder
from app.errors import (
    BeingErased,
    DatabaseUnavailable,
    EmbeddingFailed,
    PgrecallError,
    SchemaTooOld,
    TimedOut,
    Unavailable,
)
from app.pending import Claim
from app.settings import Settings
from app.statements import rendered
from app.tables import tenant_sources
from app.upsert import Claimed, Fault, Outcome

log = logging.getLogger(__name__)

TURN_DOCUMENTS = 32
TURN_BYTES = 64_000
"""A turn claims at most so many documents, and no more once they have so much text."""

BIG = TURN_BYTES
"""Bytes from which on a document is worked on by itself, and beside others that are as big by half of the slots at most."""

STATEMENT_TIMEOUT = 60.0
"""Seconds, at least: a big document is written in statements of ten thousand rows, and nobody waits for the answer."""

PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds the worker pauses when what it needs is away: at first, and at most."""

AGAIN, LATEST = 5.0, 3600.0
"""Seconds until a document that failed is tried again: the first time, and at most."""

SETTLE = 0.25
"""Seconds after which a woken worker looks again: puts close to the one that woke it did not ring."""

REPORT_EVERY = 60.0
PROBE = "pgrecall"
"""A text that no model's server refuses."""

LISTEN = f"listen {pending.CHANNEL}"
"""To be woken by asynchronous puts, on a connection of its own."""

LOAD = select(
    *(tenant_sources.c[name] for name in ("id", "content", "title", "doc_type", "metadata", "created_at", "version"))
).where(
    tenant_sources.c.tenant_id == bindparam("tenant_id", type_=Text),
    tenant_sources.c.id == func.any(bindparam("ids", type_=ARRAY(Text))),
)
"""The documents to be worked on, whole."""

_LOAD = rendered(LOAD)


@dataclass
class Counts:
    """What a worker did since it began. `deferred`: failures after which a document waits to be tried again."""

    ready: int = 0
    chunks: int = 0
    parked: int = 0
    deferred: int = 0
    overtaken: int = 0


@dataclass(eq=False)
class Worker:
    """One worker: `run` until cancelled, or until nothing is due with `once`. `only`: the tenants it works for, all if empty."""

    database: Database
    embedder: Embedder
    settings: Settings
    only: frozenset[str] = frozenset()
    once: bool = False
    name: str = field(default_factory=lambda: f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(3)}")
    counts: Counts = field(default_factory=Counts)
    _jobs: set[asyncio.Task[None]] = field(default_factory=set)
    _held: dict[str, set[str]] = field(default_factory=dict)
    _lanes: dict[str, int] = field(default_factory=lambda: {"big": 0, "suspect": 0})
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: int = 0
    _pause: float = 0.0
    _paused_until: float = float("-inf")

    async def run(self) -> None:
        """Work. Cancelled, it stops at once and gives back what it has in hand."""
        tasks = [asyncio.create_task(each()) for each in (self._rounds, self._renew, self._report)]
        if not self.once:
            tasks.append(asyncio.create_task(self._listen()))
        log.info("worker %s begins", self.name)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in (*tasks, *self._jobs):
                task.cancel()
            await asyncio.gather(*tasks, *self._jobs, return_exceptions=True)
            returned = await asyncio.shield(self._give_back())
            log.info("worker %s ends: %s, %d given back", self.name, _said(self.counts), returned)

    # Rounds and turns

    async def _rounds(self) -> None:
        turns: deque[str] = deque()
        claimed, ended = True, 0  # in this round, and before it
        while True:
            try:
                await self._slot()
                if self.once and self._pause:
                    # What it needs is away, and nobody waits here for it to come back.
                    await asyncio.gather(*self._jobs)
                    return
                if turns:
                    claimed = await self._turn(turns.popleft()) or claimed
                    continue
                found = await pending.waiting(self.database)
                mine = [each for each in found if not self.only or each.tenant_id in self.only]
                due = [each.tenant_id for each in mine if each.seconds <= 0]
                # Where a round claims nothing, others have what is due in hand, or a job of this worker is in the way.
                if due and (claimed or ended != self._ended):
                    turns.extend(random.sample(due, len(due)))  # workers that start together do not queue up
                    claimed, ended = False, self._ended
                    continue
                claimed = True
                if self.once and not self._jobs:
                    return
                await self._idle(min((each.seconds for each in mine if each.seconds > 0), default=float("inf")))
            except (Unavailable, TimedOut) as error:
                if self.once:
                    raise
                self._pause_for(error)

    async def _slot(self) -> None:
        """Wait until a job may begin: not while paused, one at a time until the first has gone well after a pause."""
        while True:
            pause = self._paused_until - time.monotonic()
            if pause > 0 and not self.once:
                await asyncio.sleep(pause)
            elif len(self._jobs) >= (1 if self._pause and not self.once else self.settings.worker_concurrency):
                await asyncio.wait(self._jobs, return_when=asyncio.FIRST_COMPLETED)
            else:
                return

    async def _idle(self, until_due: float) -> None:
        """Wait for a ring, the end of a job, the next document that is due, or the next look."""
        seconds = min(self.settings.worker_poll, until_due)
        if self._woken.is_set():
            self._woken.clear()
            seconds = min(seconds, SETTLE)
        woken = asyncio.create_task(self._woken.wait())
        try:
            await asyncio.wait([woken, *self._jobs], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()

    async def _turn(self, tenant_id: str) -> bool:
        """Claim and begin one tenant's next documents; whether there were any."""
        bigs = max(1, self.settings.worker_concurrency // 2)
        claims = await pending.claim(
            self.database,
            tenant_id,
            self.name,
            lease=self.settings.worker_lease,
            documents=TURN_DOCUMENTS,
            size=TURN_BYTES,
            largest=2**62 if self._lanes["big"] < bigs else BIG,
            suspects=self._lanes["suspect"] == 0,
        )
        self._held.setdefault(tenant_id, set()).update(each.id for each in claims)
        small = []
        for each in claims:
            if each.suspect:
                self._begin(tenant_id, [each], "suspect")
            elif each.size > BIG:
                self._begin(tenant_id, [each], "big")
            else:
                small.append(each)
        if small:
            self._begin(tenant_id, small)
        return bool(claims)

    def _begin(self, tenant_id: str, claims: Sequence[Claim], lane: Literal["big", "suspect"] | None = None) -> None:
        if lane:
            self._lanes[lane] += 1
        job = asyncio.create_task(self._job(tenant_id, claims, lane))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    # Working on what was claimed

    async def _job(self, tenant_id: str, claims: Sequence[Claim], lane: str | None) -> None:
        ids = {each.id for each in claims}
        try:
            await self._work(tenant_id, claims)
            self._held[tenant_id] -= ids
        except BeingErased:
            self._owed(tenant_id, ids)  # which is nothing once it is done; the other tenants do not wait for it
        except (Unavailable, TimedOut) as error:
            # The database is away; what is held stays so, and is renewed or given back when it is there again.
            self._pause_for(error)
            self._owed(tenant_id, ids)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("a job of tenant %s failed", tenant_id)
            self._owed(tenant_id, ids)
        finally:
            self._ended += 1
            if lane:
                self._lanes[lane] -= 1

    def _owed(self, tenant_id: str, ids: set[str]) -> None:
        """Give these back as soon as the database takes it."""

        async def owed() -> None:
            while True:
                try:
                    await pending.give_back(self.database, tenant_id, self.name, list(ids))
                except PgrecallError:
                    await asyncio.sleep(_jittered(self._pause or PAUSE))
                else:
                    self._held[tenant_id] -= ids
                    return

        job = asyncio.create_task(owed())
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _work(self, tenant_id: str, claims: Sequence[Claim]) -> None:
        """Complete these documents, or say of each why not. Raises Unavailable and TimedOut where that cannot be written."""
        begun = time.monotonic()
        claims = await self._worth_trying(tenant_id, claims)
        if not claims:
            return
        try:
            documents = await self._loaded(tenant_id, claims)
            answers = await upsert.complete(self.database, self.embedder, self.settings, tenant_id, documents)
        except BeingErased:
            raise  # no reason to pause the others
        except Unavailable as error:
            await self._put_back(tenant_id, claims, error)
        except Exception as error:  # noqa: BLE001  whatever it is, one document's must not stop the others'
            if len(claims) == 1:
                await self._failed(tenant_id, claims[0], error)
            else:
                await self._each(tenant_id, claims)
        else:
            await self._told(tenant_id, claims, answers, time.monotonic() - begun)

    async def _each(self, tenant_id: str, claims: Sequence[Claim]) -> None:
        for each in claims:
            await self._work(tenant_id, [each])

    async def _told(
        self, tenant_id: str, claims: Sequence[Claim], answers: Sequence[Outcome | Fault | None], seconds: float
    ) -> None:
        """Count what is ready, and deal with the rest."""
        ready = [answer for answer in answers if isinstance(answer, Outcome)]
        faults = {answer.id: answer for answer in answers if isinstance(answer, Fault)}
        self.counts.ready += len(ready)
        self.counts.chunks += sum(outcome.embedded for outcome in ready)
        if ready:
            if self._pause:
                log.info("worker %s goes on", self.name)
            self._pause = 0.0
            log.debug("tenant %s: %d documents ready in %.2f s", tenant_id, len(ready), seconds)
        await self._park(tenant_id, {fault.id: str(fault) for fault in faults.values() if fault.lasting})
        passing = [each for each in claims if each.id in faults and not faults[each.id].lasting]
        if passing:
            error = faults[passing[0].id].error
            if not await self._works(error):
                await self._put_back(tenant_id, passing, error)
            elif len(claims) == 1:
                await self._failed(tenant_id, claims[0], error)
            else:
                await self._each(tenant_id, passing)
        done = faults.keys() | {outcome.id for outcome in ready}
        overtaken = [each.id for each in claims if each.id not in done]
        if overtaken:
            # Where SQL changed the text and nothing else, the document is still in this worker's name.
            await pending.give_back(self.database, tenant_id, self.name, overtaken)
            self.counts.overtaken += len(overtaken)

    async def _worth_trying(self, tenant_id: str, claims: Sequence[Claim]) -> list[Claim]:
        """The claims but for what is too long to be looked at and what workers ended over too often; those are given up."""
        most = self.settings.worker_attempts
        ended = {
            each.id: f"a worker ended while it had this document in hand, or it failed, {each.attempts} times in all"
            for each in claims
            if each.attempts >= most
        }
        await self._park(tenant_id, ended, counted=False)
        long = {
            each.id: f"content: is {each.size:,} bytes; allowed: 1 to {MAX_TEXT_BYTES:,} bytes in UTF-8"
            for each in claims
            if each.size > MAX_TEXT_BYTES and each.id not in ended
        }
        await self._park(tenant_id, long)
        return [each for each in claims if each.id not in ended and each.id not in long]

    async def _loaded(self, tenant_id: str, claims: Sequence[Claim]) -> list[Claimed]:
        """The documents that are still as they were claimed."""
        versions = {each.id: each.version for each in claims}
        statement = _LOAD.with_values("load", {"tenant_id": tenant_id, "ids": list(versions)})
        (rows,) = await self.database.fetch(tenant_id, [statement], primary=True)
        found = [(row.pop("version"), Draft(**row)) for row in rows]
        return [Claimed(draft, version) for version, draft in found if version == versions[draft.id]]

    async def _works(self, error: Exception) -> bool:
        """Whether the model's server does its work for another text, so that this one may be to blame."""
        if not isinstance(error, EmbeddingFailed):
            return True
        try:
            await self.embedder.embed([PROBE], "query")
        except EmbeddingFailed:
            return False
        return True

    async def _failed(self, tenant_id: str, claim: Claim, error: Exception) -> None:
        """One document failed, and it is its own fault or may be."""
        if isinstance(error, PgrecallError):
            reason = str(error)
        else:
            reason = f"unexpected error {type(error).__name__}; the worker's log has the rest"
            log.error("document %r of tenant %s failed", claim.id, tenant_id, exc_info=error)
        if claim.attempts + 1 >= self.settings.worker_attempts:
            await self._park(tenant_id, {claim.id: reason})
            return
        self.counts.deferred += 1
        seconds = _jittered(min(AGAIN * 2**claim.attempts, LATEST))
        log.warning("document %r of tenant %s failed, next try in %.0f s: %s", claim.id, tenant_id, seconds, reason)
        await pending.defer(
            self.database, tenant_id, self.name, [claim.id], seconds=seconds, error=reason, counted=True
        )

    async def _put_back(self, tenant_id: str, claims: Sequence[Claim], error: Exception) -> None:
        """Nothing can be done now, and these documents are not to blame."""
        self._pause_for(error)
        self.counts.deferred += len(claims)
        ids = [each.id for each in claims]
        await pending.defer(
            self.database, tenant_id, self.name, ids, seconds=self._pause, error=str(error), counted=False
        )

    async def _park(self, tenant_id: str, faults: dict[str, str], *, counted: bool = True) -> None:
        if not faults:
            return
        await pending.park(self.database, tenant_id, self.name, faults, counted=counted)
        self.counts.parked += len(faults)
        for document_id, reason in faults.items():
            log.warning("document %r of tenant %s is given up: %s", document_id, tenant_id, reason)

    # Beside the work

    def _pause_for(self, error: Exception) -> None:
        now = time.monotonic()
        if now < self._paused_until:
            return  # several jobs fail for one reason
        self._pause = min(self._pause * 2 or PAUSE, LONGEST_PAUSE)
        seconds = _jittered(self._pause)
        self._paused_until = now + seconds
        log.warning("worker %s pauses for %.1f s: %s", self.name, seconds, error)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self.settings.worker_lease / 3)
            for tenant_id, ids in list(self._held.items()):
                if not ids:
                    self._held.pop(tenant_id, None)
                    continue
                try:
                    await pending.renew(self.database, tenant_id, self.name, list(ids), self.settings.worker_lease)
                except PgrecallError as error:
                    log.warning("claims of tenant %s were not renewed: %s", tenant_id, error)

    async def _listen(self) -> None:
        delay = PAUSE
        while True:
            try:
                with translated():
                    connection = await psycopg.AsyncConnection.connect(
                        self.settings.database_url or "",
                        autocommit=True,
                        connect_timeout=5,
                        application_name="pgrecall worker",
                    )
                    async with connection:
                        await connection.execute(LISTEN.encode())
                        self._woken.set()  # for what was put before
                        delay = PAUSE
                        async for _ in connection.notifies():
                            self._woken.set()
            except (PgrecallError, psycopg.Error) as error:
                log.info(
                    "worker %s hears no rings and looks every %g s: %s", self.name, self.settings.worker_poll, error
                )
            await asyncio.sleep(_jittered(delay))
            delay = min(delay * 2, LONGEST_PAUSE)

    async def _report(self) -> None:
        said = _said(self.counts)
        while True:
            await asyncio.sleep(REPORT_EVERY)
            if _said(self.counts) != said:
                said = _said(self.counts)
                log.info("worker %s: %s", self.name, said)

    async def _give_back(self) -> int:
        returned = 0
        for tenant_id, ids in self._held.items():
            if ids:
                with contextlib.suppress(PgrecallError):
                    returned += await pending.give_back(self.database, tenant_id, self.name, list(ids))
        return returned


async def serve(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    *,
    only: frozenset[str] = frozenset(),
    once: bool = False,
) -> Counts:
    """Work until SIGTERM or Ctrl-C, or with `once` until nothing is due. What was done."""
    worker = Worker(database, embedder, settings, only, once)
    running = asyncio.create_task(worker.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        if not running.cancelled():
            raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return worker.counts


async def when_ready(database: Database, embedder: Embedder) -> None:
    """Wait for the database and its migration. Raises SetupError for what waiting does not mend."""
    seconds = PAUSE
    while True:
        try:
            await schema.check(database, embedder)
        except (DatabaseUnavailable, SchemaTooOld) as error:
            log.warning("the worker waits: %s", error)
            await asyncio.sleep(_jittered(seconds))
            seconds = min(2 * seconds, LONGEST_PAUSE)
        else:
            return


@asynccontextmanager
async def beside(embedder: Embedder, settings: Settings) -> AsyncIterator[None]:
    """A worker for as long as the block lasts, on connections of its own. What ends it early is logged."""
    database = Database(patient(settings), settings.database_url or "")

    async def work() -> None:
        try:
            await when_ready(database, embedder)
            await Worker(database, embedder, settings).run()
        except Exception:
            log.exception("the worker ended; start `pgrecall worker`, or the server anew")

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await spaces.close(database)
        await database.close()


def patient(settings: Settings) -> Settings:
    """The settings of a worker's own database connections, behind which nobody waits."""
    return msgspec.structs.replace(settings, statement_timeout=max(settings.statement_timeout, STATEMENT_TIMEOUT))


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311  spreads tries, guards nothing


def _said(counts: Counts) -> str:
    return (
        f"{counts.ready} documents ready ({counts.chunks} chunks embedded), {counts.parked} given up, "
        f"{counts.deferred} put off, {counts.overtaken} replaced meanwhile"
    )

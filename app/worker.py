"""The worker: takes pending documents in hand, tenant by tenant, cuts and embeds them, and makes them searchable.

A round gives each tenant that has something due one turn; a turn claims a few small documents, which are embedded and
written together, and at most one big document and one suspect, each by itself. So a tenant with a million documents waits
for one with ten, not the other way round. Claims are renewed while the work goes on and given back when the worker ends. Where the database or the model's server is away, the worker pauses.
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

from app import jobs, pending, pruning, roundtrip, schema, spaces, stopping
from app.database import Database, translated
from app.embedding import Embedder
from app.errors import BeingErased, DatabaseUnavailable, PgrecallError, SchemaTooOld, TimedOut, Unavailable
from app.jobs import Counts, Tools
from app.pending import Claim
from app.settings import Settings

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

SETTLE = 0.25
"""Seconds after which a woken worker looks again: puts close to the one that woke it did not ring."""

REPORT_EVERY = 60.0
LISTEN = f"listen {pending.CHANNEL}"
"""To be woken by asynchronous puts, on a connection of its own."""


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
    _tools: Tools = field(init=False)
    _jobs: set[asyncio.Task[None]] = field(default_factory=set)
    _held: dict[str, set[str]] = field(default_factory=dict)
    _lanes: dict[str, int] = field(default_factory=lambda: {"big": 0, "suspect": 0})
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: int = 0
    _pause: float = 0.0
    _paused_until: float = float("-inf")

    def __post_init__(self) -> None:
        self._tools = Tools(self.database, self.embedder, self.settings, self.name)

    async def run(self) -> None:
        """Work. Cancelled, it stops at once and gives back what it has in hand."""
        tasks = [asyncio.create_task(each()) for each in (self._rounds, self._renew, self._report)]
        if not self.once:
            tasks += [asyncio.create_task(each()) for each in (self._listen, self._prune)]
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
        ids, counts = {each.id for each in claims}, Counts()
        try:
            away = await jobs.work(self._tools, counts, tenant_id, claims, seconds=self._pause * 2 or PAUSE)
            self._held[tenant_id] -= ids
            if away is not None:
                self._pause_for(away)
            elif counts.ready and self._pause:
                log.info("worker %s goes on", self.name)
                self._pause = 0.0
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
            self.counts.add(counts)
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
                    await asyncio.sleep(jobs.jittered(self._pause or PAUSE))
                else:
                    self._held[tenant_id] -= ids
                    return

        job = asyncio.create_task(owed())
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    # Beside the work

    def _pause_for(self, error: Exception) -> None:
        now = time.monotonic()
        if now < self._paused_until:
            return  # several jobs fail for one reason
        self._pause = min(self._pause * 2 or PAUSE, LONGEST_PAUSE)
        seconds = jobs.jittered(self._pause)
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
        url = self.settings.listen_url
        while True:
            try:
                with translated():
                    connection = await psycopg.AsyncConnection.connect(
                        url or self.settings.database_url or "",
                        autocommit=True,
                        connect_timeout=5,
                        application_name="pgrecall worker",
                        keepalives_idle=30,
                        keepalives_interval=10,
                        keepalives_count=3,
                    )
                    async with connection:
                        if url is None and await roundtrip.pooled(connection):
                            log.info(
                                "worker %s is behind a pooler and looks every %g s; PGRECALL_LISTEN_URL, the server's own "
                                "address, wakes it at once",
                                self.name,
                                self.settings.worker_poll,
                            )
                            break
                        await connection.execute(LISTEN.encode())
                        self._woken.set()  # for what was put before
                        delay = PAUSE
                        async for _ in connection.notifies():
                            self._woken.set()
            except (PgrecallError, psycopg.Error) as error:
                log.info(
                    "worker %s hears no rings and looks every %g s: %s", self.name, self.settings.worker_poll, error
                )
            await asyncio.sleep(jobs.jittered(delay))
            delay = min(delay * 2, LONGEST_PAUSE)
        await asyncio.Event().wait()  # `run` ends with the first of its tasks

    async def _prune(self) -> None:
        """Every hour keep the caches of tenants to which nobody writes within their bounds."""
        while True:
            await asyncio.sleep(jobs.jittered(pruning.EVERY))
            try:
                removed = await pruning.everywhere(self.database, self.settings, self.only)
            except PgrecallError as error:
                log.warning("caches were not pruned, the next hour will try: %s", error)
            else:
                if removed:
                    log.info("worker %s pruned %d cached vectors", self.name, removed)

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
    """Work until SIGTERM, SIGHUP or Ctrl-C, or with `once` until nothing is due. What was done."""
    worker = Worker(database, embedder, settings, only, once)
    running = asyncio.create_task(worker.run())
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in former:
            # A second Ctrl-C would break off the giving back; it is nearly over in any case.
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        running.cancel()

    former = {number: signal.getsignal(number) for number in stopping.signals()}
    for number in former:
        loop.add_signal_handler(number, stop)
    try:
        await running
    except asyncio.CancelledError:
        if not running.cancelled():
            raise
    finally:
        if not running.cancelled():
            for number, handler in former.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
    return worker.counts


async def when_ready(database: Database, embedder: Embedder) -> None:
    """Wait for the database and its migration. Raises SetupError for what waiting does not mend."""
    seconds = PAUSE
    while True:
        try:
            await schema.check(database, embedder)
        except (DatabaseUnavailable, SchemaTooOld) as error:
            log.warning("the worker waits: %s", error)
            await asyncio.sleep(jobs.jittered(seconds))
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


def _said(counts: Counts) -> str:
    return (
        f"{counts.ready} documents ready ({counts.chunks} chunks embedded), {counts.parked} given up, "
        f"{counts.deferred} put off, {counts.overtaken} replaced meanwhile"
    )

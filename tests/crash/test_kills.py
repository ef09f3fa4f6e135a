"""Everything is killed at random moments of mixed writes: what was acknowledged is there and whole, nothing is half there.

A failure prints its seed; CRASH_SEED=… kills in the same order after the same delays again.
"""

import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import httpx
import psycopg
import pytest

from app.arguments import parser
from app.chunking import Chunk
from app.embedding import open_embedder
from tests.conftest import DIMENSIONS, PATIENCE, settings_for
from tests.crash import invariants
from tests.crash.fleet import Fleet
from tests.crash.ledger import Ledger
from tests.crash.storm import Client, Folder

CLIENTS = 3


class Runs:
    """A fleet under a storm, and a look at everything after each kill."""

    def __init__(self, folder: Path, openai, seed: int) -> None:
        self.generator = random.Random(seed)
        self.seed = seed
        self.fleet = Fleet(folder, openai.url, DIMENSIONS)
        self.fleet.has_workers = has_workers()
        self.openai = openai
        openai.delay = 0.01
        self.ledger = Ledger()
        self.settings = settings_for(None, openai.url, chunk_max_tokens=48, chunk_overlap_tokens=16)
        self.embedder = open_embedder(self.settings)
        (folder / "files").mkdir()
        self.clients = [Client(n, self.generator.randrange(2**32), self.fleet, self.ledger) for n in range(CLIENTS)]
        self.clients.append(Folder(self.generator.randrange(2**32), self.fleet, self.ledger, folder / "files"))
        self.kills: Counter[str] = Counter()
        self.log: list[str] = []
        self.lookups = 0

    def say(self, what: str) -> None:
        self.log.append(what)
        print(what, flush=True)

    def start(self) -> None:
        self.say(f"CRASH_SEED={self.seed}")
        self.fleet.keep_up(workers=self.fleet.has_workers)
        for each in self.clients:
            each.start()

    def run(self, number: int, victim: str) -> list[str]:
        """One kill. What was wrong afterwards."""
        began = time.monotonic()
        for each in self.clients:
            each.resume()
        self._wait(lambda: all(each.answered for each in self.clients[:CLIENTS]), "a first answer")
        if victim == "cli":
            # Most of its time is its start: wait until it embeds something.
            seen = len(self.openai.calls)
            self._wait(lambda: any(map(self._of_files, self.openai.calls[seen:])), "the command line")
        delay = self.generator.uniform(0.1, 1.0)
        time.sleep(delay)
        self.kills[victim] += 1
        before = self.fleet.postmaster()
        told = list(map(self.fleet.kill, self._order(victim)))
        if victim == "postgres twice":
            # Somebody starts it again; the second time it is killed while it recovers, or soon after.
            self._wait(lambda: self.fleet.postmaster() not in (None, before), "PostgreSQL's start")
            time.sleep(self.generator.uniform(0, 0.4))
            told.append(self.fleet.kill("postgres"))
        self.say(f"run {number} {time.monotonic() - began:6.2f} s: killed {', '.join(told)}")
        answered = [each.answered for each in self.clients]
        self.fleet.keep_up(workers=self.fleet.has_workers)
        self._wait(
            lambda: all(now.answered > then for now, then in zip(self.clients[:CLIENTS], answered, strict=False)),
            "answers after the kill, from every client",
        )
        for each in self.clients:
            each.pause()
        self._wait(lambda: all(each.paused.is_set() for each in self.clients), "the last answers")
        self.openai.calls.clear()
        return self.look()

    def _of_files(self, call) -> bool:
        cli = self.fleet.running.get("cli")
        return cli is not None and cli.poll() is None and len(call.body["input"]) > 20

    def _order(self, victim: str) -> list[str]:
        """What is killed at once, one after the other."""
        if victim == "api+postgres":
            return self.generator.sample(["api", "postgres"], 2)
        return ["postgres" if victim == "postgres twice" else "worker-1" if victim == "worker" else victim]

    def _wait(self, met, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not met():
            dead = [each.name for each in self.clients if not each.is_alive()]
            assert not dead, f"{dead} ended"
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s\n" + "\n".join(self.log)
            time.sleep(0.02)

    def look(self) -> list[str]:
        faults = [fault for each in self.clients for fault in each.faults]
        with psycopg.connect(self.fleet.owner_url(), autocommit=True) as owner:
            self._wait(lambda: owner.execute(PENDING).fetchone() == (0,), "an empty queue")
            stored = invariants.stored(owner)
            faults += self.ledger.judge(stored)
            faults += invariants.faults(owner, self.settings, self.embedder)
        with psycopg.connect(self.fleet.server.url("postgres", "pgrecall"), autocommit=True) as admin:
            admin.execute("create extension if not exists amcheck")
            admin.execute(invariants.INDEXES).fetchall()
        return faults + self._searches(stored)

    def _searches(self, stored) -> list[str]:
        """A search finds what is there, by its words and by its vector."""
        faults = []
        with httpx.Client(base_url=self.fleet.address, timeout=60) as http:
            for (tenant, document), (content, mark) in self.generator.sample(
                sorted(stored.items()), min(6, len(stored))
            ):
                for mode in ("text", "vector", "hybrid"):
                    # Its last chunk, which no other document has: nothing is more similar.
                    query = f"mark{mark}" if mode == "text" else self._cut(content)[-1].content
                    body = {"tenant_id": tenant, "query": query, "mode": mode, "top_k": 100}
                    answer = http.post("/search", json=body)
                    hits = answer.json().get("results", answer.text) if answer.status_code == 200 else answer.text
                    ids = {hit["id"] for hit in hits} if isinstance(hits, list) else hits
                    self.lookups += 1
                    if (mode == "text" and ids != {document}) or document not in ids:
                        faults.append(f"{mode} search for {query!r} in {tenant} does not find {document}: {ids}")
        return faults

    def _cut(self, content: str) -> list[Chunk]:
        limits = self.settings.chunk_max_tokens, self.settings.chunk_overlap_tokens
        return invariants.cut(content, self.embedder, *limits)

    def close(self) -> None:
        for each in self.clients:
            each.over = True
        self.fleet.close()
        for each in self.clients:
            if each.is_alive():
                each.join(PATIENCE)


PENDING = "select count(*) from sources where state = 'pending'"


def has_workers() -> bool:
    return re.search(r"^ +worker ", parser().format_help(), re.MULTILINE) is not None


VICTIMS = ["postgres", "api", "cli", "api+postgres", "worker", "one of several", "postgres twice"]


@pytest.mark.parametrize(
    "runs",
    [
        5,
        pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(7200)]),
    ],
)
def test_kills_lose_nothing_acknowledged_and_leave_nothing_half(tmp_path, openai, runs):
    seed = int(os.environ.get("CRASH_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
    storm = Runs(tmp_path, openai, seed)
    try:
        storm.start()
        victims: list[str] = []
        for number in range(runs):
            victims = victims or storm.generator.sample(VICTIMS, len(VICTIMS))
            if victims[-1] == "worker" and not storm.fleet.has_workers:
                victims.pop()
                victims = victims or storm.generator.sample(VICTIMS[:4], 4)
            faults = storm.run(number, victims.pop())
            assert not faults, "\n".join([*storm.log, *faults])
    finally:
        storm.close()
        print(
            f"{sum(storm.kills.values())} runs {dict(storm.kills)}, {storm.ledger.acknowledged} writes acknowledged, "
            f"{storm.ledger.in_doubt} in doubt, {storm.lookups} searches"
        )

"""The cache of vectors: one call embeds a text, among all calls and processes; and how long it is kept."""

import asyncio
import json
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import psycopg
import pytest
from msgspec.structs import replace

from app import cache, claims, pruning
from app.database import Database
from app.drafts import Draft
from app.errors import BudgetSpent, DatabaseUnavailable, EmbeddingFailed
from app.meter import Meter
from app.settings import Settings
from app.upsert import put
from app.worker import Worker
from tests.conftest import PATIENCE
from tests.openai_server import embedding

TEXTS = [f"Text number {number} of those that are asked for." for number in range(120)]

# A process of its own: says when it is ready, waits for a line, embeds what that line holds, says what it took.
PROCESS = """
import asyncio, dataclasses, json, sys
import msgspec
from app import cache, claims
from app.database import Database
from app.embedding import open_embedder
from app.meter import Meter
from app.settings import Settings

async def main():
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    claims.LEASE = float(sys.argv[2])
    database, embedder, meter = Database(settings, settings.database_url), open_embedder(settings), Meter()
    await database.fetch("acme", [])
    print("ready", flush=True)
    texts = json.loads(sys.stdin.readline())
    attempt = await cache.embed_each(database, embedder, settings, "acme", texts, meter=meter)
    print(json.dumps([len(texts) - len(attempt.faults), meter.texts, meter.cache_hits + meter.deduplicated]), flush=True)
    await embedder.aclose()
    await database.close()

asyncio.run(main())
"""


class Process:
    """A process that embeds texts through the cache; SIGKILLed at the end if it still lives."""

    def __init__(self, settings: Settings, lease: float = claims.LEASE) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROCESS, msgspec.json.encode(settings).decode(), str(lease)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        assert self.popen.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        self.popen.kill()
        self.popen.communicate()

    def begin(self, texts):
        self.popen.stdin.write(json.dumps(texts) + "\n")
        self.popen.stdin.flush()

    def told(self):
        return json.loads(self.popen.stdout.readline())


@pytest.fixture
def ask(database, embedder, settings):
    async def _ask(texts, tenant="acme", **options):
        return await cache.embed_each(database, embedder, settings, tenant, texts, **options)

    return _ask


def held(owner):
    return owner.execute("select count(*) from embedding_claims").fetchone()[0]


def kept(owner):
    return owner.execute("select count(*) from embedding_cache").fetchone()[0]


# within a process


async def test_vectors_come_in_the_order_of_the_texts_from_model_and_cache_alike(ask, openai, owner):
    await ask(TEXTS[:5])
    meter = Meter()
    texts = [*TEXTS[3:8], TEXTS[4]]
    vectors, faults = await ask(texts, meter=meter)
    assert not faults
    np.testing.assert_allclose(vectors, [embedding(text, 64) for text in texts], atol=1e-6)
    assert (meter.texts, meter.cache_hits, meter.deduplicated) == (3, 2, 1)
    assert sorted(openai.embedded) == sorted(TEXTS[:8])
    assert (kept(owner), held(owner)) == (8, 0)


async def test_calls_at_the_same_time_share_what_they_ask_for(ask, openai, owner):
    openai.delay = 0.2
    meter = Meter()
    several = await asyncio.gather(*(ask(TEXTS[start : start + 60], meter=meter) for start in (0, 30, 60, 0)))
    assert not any(attempt.faults for attempt in several)
    assert sorted(openai.embedded) == sorted(TEXTS)
    assert (meter.texts, meter.deduplicated + meter.cache_hits) == (120, 120)
    assert cache._under_way[next(iter(cache._under_way))] == {}


async def test_without_a_cache_calls_at_the_same_time_still_share(database, embedder, settings, openai, owner):
    openai.delay = 0.2
    none = replace(settings, cache_rows=0)
    await asyncio.gather(*(cache.embed(database, embedder, none, "acme", TEXTS[:9]) for _ in range(3)))
    assert sorted(openai.embedded) == sorted(TEXTS[:9])
    assert (kept(owner), held(owner)) == (0, 0)


async def test_another_tenant_shares_nothing(ask, openai):
    await asyncio.gather(ask(TEXTS[:2]), ask(TEXTS[:2], tenant="umbra"))
    assert sorted(openai.embedded) == sorted(TEXTS[:2] * 2)


async def test_a_call_that_goes_away_leaves_its_texts_to_those_that_wait(ask, openai, owner):
    openai.fail("hang", seconds=2 * PATIENCE)
    first = asyncio.create_task(ask(TEXTS[:3]))
    while not openai.calls:  # noqa: ASYNC110 - another thread's list has no event to wait for
        await asyncio.sleep(0.01)
    second = asyncio.create_task(ask(TEXTS[:3]))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not (await second).faults
    assert (kept(owner), held(owner)) == (3, 0)


async def test_those_that_wait_learn_that_a_text_is_refused(ask, openai, owner):
    openai.delay, openai.poison = 0.2, "number 3 "
    several = await asyncio.gather(ask(TEXTS[:6]), ask(TEXTS[2:5]))
    assert [attempt.faults.keys() for attempt in several] == [{3}, {1}]
    assert [fault.index for attempt in several for fault in attempt.faults.values()] == [3, 1]
    assert (kept(owner), held(owner)) == (5, 0)


async def test_the_budget_of_one_call_is_no_others(ask, openai, owner):
    openai.delay = 0.2
    poor, rich = await asyncio.gather(ask(TEXTS[:40], meter=Meter(max_tokens=100)), ask(TEXTS[:40]))
    assert poor.faults
    assert not rich.faults
    assert sorted(openai.paid) == sorted(TEXTS[:40])


async def test_what_was_embedded_before_the_budget_was_spent_is_kept(database, embedder, settings, openai, owner):
    meter = Meter(max_tokens=200)
    with pytest.raises(BudgetSpent, match="of 200 are spent"):
        await put(database, embedder, settings, "acme", [Draft(text, text) for text in TEXTS[:60]], meter=meter)
    assert owner.execute("select count(*) from sources").fetchone() == (0,)
    assert (kept(owner), held(owner)) == (meter.texts, 0)
    assert 0 < meter.texts < 60
    await put(database, embedder, settings, "acme", [Draft(text, text) for text in TEXTS[:60]])
    assert sorted(openai.paid) == sorted(TEXTS[:60])


async def test_answers_are_kept_as_they_come_and_when_the_caller_goes_away(ask, openai, owner, embedder):
    embedder._endpoint.most_texts = 10
    embedder._endpoint.settled = True
    openai.fail("hang", seconds=2 * PATIENCE)
    call = asyncio.create_task(ask(TEXTS[:40]))
    while kept(owner) < 30:  # noqa: ASYNC110 - another process's table has no event to wait for
        await asyncio.sleep(0.05)
    assert held(owner) == 10
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (kept(owner), held(owner)) == (30, 0)


async def test_a_server_that_is_away_leaves_no_claims(ask, openai, owner):
    openai.fail(status=401)
    attempt = await ask(TEXTS[:5])
    assert all(isinstance(fault, EmbeddingFailed) and fault.index is None for fault in attempt.faults.values())
    assert len(attempt.faults) == 5
    assert held(owner) == 0
    assert not (await ask(TEXTS[:5])).faults


async def test_a_database_that_is_away_is_said_and_nothing_hangs(embedder, settings):
    away = replace(settings, database_url="postgresql://u@127.0.0.1:9/d")
    database = Database(away, away.database_url)
    with pytest.raises(DatabaseUnavailable):
        await cache.embed(database, embedder, away, "acme", TEXTS[:2])
    assert not cache._under_way[database]
    await database.close()


async def test_claims_last_as_long_as_the_work(ask, openai, owner, monkeypatch):
    monkeypatch.setattr(claims, "RENEWALS", 40)
    over = False
    openai.holds = lambda _: not over
    call = asyncio.create_task(ask(TEXTS[:2]))
    ends = "select min(expires_at), max(expires_at) from embedding_claims"
    while not openai.calls:  # noqa: ASYNC110 - another thread's list has no event to wait for
        await asyncio.sleep(0.01)
    _, first = owner.execute(ends).fetchone()
    async with asyncio.timeout(PATIENCE):
        while owner.execute(ends).fetchone()[0] <= first:  # noqa: ASYNC110 - nor has a table
            await asyncio.sleep(0.05)
    over = True
    assert not (await call).faults
    assert len(openai.calls) == 1


# among processes


def test_processes_at_work_at_once_send_each_text_once(settings, openai, owner):
    openai.delay = 0.5
    with Process(settings) as first, Process(settings) as second, Process(settings) as third:
        first.begin(TEXTS[:80])
        second.begin(TEXTS[40:][::-1])
        third.begin(TEXTS)
        told = [first.told(), second.told(), third.told()]
    assert [embedded for embedded, _, _ in told] == [80, 80, 120]
    assert sorted(openai.embedded) == sorted(TEXTS)
    assert sum(paid for _, paid, _ in told) == 120
    assert sum(free for _, _, free in told) == 160
    assert (kept(owner), held(owner)) == (120, 0)


def test_what_a_killed_process_held_is_taken_over(settings, openai, owner):
    openai.fail("hang", seconds=2 * PATIENCE)
    with Process(settings, lease=2) as killed, Process(settings, lease=2) as heir:
        killed.begin(TEXTS[:20])
        while not openai.calls:
            time.sleep(0.01)
        assert held(owner) == 20
        killed.popen.send_signal(signal.SIGKILL)
        killed.popen.wait()
        heir.begin(TEXTS[10:30])
        assert heir.told() == [20, 20, 0]
    assert sorted(openai.paid) == sorted(TEXTS[10:30])
    # What nobody asks for again is left until its tenant's cache is pruned.
    assert (kept(owner), held(owner)) == (20, 10)


# how long, and how many


async def prune(database, settings, **changes):
    return await pruning.prune(database, replace(settings, **changes), "acme")


async def test_the_newest_stay_and_other_tenants_are_left_alone(ask, database, settings, owner, monkeypatch):
    monkeypatch.setattr(pruning, "AT_ONCE", 4)
    await ask(TEXTS[:30])
    await ask(TEXTS[:3], tenant="umbra")
    owner.execute("update embedding_cache set created_at = now() - interval '1 hour'")
    await ask(TEXTS[30:40])
    assert await prune(database, settings, cache_rows=12) == 28
    left = owner.execute(
        "select tenant_id, created_at > now() - interval '1 minute', count(*) from embedding_cache group by 1, 2 order by 1, 2"
    ).fetchall()
    assert left == [("acme", False, 2), ("acme", True, 10), ("umbra", False, 3)]
    assert await prune(database, settings, cache_rows=12) == 0


async def test_what_is_older_than_allowed_goes_and_claims_nobody_holds(ask, database, settings, owner):
    await ask(TEXTS[:5])
    owner.execute("update embedding_cache set created_at = now() - interval '25 hours' where content_sha256 < '\\x80'")
    young = owner.execute("select count(*) from embedding_cache where content_sha256 >= '\\x80'").fetchone()
    owner.execute(
        "insert into embedding_claims select tenant_id, model, dimensions, input_type, content_sha256, "
        "gen_random_uuid(), now() - interval '2 hours' from embedding_cache"
    )
    assert await prune(database, settings, cache_days=1) == 5 - young[0] + 5
    assert owner.execute("select count(*) from embedding_cache").fetchone() == young
    assert held(owner) == 0


async def test_of_two_that_prune_one_does(ask, database, settings, owner):
    await ask(TEXTS[:20])
    removed = await asyncio.gather(*(prune(database, settings, cache_rows=5) for _ in range(4)))
    assert sum(removed) == 15
    assert kept(owner) == 5


async def test_rows_that_others_delete_are_not_waited_for(ask, database, settings, owner, owner_url):
    await ask(TEXTS[:6])
    with psycopg.connect(owner_url) as other:
        held = other.execute("delete from embedding_cache where content_sha256 < '\\x80'").rowcount
        async with asyncio.timeout(PATIENCE):
            removed = await prune(database, settings, cache_rows=1)
    assert 5 - held <= removed <= 6 - held


async def test_a_worker_prunes_the_caches_of_tenants_to_which_nobody_writes(
    database, settings, embedder, owner, monkeypatch
):
    for tenant in ("acme", "idle", "other"):
        await put(database, embedder, settings, tenant, [Draft("a", f"The only text of {tenant}.")])
    owner.execute("update embedding_cache set created_at = now() - interval '200 days'")
    count = "select tenant_id, count(*) from embedding_cache group by 1 order by 1"
    assert await pruning.everywhere(database, settings, frozenset({"other"})) == 1
    assert owner.execute(count).fetchall() == [("acme", 1), ("idle", 1)]
    monkeypatch.setattr(pruning, "EVERY", 0.05)
    work = asyncio.create_task(Worker(database, embedder, settings).run())
    async with asyncio.timeout(PATIENCE):
        while owner.execute(count).fetchall():  # noqa: ASYNC110 - another task's table has no event to wait for
            await asyncio.sleep(0.05)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def test_most_writes_do_not_prune(database, embedder, settings, monkeypatch):
    pruned = []

    async def count(*_):
        pruned.append(True)
        return 0

    monkeypatch.setattr(pruning, "prune", count)
    few = replace(settings, cache_rows=100)
    for number in range(40):
        await cache.embed(database, embedder, few, "acme", [TEXTS[number]])
    # The first, because this process knows nothing yet, and each time a tenth of the bound has been added.
    assert len(pruned) == 1 + 39 // 11


async def test_a_cache_that_cannot_be_pruned_fails_no_write(ask, monkeypatch, caplog):
    async def fail(*_):
        raise DatabaseUnavailable

    monkeypatch.setattr(pruning, "prune", fail)
    assert not (await ask(TEXTS[:1])).faults
    assert "was not pruned" in caplog.text

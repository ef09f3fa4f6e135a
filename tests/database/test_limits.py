"""Limits across server processes: each has counters of its own here, and they share one database."""

import asyncio
import math
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from app import keys, limits, registry
from app.database import Database
from app.errors import DatabaseUnavailable, LimitReached
from app.limits import SHARE, Limits
from app.registry import Asked
from tests.conftest import PATIENCE


def as_owner(owner, statement):
    return registry.run_as_owner(owner, statement)[0]


def caller(owner, **asked):
    """A key with these limits, as the service knows it."""
    minted = keys.mint()
    as_owner(owner, registry.put_tenant("acme", asked.pop("max_rows", None), asked.pop("tokens_per_day", None)))
    as_owner(owner, registry.create_key(Asked(scopes=["read", "write"], tenant_id="acme", **asked), minted))
    (row,) = registry.run_as_owner(owner, registry.list_tenants(tenant_id="acme"))
    return keys.Caller(
        minted.prefix,
        minted.digest,
        "acme",
        frozenset({"read", "write"}),
        asked.get("requests_per_minute"),
        asked.get("concurrent_streams"),
        row["max_rows"],
        row["tokens_per_day"],
    )


@asynccontextmanager
async def processes(settings, number):
    """The counters of so many server processes, each with connections of its own."""
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(number):
            database = Database(settings, settings.database_url)
            stack.push_async_callback(database.close)
            made.append(await stack.enter_async_context(limits.opened(database)))
        yield made


async def within_one(unit, owner, check):
    """Check it; once more where a minute of the clock, or a day, ended in the middle of it."""
    began = f"select date_trunc('{unit}', clock_timestamp() at time zone 'UTC')"
    while True:
        before = owner.execute(began).fetchone()
        try:
            return await check()
        except AssertionError:
            if owner.execute(began).fetchone() == before:
                raise


async def count(process, who, most):
    """How many requests it lets through, of so many at once; those it refuses say when to come again."""
    answers = await asyncio.gather(*(process.request(who) for _ in range(most)), return_exceptions=True)
    refused = [each for each in answers if each is not None]
    assert all(isinstance(each, LimitReached) and 1 <= each.retry_after <= 60 for each in refused)
    return most - len(refused)


@pytest.mark.parametrize("limit", [1, 7, 20, 300])
async def test_requests_are_never_too_many_and_too_few_by_what_the_others_hold(settings, owner, limit):
    share = math.ceil(limit / SHARE)

    async def check():
        who = caller(owner, requests_per_minute=limit)
        async with processes(settings, 3) as (busy, *others):
            passed = [await count(other, who, 1) for other in others]
            passed.append(await count(busy, who, 3 * limit))
            assert limit - len(others) * (share - 1) <= sum(passed) <= limit
            # What the others still hold is theirs; all of it used, the limit is reached and not passed.
            passed += [await count(other, who, 2 * limit) for other in others]
            assert sum(passed) == limit
            assert [await count(each, who, 5) for each in (busy, *others)] == [0, 0, 0]

    await within_one("minute", owner, check)


async def test_as_fast_as_they_can_the_processes_together_keep_the_limit(settings, owner):
    async def check():
        who = caller(owner, requests_per_minute=200)
        async with processes(settings, 3) as several:
            passed = await asyncio.gather(*(count(each, who, 150) for each in several))
        assert sum(passed) == 200
        taken = owner.execute("select requests_taken from api_keys where prefix = %s", (who.prefix,)).fetchone()
        assert taken == (200,)

    await within_one("minute", owner, check)


async def test_a_share_is_one_write_and_a_limit_that_is_reached_none(settings, owner, monkeypatch):
    async def check():
        who = caller(owner, requests_per_minute=100)
        async with processes(settings, 1) as (process,):
            asked = []
            fetch = process.database.fetch_public

            async def counted(statement):
                asked.append(statement.name)
                return await fetch(statement)

            monkeypatch.setattr(process.database, "fetch_public", counted)
            assert await count(process, who, 400) == 100
            assert asked == ["use key"] * 21  # the last one to hear that there is no more
            assert await count(process, who, 100) == 0
            assert len(asked) == 21

    await within_one("minute", owner, check)


async def test_the_next_minute_is_another_one(settings, owner):
    async def check():
        who = caller(owner, requests_per_minute=2)
        owner.execute(
            "update api_keys set minute = date_trunc('minute', now()) - interval '1 minute', requests_taken = 2"
        )
        async with processes(settings, 1) as (process,):
            assert await count(process, who, 5) == 2
            share = process._requests[who.prefix]
            share.ends = 0.0  # as if the minute were over in this process: the database knows better
            assert await count(process, who, 5) == 0
            owner.execute("update api_keys set minute = minute - interval '1 minute'")
            share.ends = 0.0
            assert await count(process, who, 5) == 2

    await within_one("minute", owner, check)


async def test_streams_are_counted_exactly_and_those_of_the_dead_for_a_minute(settings, owner):
    who = caller(owner, concurrent_streams=3)
    async with processes(settings, 2) as (one, two):
        ended = [await one.open_stream(who), await two.open_stream(who), await two.open_stream(who)]
        for process in (one, two):
            with pytest.raises(LimitReached):
                await process.open_stream(who)
        ended.pop()()
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    ended.append(await one.open_stream(who))
                    break
                except LimitReached:
                    await asyncio.sleep(0.01)
        for each in ended:
            each()
        async with asyncio.timeout(PATIENCE):
            while owner.execute("select count(*) from key_streams").fetchone() != (0,):  # noqa: ASYNC110  the database's
                await asyncio.sleep(0.01)
        owner.execute(
            "insert into key_streams values (%s, gen_random_uuid(), 3, now() + interval '1 hour')", (who.prefix,)
        )
        with pytest.raises(LimitReached):
            await one.open_stream(who)
        owner.execute("update key_streams set expires_at = now() - interval '1 millisecond'")
        (await one.open_stream(who))()


async def test_a_key_may_have_no_streams_at_all_and_one_without_a_limit_writes_nothing(settings, owner):
    none, any_number = caller(owner, concurrent_streams=0), caller(owner)
    async with processes(settings, 1) as (process,):
        with pytest.raises(LimitReached):
            await process.open_stream(none)
        for _ in range(100):
            await process.open_stream(any_number)
        assert owner.execute("select count(*) from key_streams").fetchone() == (0,)


async def test_streams_that_last_are_said_again(settings, owner, monkeypatch):
    monkeypatch.setattr(limits, "RENEWED", 0.02)
    who = caller(owner, concurrent_streams=1)
    async with processes(settings, 1) as (process,):
        ended = await process.open_stream(who)
        first = owner.execute("select expires_at from key_streams").fetchone()
        async with asyncio.timeout(PATIENCE):
            while owner.execute("select expires_at from key_streams").fetchone() <= first:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        ended()


async def spend(process, who, tokens):
    """How many of so many calls of 10 tokens each were begun."""
    begun = 0
    for _ in range(tokens // 10):
        try:
            await process.embedding(who)
        except LimitReached:
            break
        process.spent(who, 10)
        begun += 1
    return begun * 10


async def test_tokens_are_passed_by_what_is_under_way_and_no_more(settings, owner):
    await within_one("day", owner, lambda: spending(settings, owner))


async def spending(settings, owner, limit=1_000):
    owner.execute("update tenants set tokens_taken = 0")
    who = caller(owner, tokens_per_day=limit)
    async with processes(settings, 2) as (busy, other):
        spent = await spend(other, who, 10) + await spend(busy, who, 5 * limit)
        assert limit - limit // SHARE < spent <= limit + 10
        spent += await spend(other, who, 5 * limit)
        assert limit <= spent <= limit + 2 * 10
        # A debt is paid out of the next share: a large request is not forgotten.
        owner.execute("update tenants set tokens_taken = 0")
        for each in (busy, other):
            each._tokens.clear()
        await busy.embedding(who)
        busy.spent(who, 700)
        spent = await spend(busy, who, 5 * limit) + await spend(other, who, 5 * limit)
        assert limit - 700 - limit // SHARE < spent <= limit - 700 + 2 * 10
        # A limit that is raised is known as soon as the key is: the share it was spent under is another one.
        owner.execute("update tenants set tokens_per_day = %s", (2 * limit,))
        assert await spend(busy, who, 100) == 0
        assert await spend(busy, replace(who, tokens_per_day=2 * limit), 100) == 100
        owner.execute("update tenants set tokens_day = tokens_day - 1")
        busy._tokens.clear()
        assert await spend(busy, who, 100) == 100


async def test_without_the_database_a_limited_key_waits_and_another_goes_on(settings, owner):
    limited, free = caller(owner, requests_per_minute=100), caller(owner)
    away = Database(settings, "postgresql://nobody@127.0.0.1:9/none")
    process = Limits(away)
    with pytest.raises(DatabaseUnavailable):
        await process.request(limited)
    await process.request(free)
    await process.close()
    await away.close()


async def test_shares_of_many_keys_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(limits, "MOST", 3)
    shares = {}
    for number in range(10):
        limits._of(shares, str(number)).ends = math.inf if number == 9 else 0.0
    assert len(shares) <= 3

"""Transactions: one each, as one tenant, with nothing left on the connection whatever happened in them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import pytest
from msgspec.structs import replace
from sqlalchemy import text

from app import roundtrip
from app.database import Database
from app.errors import TimedOut
from app.statements import Statement

WHO = Statement(
    "who",
    "select current_user as role, current_setting('pgrecall.tenant_id', true) as tenant, "
    "current_setting('statement_timeout') as timeout, txid_current() as transaction",
    {},
)
SLEEP = Statement("sleep", "select pg_sleep(5)", {})
PATIENT = {"statement_timeout": "60s"}
INSERT = text("insert into sources (tenant_id, id, content) values ('acme', 'a', 'x')")


@pytest.fixture
async def single(settings) -> AsyncIterator[Database]:
    """A database with one connection, so that the next use meets what the last one left."""
    opened = Database(replace(settings, pool_size=1), settings.database_url)
    yield opened
    await opened.close()


async def test_a_fetch_is_one_transaction_and_leaves_nothing_behind(single):
    (one,), (two,) = await single.fetch("acme", [WHO, WHO])
    assert (one["role"], one["tenant"], one["timeout"]) == ("pgrecall_app", "acme", "100s")
    assert one["transaction"] == two["transaction"]
    async with single._primary.lend() as lent:
        assert lent.search_path == {}  # only where the session's own does not find pgvector
        raw = lent.driver
        left = await (await raw.execute(WHO.sql)).fetchone()
        assert left[:3] == ("pgrecall_service", "", "0")
        assert raw.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


async def test_a_fetch_is_one_round_trip(single):
    await single.fetch("acme", [WHO])
    async with single._primary.lend() as lent:
        raw = lent.driver
        waits = []
        original = raw.wait

        async def counted(gen, *rest, **options):
            waits.append(gen.__name__)
            return await original(gen, *rest, **options)

        raw.wait = counted
        await roundtrip.run(raw, lent.prepared, {"role": "pgrecall_app"}, [WHO, WHO])
        del raw.wait
    assert waits == ["_answers"]


async def test_an_error_in_a_fetch_does_not_spoil_the_connection(single):
    bad = Statement("bad", "select 1 / %(n)s::int as q", {"n": 0})
    for _ in range(6):
        with pytest.raises(psycopg.errors.DivisionByZero):
            await single.fetch("acme", [WHO, bad, WHO])
        ((row,),) = await single.fetch("umbra", [WHO])
        assert row["tenant"] == "umbra"


async def test_neither_does_the_time_limit(settings):
    hasty = Database(replace(settings, pool_size=1, statement_timeout=0.1), settings.database_url)
    with pytest.raises(TimedOut):
        await hasty.fetch("acme", [SLEEP])
    ((row,),) = await hasty.fetch("umbra", [WHO], PATIENT)
    assert row["tenant"] == "umbra"
    await hasty.close()


@pytest.mark.parametrize("delay", [0.001, 0.003, 0.01, 0.1])
async def test_neither_does_a_caller_that_goes_away(single, delay):
    await single.fetch("acme", [WHO])
    asked = asyncio.create_task(single.fetch("acme", [WHO, SLEEP, WHO]))
    await asyncio.sleep(delay)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    ((row,),) = await single.fetch("umbra", [WHO])
    assert row["tenant"] == "umbra"


async def test_a_write_that_fails_leaves_nothing_and_one_that_ends_is_there(single, owner):
    async def broken():
        async with single.write("acme") as connection:
            await connection.execute(INSERT)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await broken()
    assert owner.execute("select count(*) from sources").fetchone() == (0,)
    async with single.write("acme") as connection:
        await connection.execute(INSERT)
        assert owner.execute("select count(*) from sources").fetchone() == (0,)
    assert owner.execute("select count(*) from sources").fetchone() == (1,)
    ((row,),) = await single.fetch("umbra", [WHO])
    assert row["tenant"] == "umbra"


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.001, 0.05])
async def test_a_pipeline_that_was_cut_short_poisons_nothing_that_follows(single, before, delay):
    for _ in range(before):
        await single.fetch("acme", [WHO])
    asked = asyncio.create_task(single.fetch("acme", [SLEEP, WHO] if delay == 0.05 else [WHO]))
    await asyncio.sleep(delay)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    for _ in range(6):
        ((row,),) = await single.fetch("umbra", [WHO])
        assert (row["role"], row["tenant"]) == ("pgrecall_app", "umbra")


async def test_an_error_before_other_statements_poisons_nothing_that_follows(single):
    bad = Statement("bad", "select 1 / %(n)s::int as q", {"n": 0})
    for _ in range(5):
        with pytest.raises(psycopg.errors.DivisionByZero):
            await single.fetch("acme", [bad, WHO])
    for _ in range(6):
        ((row,),) = await single.fetch("umbra", [WHO])
        assert row["tenant"] == "umbra"


async def test_a_server_that_does_not_answer_is_not_waited_for(settings):
    hasty = Database(replace(settings, pool_size=1, statement_timeout=0.1), settings.database_url)
    with pytest.raises(TimedOut):
        await hasty.fetch("acme", [SLEEP], {"statement_timeout": "0"})
    ((row,),) = await hasty.fetch("umbra", [WHO], PATIENT)
    assert row["tenant"] == "umbra"
    await hasty.close()

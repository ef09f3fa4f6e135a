"""Behind a PgBouncer that gives out one session by the transaction: nothing stays on it, nobody meets another's."""

import asyncio
import contextlib
import json
import logging
import re

import psycopg
import pytest
from msgspec.structs import replace

from app import commands, local, pool, telemetry
from app.database import Database
from app.embedding import open_embedder
from app.worker import Worker
from tests import pgbouncer
from tests.isolation.worlds import serving

PROGRAM = pgbouncer.found()
WITHOUT = "no PgBouncer on PATH (Debian: apt install pgbouncer); PGRECALL_TEST_PGBOUNCER names one elsewhere"
KNOWS_PREPARED = PROGRAM is not None and pgbouncer.version(PROGRAM) >= (1, 22)

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WITHOUT)


@pytest.fixture(
    scope="module",
    params=[
        0,
        pytest.param(50, marks=pytest.mark.skipif(not KNOWS_PREPARED, reason="this PgBouncer is older than 1.22")),
    ],
    ids=["without-prepared", "with-prepared"],
)
def pooler(request, server):
    with pgbouncer.running(PROGRAM, server, local.SERVICE, prepared=request.param, connections=1) as running:
        yield running


@pytest.fixture
def settings(settings, pooler, database_name):
    """As they are without anybody having thought of a pooler."""
    url = pooler.url(database_name, local.SERVICE)
    return replace(settings, database_url=url, prepared_statements=True, worker_poll=0.2)


def session(settings):
    """What is left on the only session there is."""
    with psycopg.connect(settings.database_url, autocommit=True) as connection:
        return pgbouncer.left(connection)


REQUESTS = [
    ("PUT", "/documents/a", {"tenant_id": "acme", "content": "Otters swim in rivers."}),
    ("PUT", "/documents/later?wait=false", {"tenant_id": "acme", "content": "Badgers dig."}),
    (
        "POST",
        "/documents",
        {"tenant_id": "acme", "documents": [{"id": f"b{n}", "content": f"No {n}"} for n in range(9)]},
    ),
    ("GET", "/documents/a?tenant_id=acme", None),
    ("GET", "/documents?tenant_id=acme", None),
    ("GET", "/documents/missing?tenant_id=acme", None),
    ("PUT", "/documents/a", {"tenant_id": "acme", "content": 7}),
    ("POST", "/search", {"tenant_id": "acme", "query": "otters"}),
    ("POST", "/search", {"tenant_id": "acme", "query": "otters", "explain": True}),
    ("POST", "/search", {"tenant_id": "acme", "query": "otters", "mode": "hybrid"}),
    ("POST", "/search", {"tenant_id": "acme", "query": "otters", "mode": "text"}),
    ("POST", "/search", {"tenant_id": "acme", "embedding": [1.0, 2.0]}),
    (
        "POST",
        "/search/batch",
        {"searches": [{"tenant_id": "acme", "query": "x"}, {"tenant_id": "umbra", "query": "y"}]},
    ),
    ("POST", "/rag", {"tenant_id": "acme", "question": "Who swims?"}),
    ("POST", "/rag", {"tenant_id": "acme", "question": "Who swims?", "stream": True}),
    ("GET", "/status?tenant_id=acme", None),
    ("POST", "/queue/retry", {"tenant_id": "acme"}),
    ("GET", "/admin/tenants", None),
    ("GET", "/admin/keys", None),
    ("DELETE", "/documents/b1?tenant_id=acme", None),
    ("DELETE", "/documents?tenant_id=acme&doc_type=none", None),
    ("DELETE", "/tenants/acme", None),
    ("GET", "/health/ready", None),
]


def test_pgbouncer_takes_the_settings_of_the_page(root, server):
    page = (root / "docs/poolers.md").read_text()
    (section,) = re.findall(r"^\[pgbouncer\]\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    # As PgBouncer reads them: all behind the equals sign is the value.
    lines = [line.partition("=") for line in section.splitlines() if not line.startswith(";")]
    shown = {name.strip(): value.strip() for name, _, value in lines}
    assert shown["pool_mode"] == "transaction"
    if not KNOWS_PREPARED:
        del shown["max_prepared_statements"]
    with pgbouncer.running(PROGRAM, server, local.SERVICE, more=shown) as running:
        assert running.port


async def test_every_request_leaves_the_session_as_it_was(client, settings, app):
    for _ in range(4):  # from the third on statements are prepared
        for method, path, body in REQUESTS:
            answer = await client.request(method, path, json=body)
            assert answer.status_code < 500, (path, answer.text)
            assert await asyncio.to_thread(session, settings) == {}, path
    # Every route there is has been asked for.
    paths = {path.partition("?")[0] for _, path, _ in REQUESTS}
    named = {path for path in app.openapi_schema.paths if "{" not in path} - {"/documents/stream", "/health/live"}
    assert named <= paths


async def test_a_stream_and_a_caller_that_goes_away_leave_it_so_too(client, settings, app):
    lines = b"".join(json.dumps({"id": f"d{n}", "content": f"No {n} is here."}).encode() + b"\n" for n in range(50))
    headers = {"Content-Type": "application/x-ndjson"}
    answer = await client.post("/documents/stream?tenant_id=acme", content=lines, headers=headers)
    assert answer.status_code == 200
    assert await asyncio.to_thread(session, settings) == {}
    for delay in (0.0, 0.001, 0.005, 0.02):
        asked = asyncio.create_task(client.post("/search", json={"tenant_id": "acme", "query": "No 7"}))
        await asyncio.sleep(delay)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        assert await asyncio.to_thread(session, settings) == {}


async def test_where_every_session_is_taken_writes_and_searches_are_told_to_come_again(settings, server, database_name):
    with pgbouncer.running(PROGRAM, server, local.SERVICE, connections=1, patience=1) as busy:
        url = busy.url(database_name, local.SERVICE)
        async with serving(replace(settings, database_url=url, statement_timeout=1.0)) as client:
            with psycopg.connect(url) as taken:
                taken.execute("select 1")
                body = {"tenant_id": "acme", "content": "Otters swim."}
                put = await client.put("/documents/a", json=body)
                found = await client.post("/search", json={"tenant_id": "acme", "embedding": [1.0] * 64})
            assert (put.status_code, found.status_code) == (503, 503), (put.text, found.text)
            assert "retry-after" in put.headers
            assert (await client.put("/documents/a", json=body)).status_code == 201


async def test_a_pooler_that_has_no_session_to_give_is_not_waited_for(settings, server, database_name, monkeypatch):
    """PgBouncer's own patience is 120 s."""
    with pgbouncer.running(PROGRAM, server, local.SERVICE, connections=1) as busy:
        url = busy.url(database_name, local.SERVICE)
        body = {"tenant_id": "acme", "content": "Otters swim."}
        search = {"tenant_id": "acme", "embedding": [1.0] * 64}
        async with serving(replace(settings, database_url=url)) as client:
            for known in (False, True):  # the connections to the pooler, at first there are none
                with psycopg.connect(url) as taken, monkeypatch.context() as patched:
                    taken.execute("select 1")
                    patched.setattr(pool.Pool, "patience", 0.3)
                    asked = (
                        client.put("/documents/a", json=body),
                        client.delete("/documents/b", params={"tenant_id": "acme"}),
                        client.post("/search", json=search),
                    )
                    for answer in await asyncio.gather(*asked):
                        assert answer.status_code == 504, answer.text
                        assert "in time" in answer.json()["detail"]
                assert (await client.put("/documents/a", json=body)).status_code == (200 if known else 201)
                assert (await client.post("/search", json=search)).status_code == 200


async def test_two_tenants_on_one_session_never_meet(client, settings, owner):
    for tenant in ("acme", "umbra"):
        documents = [{"id": f"{tenant}-{n}", "content": f"The otter number {n} of {tenant}."} for n in range(5)]
        await client.post("/documents", json={"tenant_id": tenant, "documents": documents})

    async def ask(number: int) -> None:
        tenant = ("acme", "umbra")[number % 2]
        mode = ("vector", "text", "hybrid")[number % 3]
        answer = await client.post("/search", json={"tenant_id": tenant, "query": "otter number", "mode": mode})
        ids = [hit["id"] for hit in answer.json()["results"]]
        assert len(ids) == 5
        assert all(found.startswith(tenant) for found in ids)

    await asyncio.gather(*(ask(number) for number in range(60)))


async def test_prepared_statements_are_used_where_the_pooler_follows_them(settings, pooler, caplog):
    telemetry.set_up(settings)
    caplog.set_level(logging.INFO)
    logging.getLogger().addHandler(caplog.handler)
    first, second = (Database(settings, settings.database_url) for _ in range(2))
    for database in (first, second):
        async with database._primary.lend() as lent:
            assert (lent.prepared is not None) == pooler.prepared
            assert (lent.driver.prepare_threshold is not None) == pooler.prepared
        await database.close()
    assert ("does not keep track of prepared statements" in caplog.text) == (not pooler.prepared)


async def test_a_worker_polls_behind_it_and_is_woken_where_it_is_told_the_servers_own_address(
    client, settings, cluster, database_name, owner
):
    async def put_and_wait(document_id: str, working) -> None:
        embedder, database = open_embedder(working), Database(working, working.database_url)
        task = asyncio.create_task(Worker(database, embedder, working).run())
        await asyncio.sleep(1)
        body = {"tenant_id": "acme", "content": f"Otters swim: {document_id}."}
        await client.put(f"/documents/{document_id}?wait=false", json=body)
        state = "select state from sources where id = %s"
        async with asyncio.timeout(60):
            while owner.execute(state, (document_id,)).fetchone() != ("ready",):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await database.close()
        await embedder.aclose()

    await put_and_wait("polled", settings)
    assert await asyncio.to_thread(session, settings) == {}
    direct = cluster.url(database_name, local.SERVICE)
    await put_and_wait("rung", replace(settings, worker_poll=3600, listen_url=direct))
    assert await asyncio.to_thread(session, settings) == {}


def test_commands_leave_nothing_either(settings):
    assert commands.stored(settings) == []
    assert session(settings) == {}


async def test_a_session_that_something_is_left_on_is_seen(settings):
    for statement, what in (
        ("set lock_timeout = '4s'", "settings of the session"),
        ("listen pgrecall_pending", "channels"),
        ("select pg_advisory_lock(7)", "advisory locks"),
        ("set pgrecall.tenant_id = 'acme'", "tenant"),
        ("set role pgrecall_app", "role"),
    ):
        with psycopg.connect(settings.database_url, autocommit=True) as connection:
            connection.execute(statement, prepare=False)
        assert what in session(settings)
        with psycopg.connect(settings.database_url, autocommit=True) as connection:
            connection.execute("reset role", prepare=False)
            connection.execute("discard all", prepare=False)
        assert session(settings) == {}

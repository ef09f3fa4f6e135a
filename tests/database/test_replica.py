"""A streaming replica: searches run there while it keeps up, and on the primary when it does not or is not there."""

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from litestar.testing import AsyncTestClient

from app import embedded, local, questions, replica, schema, search
from app.asgi import create_app
from app.database import Database
from app.drafts import Draft
from app.embedding import Embedder, open_embedder
from app.errors import ModelMismatch, SetupError
from app.replica import Standing
from app.statements import Statement
from app.upsert import put
from tests.conftest import PATIENCE, Cluster, settings_for

pytestmark = pytest.mark.skipif(
    os.environ.get("PGRECALL_TEST_POSTGRES", "embedded") != "embedded",
    reason="makes two servers of the embedded PostgreSQL, which were not asked for",
)

WHERE = Statement("where", "select pg_is_in_recovery() as replica", {})


@dataclass
class Standby:
    """A copy of the primary that replays its log; `admin` is a superuser's URL."""

    data: Path
    pgdata: Path
    options: str

    @property
    def cluster(self) -> Cluster:
        return Cluster(f"postgresql://postgres@/postgres?host={self.pgdata}&port=5432")

    def start(self) -> None:
        embedded._run(self.data, self.pgdata, "pg_ctl", "start", "-w", "-s", "-o", self.options)

    def stop(self) -> None:
        embedded._run(self.data, self.pgdata, "pg_ctl", "stop", "-w", "-s", "-m", "immediate")

    def run(self, statement: str) -> None:
        with psycopg.connect(self.cluster.admin, autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture(scope="module")
def primary() -> Iterator[Cluster]:
    """A server of its own: the one all tests share writes too much to be followed."""
    data = Path(tempfile.mkdtemp(prefix="pgrecall-primary-"))
    with contextlib.closing(embedded.start(data, durable=False)) as server:
        cluster = Cluster(server.url())
        local.bootstrap(cluster.admin, "app")
        schema.migrate(settings_for(None, "http://127.0.0.1:9/v1", migration_url=cluster.url("app", local.OWNER)))
        with psycopg.connect(cluster.admin, autocommit=True) as admin:
            admin.execute("alter system set wal_keep_size = '256MB'")
            admin.execute("select pg_reload_conf()")
        yield cluster
    shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def standby(primary: Cluster) -> Iterator[Standby]:
    folder = Path(tempfile.mkdtemp(prefix="pgrecall-standby-"))
    options = f"-c fsync=off -c max_connections=200 -c listen_addresses='' -c unix_socket_directories={folder / 'p'}"
    made = Standby(folder, folder / "p", options)
    made.pgdata.mkdir()
    if os.geteuid() == 0:
        user = embedded._system_user()
        os.chown(made.pgdata, user.pw_uid, user.pw_gid)
    embedded._run(
        folder, made.pgdata, "pg_basebackup", "-RN", "-c", "fast", "-d", primary.admin, "-D", str(made.pgdata)
    )
    made.pgdata.chmod(0o700)
    (made.pgdata / ".s.PGSQL.5432.lock").unlink()  # the primary's
    made.start()
    yield made
    with contextlib.suppress(SetupError):  # a test may have stopped it
        made.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings(primary, standby, openai):
    return settings_for(
        primary.url("app", local.SERVICE),
        openai.url,
        database_read_url=standby.cluster.url("app", local.SERVICE),
        migration_url=primary.url("app", local.OWNER),
        replica_lag=1.0,
    )


@pytest.fixture
async def database(settings) -> AsyncIterator[Database]:
    opened = Database(settings, settings.database_url)
    yield opened
    await opened.close()


@pytest.fixture
async def embedder(settings):
    opened = open_embedder(settings)
    yield opened
    await opened.aclose()


async def eventually(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await holds():  # noqa: ASYNC110  what is waited for happens in servers
            await asyncio.sleep(0.1)


async def level(database: Database, embedder: Embedder) -> bool:
    return (await schema.check(database, embedder)).replica == Standing("serving", 0.0)


async def on_replica(database: Database) -> bool:
    ((row,),) = await database.fetch("acme", [WHERE])
    return row["replica"]


async def test_searches_read_from_the_replica_while_it_keeps_up(settings, database, embedder, standby):
    await eventually(lambda: level(database, embedder))
    await put(database, embedder, settings, "acme", [Draft("otter", "Otters eat fish.")])
    await eventually(lambda: on_replica(database))
    question = await questions.vector(embedder, "Otters eat fish.")

    async def seen():
        return [hit.id for hit in (await search.search(database, settings, "acme", question)).hits] == ["otter"]

    await eventually(seen)
    ((row,),) = await database.fetch("acme", [WHERE], primary=True)
    assert not row["replica"]

    # Replay that stands still and a primary that writes: behind, until it goes on.
    standby.run("select pg_wal_replay_pause()")
    await put(database, embedder, settings, "acme", [Draft("heron", "Herons eat fish.")])

    async def found():
        return {hit.id for hit in (await search.search(database, settings, "acme", question)).hits}

    async def behind():
        return await found() == {"otter", "heron"} and database.replica.standing.state == "behind"

    await eventually(behind)
    async with AsyncTestClient(create_app(settings)) as client:
        answer = (await client.get("/health/ready")).json()
    assert answer["status"] == "ready"
    assert (answer["replica"]["state"], answer["replica"]["lag"] > 1.0) == ("behind", True)
    standby.run("select pg_wal_replay_resume()")
    await eventually(lambda: on_replica(database))
    assert await found() == {"otter", "heron"}


async def test_an_idle_primary_is_no_lag_and_a_replica_cut_off_is(settings, database, embedder, standby, primary):
    await schema.check(database, embedder)
    with psycopg.connect(primary.url("app", local.OWNER), autocommit=True) as owner:
        owner.execute("insert into embedding_models (name, dimensions, state) values ('old', 1, 'retired')")
        await asyncio.sleep(1.5)  # longer than the limit, with nothing written
        await eventually(lambda: level(database, embedder))
        standby.run("alter system set primary_conninfo = 'host=/nowhere'")
        standby.run("select pg_reload_conf()")
        with psycopg.connect(standby.cluster.admin, autocommit=True) as admin:

            async def alone():
                return admin.execute("select from pg_stat_wal_receiver").fetchone() is None

            await eventually(alone)
        owner.execute("delete from embedding_models where name = 'old'")

        async def behind():
            return (await schema.check(database, embedder)).replica.state == "behind"

        await eventually(behind)
        assert not await on_replica(database)


async def test_a_replica_that_is_gone_is_done_without_and_found_again(settings, database, embedder, standby):
    await schema.check(database, embedder)
    await eventually(lambda: on_replica(database))
    standby.stop()
    assert not await on_replica(database)
    async with AsyncTestClient(create_app(settings)) as client:  # starts without it, too
        assert (await client.get("/health/ready")).json()["replica"] == {"state": "unreachable", "lag": None}
        found = await client.post("/search", json={"tenant_id": "umbra", "query": "fish"})
        assert found.json()["results"] == []
    standby.start()
    await eventually(lambda: on_replica(database))


async def test_a_search_that_replay_interrupts_is_answered_by_the_primary(database, embedder, standby, primary, caplog):
    standby.run("alter system set max_standby_streaming_delay = '0'")
    standby.run("select pg_reload_conf()")
    await schema.check(database, embedder)
    caplog.set_level(logging.INFO)
    slow = Statement(
        "slow",
        "select pg_is_in_recovery() as replica, case when pg_is_in_recovery() then pg_sleep(600) end, count(*) "
        "from tenant_sources",
        {},
    )
    asked = asyncio.create_task(database.fetch("acme", [slow]))
    asleep = "select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'"
    with psycopg.connect(standby.cluster.url("app", "postgres"), autocommit=True) as admin:

        async def reading():
            return admin.execute(asleep).fetchone() is not None

        await eventually(reading)
    with psycopg.connect(primary.url("app", local.OWNER), autocommit=True) as owner:
        owner.execute("begin; lock table sources in access exclusive mode; commit")
    (((row),),) = await asked
    assert not row["replica"]
    assert "the primary answers it" in caplog.text
    assert database.replica.standing.state == "serving"


async def test_measurements_are_made_beside_requests_and_not_by_each(database, embedder, monkeypatch):
    await schema.check(database, embedder)
    looks = []
    original = database.replica._replayed

    async def counted():
        looks.append(1)
        return await original()

    monkeypatch.setattr(database.replica, "_replayed", counted)
    monkeypatch.setattr(replica, "EVERY", 3_600.0)
    for _ in range(20):
        await database.fetch("acme", [WHERE])
    assert looks == []


async def test_a_replica_of_another_database_is_refused_at_start_and_never_read_from(
    primary, cluster, database_name, openai
):
    with psycopg.connect(cluster.url(database_name, local.OWNER), autocommit=True) as owner:
        owner.execute("update embedding_models set name = 'another'")
    elsewhere = cluster.url(database_name, local.SERVICE)
    settings = settings_for(primary.url("app", local.SERVICE), openai.url, database_read_url=elsewhere)
    database, embedder = Database(settings, settings.database_url), open_embedder(settings)
    with pytest.raises(ModelMismatch):
        await schema.check(database, embedder)
    assert database.replica.standing == Standing("unfit")
    ((row,),) = await database.fetch("acme", [Statement("db", "select current_database() as name", {})])
    assert row["name"] == "app"
    await database.close()
    await embedder.aclose()

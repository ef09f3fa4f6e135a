"""A real PostgreSQL for every test: the embedded one, a container or a URL, migrated once and cloned per test.

PGRECALL_TEST_POSTGRES: `embedded` (default), `container`, or the URL of a superuser. PGRECALL_TEST_PGBOUNCER: the service
reaches it through this program (tests/pgbouncer.py).
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from msgspec.structs import replace
from psycopg import sql

from app import embedded, local, schema, spaces
from app.database import Database
from app.embedding import Embedder, open_embedder
from app.settings import Settings
from tests import pgbouncer
from tests.openai_server import OpenAIServer

for _name in [name for name in os.environ if name.startswith(("PGRECALL_", "OPENAI_", "DATABASE_"))]:
    if not _name.startswith("PGRECALL_TEST_"):
        del os.environ[_name]
# Run by nohup or in the background of a script, pytest ignores these, and so would all processes that tests start and stop.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start need not all compile the package

THOROUGH = int(os.environ.get("THOROUGH", "1"))
"""How many times the usual number of examples property tests try; `make test-long` sets it."""

PATIENCE = 100.0
"""Seconds after which something that should happen soon has not, on a machine busy with other things."""

DIMENSIONS = 64
"""Short vectors keep tests quick; tests about other lengths make a database of their own."""


@pytest.fixture
def openai() -> Iterator[OpenAIServer]:
    """An OpenAI-protocol server: records its calls, fails on demand."""
    with OpenAIServer() as server:
        yield server


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL server: `admin` is a superuser's URL. `pooler`: what the service reaches it through."""

    admin: str
    pooler: pgbouncer.Pooler | None = None

    def url(self, database: str, user: str | None = None) -> str:
        """The same server, another database or login. Logins made by the tests share the superuser's password."""
        parts = urlsplit(self.admin)
        netloc = parts.netloc
        if user is not None:
            _, _, password = netloc.rpartition("@")[0].partition(":")
            netloc = f"{user}{':' + password if password else ''}@{netloc.rpartition('@')[2]}"
        return urlunsplit(parts._replace(netloc=netloc, path=f"/{database}"))

    def service(self, database: str) -> str:
        """The service's DATABASE_URL for a database."""
        return self.pooler.url(database, local.SERVICE) if self.pooler else self.url(database, local.SERVICE)


def passwords(cluster: Cluster, *logins: str) -> None:
    """Give logins the superuser's password, where the server asks for one."""
    password = urlsplit(cluster.admin).password
    if password is None:
        return
    with psycopg.connect(cluster.admin, autocommit=True) as connection:
        for login in logins or (local.OWNER, local.SERVICE, local.ANALYST):
            connection.execute(
                sql.SQL("alter role {} password {}").format(sql.Identifier(login), sql.Literal(password))
            )


@pytest.fixture(scope="session")
def cluster(server: str) -> Iterator[Cluster]:
    """The server all tests share, and the pooler before it where one is wanted."""
    program = pgbouncer.wanted()
    if program is None:
        yield Cluster(server)
        return
    with pgbouncer.running(program, server, local.SERVICE, prepared=pgbouncer.prepared()) as pooler:
        yield Cluster(server, pooler)


def _roomy() -> str:
    """Memory where there is much of it: the database of each test is some four hundred files."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 4 << 30 else tempfile.gettempdir()


@pytest.fixture(scope="session")
def server(testrun_uid: str) -> Iterator[str]:
    """A superuser's URL on the server all tests and all xdist workers share."""
    kind = os.environ.get("PGRECALL_TEST_POSTGRES", "embedded")
    if kind == "embedded":
        # Not in pytest's folder, of which it keeps only the last three: several runs at once would lose their database.
        data = Path(_roomy(), f"pgrecall-tests-{testrun_uid}")
        with contextlib.closing(embedded.start(data, durable=False)) as server:
            yield server.url()
        if not (data / "postgres/postmaster.pid").exists():
            shutil.rmtree(data, ignore_errors=True)
    elif kind == "container":
        from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415  only this mode needs Docker

        with PostgresContainer("pgvector/pgvector:pg18", driver=None) as container:
            yield container.get_connection_url()
    else:
        yield kind


@pytest.fixture(scope="session")
def ready_data() -> Iterator[Path]:
    """The data folder of an embedded database that is migrated for the local model, and stopped: to be copied."""
    with tempfile.TemporaryDirectory(prefix="pgrecall-ready-") as folder:
        data = Path(folder, "data")
        with contextlib.closing(embedded.start(data, durable=False)), schema.provided(Settings(data_dir=str(data))):
            pass
        yield data


@contextlib.contextmanager
def started_copy(ready_data: Path, data: Path) -> Iterator[Path]:
    """A copy, up for as long as the block lasts, as beside a running server."""
    subprocess.run(["cp", "-a", ready_data, data], check=True)
    with contextlib.closing(embedded.start(data, durable=False)):
        yield data


@pytest.fixture(scope="session")
def contrib(cluster: Cluster) -> bool:
    """Whether the server has btree_gin, which is in PostgreSQL's contrib package."""
    with psycopg.connect(cluster.admin) as connection:
        found = connection.execute("select from pg_available_extensions where name = 'btree_gin'").fetchone()
        return found is not None


NEEDS_CONTRIB = "this server is without contrib, where btree_gin is from"


def statements(printed: str, contrib: bool) -> list[str]:
    """What `--sql` printed, one at a time as psql runs it, without what it says to leave out on a server without contrib."""
    several = [statement for statement in printed.split(";\n\n") if statement.strip()]
    return [
        statement for statement in several if contrib or "-- Only where the extension btree_gin is:" not in statement
    ]


def settings_for(url: str | None, openai_url: str, **changes: object) -> Settings:
    """Settings of a service on `url` with an OpenAI-protocol server behind it."""
    values: dict[str, object] = {
        "database_url": url,
        "openai_api_key": "sk-test",
        "openai_base_url": openai_url,
        "embedding_model": "text-embedding-3-small",
        "embedding_dimensions": DIMENSIONS,
        "pool_size": 4,
        # What takes long here, does so because the machine is busy: tests of time limits set their own.
        **dict.fromkeys(("embedding_timeout", "pool_timeout", "statement_timeout"), PATIENCE),
    }
    return Settings(**(values | changes))  # type: ignore[arg-type]


def migrated(cluster: Cluster, name: str, settings: Settings) -> str:
    """A database made and migrated once in the cluster, whoever of several processes comes first."""
    local.bootstrap(cluster.admin, name)
    passwords(cluster)
    schema.migrate(replace(settings, migration_url=cluster.url(name, local.OWNER)))
    return name


@pytest.fixture(scope="session")
def template(cluster: Cluster) -> str:
    """A migrated, empty database to clone."""
    return migrated(cluster, f"template_{DIMENSIONS}", settings_for(None, "http://127.0.0.1:9/v1"))


@contextlib.contextmanager
def cloned(cluster: Cluster, template: str) -> Iterator[str]:
    """A database of its own, gone afterwards. Its name."""
    name = f"test_{secrets.token_hex(6)}"
    statement = sql.SQL("create database {} template {} owner {}").format(
        sql.Identifier(name), sql.Identifier(template), sql.Identifier(local.OWNER)
    )
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                admin.execute(statement)
                break
            except psycopg.errors.ObjectInUse:  # another worker is migrating it
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield name
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def database_name(cluster: Cluster, template: str) -> Iterator[str]:
    with cloned(cluster, template) as name:
        yield name


@pytest.fixture
def owner_url(cluster: Cluster, database_name: str) -> str:
    """The clone as its owner: sees every tenant."""
    return cluster.url(database_name, local.OWNER)


@pytest.fixture
def settings(cluster: Cluster, database_name: str, openai: OpenAIServer) -> Settings:
    """Settings of the service on the clone, as its login."""
    return settings_for(cluster.service(database_name), openai.url)


@pytest.fixture
def owner(owner_url: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A connection as the owner, for looking at what was really stored."""
    with psycopg.connect(owner_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    opened = Database(settings, settings.database_url or "")
    yield opened
    await spaces.close(opened)
    await opened.close()


@pytest.fixture
async def embedder(settings: Settings) -> AsyncIterator[Embedder]:
    opened = open_embedder(settings)
    yield opened
    await opened.aclose()


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent

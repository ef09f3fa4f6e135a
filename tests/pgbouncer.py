"""A PgBouncer in transaction mode before the tests' server, for whoever names its program.

PGRECALL_TEST_PGBOUNCER: its path. PGRECALL_TEST_PGBOUNCER_PREPARED: max_prepared_statements, 0 (the default) for a
PgBouncer that knows none.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import psycopg

SERVER_CONNECTIONS = 4
"""To each database, which is fewer than service, worker and test connect with: whoever comes next meets what is left."""


@dataclass(frozen=True)
class Pooler:
    """One that runs. `prepared`: whether it keeps track of prepared statements."""

    port: int
    prepared: bool

    def url(self, database: str, login: str) -> str:
        """A database of the server behind it."""
        return f"postgresql://{login}@127.0.0.1:{self.port}/{database}"


def version(program: str) -> tuple[int, int]:
    """Such as (1, 18)."""
    printed = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout
    major, minor = printed.split()[1].split(".")[:2]
    return int(major), int(minor)


@contextlib.contextmanager
def running(
    program: str,
    admin_url: str,
    login: str,
    *,
    prepared: int = 0,
    connections: int = SERVER_CONNECTIONS,
    patience: int = 120,
    more: Mapping[str, str] | None = None,
) -> Iterator[Pooler]:
    """PgBouncer before the server of `admin_url`, for one login. `patience`: seconds a client waits for a session.

    `more`: further settings, or other ones.
    """
    server = urlsplit(admin_url)
    asked = parse_qs(server.query)
    host = unquote(asked["host"][0]) if "host" in asked else server.hostname
    port = (asked["port"][0] if "port" in asked else server.port) or 5432
    owner = Path(host).stat().st_uid if host.startswith("/") else os.geteuid()
    if owner == 0:  # PgBouncer refuses to run as root
        owner = 65534
    # Root's own temporary folder may be closed to whom PgBouncer runs as.
    place = "/tmp" if os.geteuid() == 0 else None
    with (
        tempfile.TemporaryDirectory(prefix="pgbouncer-", dir=place) as folder,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        here = free.getsockname()[1]
        free.close()
        Path(folder, "users").write_text(f'"{login}" "{unquote(server.password or "")}"\n')
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": here,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": f"{folder}/users",
            "pool_mode": "transaction",
            "default_pool_size": connections,
            "max_client_conn": 1000,
            "query_wait_timeout": patience,
            "logfile": f"{folder}/log",
        }
        if version(program) >= (1, 21):  # where 200 is the default
            settings["max_prepared_statements"] = prepared
        settings |= more or {}
        written = "".join(f"{name} = {value}\n" for name, value in settings.items())
        Path(folder, "ini").write_text(f"[databases]\n* = host={host} port={port}\n[pgbouncer]\n{written}")
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            for path in (Path(folder), *Path(folder).iterdir()):
                os.chown(path, owner, owner)
            account = {"user": owner, "group": owner, "extra_groups": []}
        # Its standard error is the log once more.
        process = subprocess.Popen(
            [program, "-q", f"{folder}/ini"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **account
        )
        try:
            _await(process, here, Path(folder, "log"))
            yield Pooler(here, bool(prepared))
        finally:
            process.kill()  # SIGTERM would wait for its clients
            process.wait()


def _await(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"PgBouncer did not start: {log.read_text() if log.exists() else 'no log'}")


def wanted() -> str | None:
    """The program the whole suite is to go through."""
    return os.environ.get("PGRECALL_TEST_PGBOUNCER") or None


def prepared() -> int:
    """Its max_prepared_statements."""
    return int(os.environ.get("PGRECALL_TEST_PGBOUNCER_PREPARED", "0"))


def found() -> str | None:
    """The program a few tests try where there is one."""
    return wanted() or shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


LEFT = {
    "settings of the session": "select name, setting from pg_settings where source = 'session' and name not in "
    "('application_name', 'client_encoding')",
    "tenant": "select current_setting('pgrecall.tenant_id', true) where current_setting('pgrecall.tenant_id', true) <> ''",
    "role": "select current_user where current_user <> session_user",
    "temporary tables": "select relname from pg_class where relpersistence = 't' and pg_table_is_visible(oid)",
    "advisory locks": "select objid from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
    "channels": "select pg_listening_channels()",
    "prepared statements": "select name from pg_prepared_statements where name not like 'PGBOUNCER\\_%'",
    "cursors": "select name from pg_cursors",
}
"""What may stay on a session, and how to see it from within. Statements that PgBouncer itself prepares, it keeps track of."""


def left(connection: "psycopg.Connection[tuple[object, ...]]") -> dict[str, list[tuple[object, ...]]]:
    """What is left on the session behind this connection."""
    seen = {what: connection.execute(query.encode(), prepare=False).fetchall() for what, query in LEFT.items()}
    return {what: rows for what, rows in seen.items() if rows}

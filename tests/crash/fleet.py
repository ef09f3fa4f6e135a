"""The processes of a deployment on one machine, started, killed and started again."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from app import embedded
from tests.conftest import PATIENCE


class Fleet:
    """`pgrecall serve` and others on an embedded, durable PostgreSQL; every process keeps it up."""

    def __init__(self, folder: Path, openai_url: str, dimensions: int) -> None:
        self.data_dir = folder / "pg"
        self.folder = folder
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("PGRECALL_", "OPENAI_", "DATABASE_"))
        } | {
            "PGRECALL_DATA_DIR": str(self.data_dir),
            "OPENAI_BASE_URL": openai_url,
            "PGRECALL_EMBEDDING_MODEL": "text-embedding-3-small",
            "PGRECALL_EMBEDDING_DIMENSIONS": str(dimensions),
            "PGRECALL_CHUNK_MAX_TOKENS": "48",
            "PGRECALL_CHUNK_OVERLAP_TOKENS": "16",
            "PGRECALL_LOG_LEVEL": "warning",
            "PGRECALL_WORKER_LEASE": "5",
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.has_workers = False
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.server = embedded.start(self.data_dir)

    def owner_url(self) -> str:
        return self.server.url("pgrecall_owner", "pgrecall")

    def command(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Run `pgrecall …` under a name, in a process group of its own; what it says goes to a file of that name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "app", *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def keep_up(self, workers: bool) -> None:
        """Start what is not running, and wait until the API answers."""
        if not self._alive("api"):
            self.command("api", "serve", "--port", str(self.port), "--workers", random.choice("12"))
        if workers:
            for name in ("worker-1", "worker-2"):
                if not self._alive(name):
                    self.command(name, "worker")
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.address}/health/ready", timeout=5).status_code == 200:
                    return
            assert self._alive("api"), (self.folder / "api.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the API is not ready"
            time.sleep(0.05)

    def _alive(self, name: str) -> bool:
        return name in self.running and self.running[name].poll() is None

    def kill(self, name: str) -> str:
        """SIGKILL a process and its children, or all of PostgreSQL; who that was."""
        if name == "postgres":
            return f"postgres {self._kill_postgres()}"
        if name == "one of several":
            return self._kill_one_of_several()
        process = self.running.get(name)
        if process is None or process.poll() is not None:
            return f"{name} (not running)"
        with contextlib.suppress(ProcessLookupError):
            group = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
            for pid in group:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        return f"{name} {process.pid}"

    def _kill_one_of_several(self) -> str:
        """One process of an API that has several, which its parent replaces."""
        children = [
            each for each in psutil.Process(self.running["api"].pid).children() if "postgres" not in each.name()
        ]
        if not children:
            return self.kill("api")
        children[0].kill()
        return f"api's child {children[0].pid}"

    def postmaster(self) -> int | None:
        """The pid of the running server, None while there is none."""
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError, psutil.Error):
            pid = int((self.data_dir / "postgres/postmaster.pid").read_text().split()[0])
            process = psutil.Process(pid)
            if process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE:
                return pid
        return None

    def _kill_postgres(self) -> str:
        pid = self.postmaster()
        if pid is None:
            return "(not running)"
        with contextlib.suppress(psutil.Error):
            postmaster = psutil.Process(pid)
            for each in [postmaster, *postmaster.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    each.kill()
        return str(pid)

    def close(self) -> None:
        for name in list(self.running):
            self.kill(name)
        self.server.close()

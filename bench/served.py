"""Servers in processes of their own: pgrecall as `pgrecall serve` starts it, the bare handler in the same server."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

from app import server
from app import settings as environment

READY = "serving on "


class Serving(NamedTuple):
    """A server in a process of its own."""

    address: str
    pid: int

    def cpu(self) -> float:
        """Seconds of CPU that it and its workers have used so far."""
        parent = psutil.Process(self.pid)
        return sum(sum(each.cpu_times()[:2]) for each in (parent, *parent.children(recursive=True)))


@contextlib.contextmanager
def process(command: list[str], environ: Mapping[str, str], ready: str = READY) -> Iterator[Serving]:
    """A process that says on standard error where it serves; ends by SIGTERM."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PGRECALL_", "DATABASE_", "OPENAI_"))}
    with subprocess.Popen(command, env=clean | dict(environ), stderr=subprocess.PIPE, text=True) as started:
        said = []
        try:
            for line in started.stderr or ():
                said.append(line)
                if ready in line:
                    yield Serving(line.partition(ready)[2].split(",")[0].split()[0], started.pid)
                    return
            raise SystemExit(f"{' '.join(command)} did not come up:\n{''.join(said[-20:])}")
        finally:
            started.send_signal(signal.SIGTERM)
            started.communicate()


@contextlib.contextmanager
def pgrecall(url: str, workers: int) -> Iterator[Serving]:
    """`pgrecall serve` on a free port."""
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--workers", str(workers)]
    environ = {"DATABASE_URL": url, "PGRECALL_EMBEDDER": "local", "PGRECALL_LOG_LEVEL": "warning", "COLUMNS": "200"}
    with process(command, environ) as serving:
        yield serving


@contextlib.contextmanager
def bare(url: str, searches: str, workers: int) -> Iterator[Serving]:
    """bench/bare.py in pgrecall's own server."""
    command = [sys.executable, "-m", __name__, str(workers)]
    with process(command, {"DATABASE_URL": url, "BENCH_SEARCHES": searches}) as serving:
        yield serving


def main(workers: int) -> int:
    """Serve the bare handler."""

    def told(address: str) -> None:
        print(READY + address, file=sys.stderr, flush=True)

    serve = partial(server.serve, "bench.bare:create_app", host="127.0.0.1", port=0)
    return serve(workers=workers, settings=environment.read(), on_started=told)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

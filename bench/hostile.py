"""What clients that mean no good cost a server, and whether others are served meanwhile.

    python -m bench.hostile [CONNECTIONS]

Starts `pgrecall serve` on an embedded PostgreSQL of its own with the local model, stores some documents and, for each kind of
client, opens CONNECTIONS (1,000) of it for SECONDS while one well-behaved client searches. Prints the resident memory of the
serving process before, at its peak and after, and the searches' latencies.
"""

import contextlib
import itertools
import json
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import httpx
import numpy as np

from bench import served
from tests.openai_server import OpenAIServer

SECONDS = 12
TENANT = "bench"
QUESTION = {"tenant_id": TENANT, "query": "Which animals swim in rivers?", "top_k": 3}
DRIP = 0.5
"""Seconds from one byte of a slow client to the next."""


class Kind(NamedTuple):
    """A kind of client: what it sends at once, what it goes on sending piece by piece, and a share of the connections."""

    first: bytes
    then: bytes = b""
    share: float = 1.0
    reads: bool = True


def _post(path: str, length: int, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return (head + (f"Content-Length: {length}\r\n\r\n" if length else "Transfer-Encoding: chunked\r\n\r\n")).encode()


_RAG = json.dumps({"tenant_id": TENANT, "question": "Which animals swim?", "stream": True}).encode()
_LINES = b'{"id": "x"}\n' * 5_000
_MANY = 15_900_000
KINDS = {
    "idle, nothing asked": Kind(b""),
    "idle after a request": Kind(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "slow heads": Kind(b"POST /search HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"x"),
    "huge heads": Kind(b"POST /search HTTP/1.1\r\nHost: localhost\r\nX-Huge: " + b"x" * 60_000, b"x"),
    "slow bodies": Kind(_post("/search", 10_000) + b'{"tenant_id": "', b"x"),
    "large bodies that stop": Kind(_post("/documents", 16_000_000) + b'{"tenant_id": "' + b"x" * _MANY, share=0.05),
    "answers never read": Kind(_post("/rag", len(_RAG)) + _RAG, share=0.2, reads=False),
    "document streams never read": Kind(
        _post(f"/documents/stream?tenant_id={TENANT}", 0, "application/x-ndjson"),
        b"%x\r\n" % len(_LINES) + _LINES + b"\r\n",
        share=0.2,
        reads=False,
    ),
}


class Crowd:
    """So many clients of a kind; each that is hung up on comes again."""

    def __init__(self, address: str, kind: Kind, count: int) -> None:
        parts = urlsplit(address)
        self._address = (parts.hostname or "", parts.port or 80)
        self._kind = kind
        self._count = max(1, int(count * kind.share))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.opened = self.hung_up = self.open = 0
        self.statuses: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        clients: dict[socket.socket, bytes] = {}
        try:
            while not self._over.is_set():
                began = time.monotonic()
                for client in list(clients):
                    clients[client] = self._advance(client, clients[client])
                    if clients[client] is _GONE:
                        self.hung_up += 1
                        del clients[client]
                        client.close()
                while len(clients) < self._count and not self._over.is_set() and time.monotonic() - began < DRIP:
                    with contextlib.suppress(OSError):
                        clients[self._connect()] = self._kind.first
                        self.opened += 1
                self.open = len(clients)
                self._over.wait(0.01 if any(clients.values()) else DRIP)
        finally:
            for client in clients:
                client.close()

    def _connect(self) -> socket.socket:
        client = socket.socket()
        if not self._kind.reads:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
        client.settimeout(2)
        client.connect(self._address)
        client.setblocking(False)
        return client

    def _advance(self, client: socket.socket, left: bytes) -> bytes:
        """Send what is left, or the next piece; returns what is left then."""
        try:
            if self._kind.reads:
                with contextlib.suppress(BlockingIOError):
                    answer = client.recv(65_536)
                    if answer.startswith(b"HTTP/1.1 "):
                        self.statuses[answer[9:12]] = self.statuses.get(answer[9:12], 0) + 1
                    if not answer:
                        return _GONE
            left = left or self._kind.then
            return left[client.send(left[:1_000_000]) :] if left else left
        except BlockingIOError:
            return left
        except OSError:
            return _GONE


_GONE = b"gone"


class Memory:
    """Resident memory of a process in MB, from Linux's own accounts."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def forget_peak(self) -> None:
        """Count the peak from now on."""
        (self._folder / "clear_refs").write_text("5")

    def read(self) -> tuple[float, float]:
        """Now, and at the most since the peak was forgotten."""
        lines = dict(line.split(":", 1) for line in (self._folder / "status").read_text().splitlines())
        now, most = (int(lines[name].split()[0]) / 1_000 for name in ("VmRSS", "VmHWM"))
        return now, most


class Searches(NamedTuple):
    """Of a well-behaved client: seconds each, and what went wrong with those that failed."""

    seconds: list[float]
    failed: list[str]


def searching(address: str, seconds: float, patience: float = 10) -> Searches:
    """Search, one after the other on new connections, as somebody who comes along does."""
    took: list[float] = []
    failed: list[str] = []
    end = time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() > end:
            return Searches(took, failed)
        began = time.perf_counter()
        try:
            query = {**QUESTION, "query": f"Which animals swim in river {number}?"}
            answer = httpx.post(f"{address}/search", json=query, timeout=patience)
            if answer.status_code != 200:
                failed.append(answer.text)
        except httpx.HTTPError as error:
            failed.append(repr(error))
        took.append(time.perf_counter() - began)
        time.sleep(0.02)
    raise AssertionError


@contextlib.contextmanager
def serving() -> Iterator[tuple[served.Serving, OpenAIServer]]:
    with tempfile.TemporaryDirectory() as folder, OpenAIServer() as chat:
        chat.answer = f"{'x' * 1_000} " * 5_000
        environ = {
            "PGRECALL_DATA_DIR": f"{folder}/pg",
            "PGRECALL_EMBEDDER": "local",
            "OPENAI_BASE_URL": chat.url,
            "PGRECALL_CHAT_MODEL": "bench",
            "PGRECALL_LOG_LEVEL": "error",
            "PGRECALL_BODY_TIMEOUT": "10",
            "COLUMNS": "200",
        }
        with served.process([sys.executable, "-m", "app", "serve", "--port", "0"], environ) as started:
            documents = [{"id": str(n), "content": f"Animal {n} swims in river {n % 7}."} for n in range(200)]
            body = {"tenant_id": TENANT, "documents": documents}
            httpx.post(f"{started.address}/documents", json=body, timeout=120).raise_for_status()
            yield started, chat


def main(count: int) -> None:
    print(
        "clients",
        "open",
        "hung up",
        "answers",
        "RSS before",
        "peak",
        "after",
        "searches",
        "failed",
        "p50 ms",
        "p95 ms",
        "max ms",
        sep="\t",
    )
    # The searches have a process of their own: this one is busy with the crowd and the model.
    with serving() as (started, chat), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        memory = Memory(started.pid)
        pool.submit(searching, started.address, 3).result()
        rows = {"nobody": None, **KINDS}
        for name, kind in rows.items():
            before, _ = memory.read()
            memory.forget_peak()
            with contextlib.ExitStack() as stack:
                crowd = stack.enter_context(Crowd(started.address, kind, count)) if kind else None
                found = pool.submit(searching, started.address, SECONDS).result()
                _, peak = memory.read()
                crowded = (crowd.open, crowd.hung_up, crowd.statuses) if crowd else (0, 0, {})
            time.sleep(11)  # within PGRECALL_BODY_TIMEOUT all that is left over is
            after, _ = memory.read()
            p50, p95, most = (1_000 * value for value in np.percentile(found.seconds, [50, 95, 100]))
            statuses = " ".join(f"{status.decode()}:{n}" for status, n in sorted(crowded[2].items()))
            held = sum(not call.ended.is_set() for call in chat.chat_calls)
            print(
                name, *crowded[:2], statuses or "-", f"{before:.0f}", f"{peak:.0f}", f"{after:.0f}", len(found.seconds), len(found.failed),
                f"{p50:.0f}", f"{p95:.0f}", f"{most:.0f}", f"upstream calls held: {held}" if chat.chat_calls else "", sep="\t", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000)

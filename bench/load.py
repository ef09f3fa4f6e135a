"""The HTTP load: a process of its own that sends requests made beforehand over kept connections and times the answers.

One thread and epoll: each connection has one request under way. A request costs it about 30 µs, so that it can send ten
times what the servers here answer; `cpu` in a sample says what it took. Requests are bytes before the turn begins, and
answers are kept, not looked into, until it is over.
"""

import contextlib
import multiprocessing
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec

from bench.timing import Sample

PATIENCE = 60.0
"""Seconds without any answer after which a turn is given up."""


class Outcome(NamedTuple):
    """A turn, and the last body that answered each request, by the request's number."""

    sample: Sample
    bodies: dict[int, bytes]


def request(url: str, body: Mapping[str, Any] | None = None) -> bytes:
    """One HTTP/1.1 request: POST of JSON, GET without a body."""
    parts = urlsplit(url)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    if body is None:
        return f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    content = msgspec.json.encode(body)
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class _Client:
    """One connection and what it is in the middle of."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.began = 0.0
        self.number = 0
        self.received = b""

    def send(self, number: int, content: bytes) -> None:
        self.number, self.received = number, b""
        self.began = time.perf_counter()
        self.socket.sendall(content)

    def receive(self) -> bytes | None:
        """The body once it is whole. Raises RuntimeError for anything but a 200."""
        part = self.socket.recv(1 << 18)
        self.received += part
        head, found, body = self.received.partition(b"\r\n\r\n")
        if found:
            start = head.lower().index(b"content-length:") + len(b"content-length:")
            length = int(head[start:].split(b"\r\n", 1)[0])
            if len(body) == length:
                if not head.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"{head.splitlines()[0].decode()}: {body.decode()[:500]}")
                return body
        if not part:
            raise RuntimeError(f"the server hung up after {self.received[:200]!r}")
        return None


def turn(address: tuple[str, int], requests: Sequence[bytes], clients: int, seconds: float) -> Outcome:
    """Every client sends one request after the other until the turn is over; seconds 0 sends each request once."""
    latencies: list[float] = []
    bodies: dict[int, bytes] = {}
    following = iter(range(len(requests)) if not seconds else _endless(len(requests)))
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:
        crowd = [_Client(address) for _ in range(clients)]
        for client in crowd:
            opened.enter_context(contextlib.closing(client.socket))
            selector.register(client.socket, selectors.EVENT_READ, client)
        cpu, start = time.process_time(), time.perf_counter()
        end = start + (seconds or PATIENCE * len(requests))
        busy = 0
        for client in crowd:
            number = next(following, None)
            if number is not None:
                client.send(number, requests[number])
                busy += 1
        while busy:
            ready = selector.select(PATIENCE)
            if not ready:
                raise RuntimeError(f"no answer in {PATIENCE:g} s")
            for key, _ in ready:
                client = key.data
                body = client.receive()
                if body is None:
                    continue
                now = time.perf_counter()
                latencies.append(now - client.began)
                bodies[client.number] = body
                number = next(following, None) if now < end else None
                if number is None:
                    busy -= 1
                else:
                    client.send(number, requests[number])
        return Outcome(Sample(latencies, time.perf_counter() - start, time.process_time() - cpu), bodies)


def _endless(count: int) -> Iterator[int]:
    while True:
        yield from range(count)


def _work(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            asked = pipe.recv()
            try:
                pipe.send(turn(*asked))
            except Exception as error:  # noqa: BLE001  told to the parent, which raises it
                pipe.send(error)


class Load:
    """The process; `turn` runs one there."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def turn(self, base: str, requests: Sequence[bytes], clients: int, seconds: float) -> Outcome:
        """As `turn`, against the server at `base` (`http://127.0.0.1:8000`)."""
        parts = urlsplit(base)
        self._pipe.send(((parts.hostname, parts.port), list(requests), clients, seconds))
        outcome = self._pipe.recv()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

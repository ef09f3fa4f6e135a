import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from app import server
from app.api.front import hosts
from app.api.head import MAX_HEAD
from app.errors import SetupError
from app.settings import Settings
from tests.api.served_app import BODY_LIMIT
from tests.conftest import PATIENCE

HEADER_TIMEOUT = 1
BODY_TIMEOUT = 3


@dataclass
class Served:
    """tests/api/served_app.py, served by a process of its own."""

    process: subprocess.Popen[str]
    log: Path
    errors: Path
    address: str = ""

    def connect(self) -> socket.socket:
        parts = urlsplit(self.address)
        return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.address + path, timeout=PATIENCE)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@contextmanager
def start(folder: Path, workers: int = 1, **environment: str) -> Iterator[Served]:
    log, errors = folder / "log", folder / "errors"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "tests.api.served_app", str(workers)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "SERVED_LOG": str(log), **environment},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield Served(process, log, errors)
        finally:
            process.kill()


@contextmanager
def serve(folder: Path, workers: int = 1, **environment: str) -> Iterator[Served]:
    with start(folder, workers, **environment) as served:
        assert served.process.stdout is not None
        assert select.select([served.process.stdout], [], [], PATIENCE)[0], "it never said that it serves"
        served.address = served.process.stdout.readline().strip()
        assert served.address.startswith("http://127.0.0.1:"), served.errors.read_text()
        yield served


def until(happened: Callable[[], bool]) -> None:
    """Wait until it has happened."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < PATIENCE, "it never happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def receive(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    assert data, "the server hung up"
    return data


def read_on(connection: socket.socket) -> bytes:
    """Everything until the server hangs up."""
    data = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def read_answer(connection: socket.socket) -> bytes:
    """One answer with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += receive(connection)
    return head + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = {"PGRECALL_HEADER_TIMEOUT": str(HEADER_TIMEOUT), "PGRECALL_BODY_TIMEOUT": str(BODY_TIMEOUT)}
    with serve(tmp_path_factory.mktemp("served"), **limits) as served:
        yield served


def test_answers_without_naming_itself(served: Served) -> None:
    answer = served.get("/pid")
    assert answer.json() == served.process.pid
    assert "server" not in answer.headers


def test_a_head_that_does_not_come_is_not_waited_for(served: Served) -> None:
    half = b"GET /pid HTTP/1.1\r\nHost: localhost\r\nX-Half"
    one_and_a_half = b"GET /pid HTTP/1.1\r\nHost: localhost\r\n\r\nGET /pid HT"
    with ExitStack() as stack:
        began = time.monotonic()
        connections = {sent: stack.enter_context(served.connect()) for sent in (b"", b"\r\n", half, one_and_a_half)}
        for sent, connection in connections.items():
            connection.sendall(sent)
        for sent, connection in connections.items():
            assert read_on(connection).count(b"HTTP/1.1 200 ") == sent.count(b"\r\n\r\n")
            assert 0.9 * HEADER_TIMEOUT < time.monotonic() - began < PATIENCE


def test_a_head_that_drips_is_not_waited_for(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /pid HTTP/1.1\r\nX-Slow: ")
        connection.settimeout(0.05)
        began = time.monotonic()
        ended = False
        while not ended:
            assert time.monotonic() - began < PATIENCE
            try:
                connection.send(b"x")
                ended = connection.recv(1) == b""
            except ConnectionError:
                ended = True
            except TimeoutError:
                continue
    assert time.monotonic() - began > 0.9 * HEADER_TIMEOUT


def test_an_idle_connection_and_a_slow_answer_outlast_the_header_timeout(served: Served) -> None:
    with served.connect() as connection:
        for seconds in (0, 1.5 * HEADER_TIMEOUT):
            time.sleep(seconds)
            connection.sendall(f"GET /slow?seconds={seconds} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert read_answer(connection).startswith(b"HTTP/1.1 200 ")


def test_kept_connections_answer_without_delay(served: Served) -> None:
    took = []
    with served.connect() as connection:
        for _ in range(60):
            began = time.monotonic()
            connection.sendall(b"GET /pid HTTP/1.1\r\nHost: localhost\r\n\r\n")
            read_answer(connection)
            took.append(time.monotonic() - began)
    # The first are acknowledged at once in any case. A busy machine delays many; the other delays every one.
    assert min(took[30:]) < 0.035, "Nagle's algorithm against delayed acknowledgements takes 40 ms"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /pid HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * MAX_HEAD + b"\r\n\r\n",
        b"GET /pid HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%06d: a\r\n" % i for i in range(6_000)) + b"\r\n",
        b"GET /pid?" + b"a" * MAX_HEAD + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["one header", "many headers", "request line"],
)
def test_a_head_that_is_too_large_is_refused(served: Served, head: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(head)
        answer = read_on(connection)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"content-type: application/problem+json" in answer
    problem = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert problem["status"] == 431
    assert str(MAX_HEAD) in problem["detail"]


def test_a_header_without_end_is_refused_before_it_ends(served: Served) -> None:
    sent, answer = 0, b""
    with served.connect() as connection:
        connection.sendall(b"GET /pid HTTP/1.1\r\nX-Endless: ")
        connection.settimeout(0.001)
        while not answer and sent < 100 * MAX_HEAD:
            with suppress(TimeoutError):
                connection.sendall(b"a" * 1024)
                sent += 1024
                answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert sent > MAX_HEAD


def test_a_large_head_within_the_limit_passes(served: Served) -> None:
    with served.connect() as connection:
        for _ in range(2):
            connection.sendall(
                b"GET /pid HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * (MAX_HEAD - 100) + b"\r\n\r\n"
            )
            assert read_answer(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_",
    [
        b"rubbish\r\n\r\n",
        b"POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=["no HTTP", "two lengths", "no length"],
)
def test_what_is_no_request_is_answered_with_a_problem(served: Served, request_: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(request_)
        answer = read_on(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == 400


@pytest.mark.parametrize(
    "path",
    ["/path/a%2Fb", "/path/a%20b", "/path/%C3%A9", "/path//x", "/path/x/", "/path/x/../y", "/path/%2e%2e/y"],
)
def test_the_application_gets_the_path_as_it_was_sent(served: Served, path: str) -> None:
    with served.connect() as connection:
        connection.sendall(f"GET {path}?q=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert read_answer(connection).endswith(f"\r\n\r\n{path}".encode())


def test_a_slow_body_has_its_own_timeout(served: Served) -> None:
    head = b"POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nab"
    with served.connect() as patient, served.connect() as connection:
        for each in (patient, connection):
            each.sendall(head)
        time.sleep(1.5 * HEADER_TIMEOUT)
        patient.sendall(b"cd")
        assert read_answer(patient).endswith(b"\r\n\r\n4")
        answer = read_on(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"].endswith(f"within {BODY_TIMEOUT} seconds")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_far_too_much_gets_to_see_why_not(served: Served, *, chunked: bool) -> None:
    piece = b"a" * 65536
    content = (piece for _ in range(400)) if chunked else piece * 400
    answer = httpx.post(f"{served.address}/length", content=content, timeout=PATIENCE)
    assert answer.status_code == 413
    assert str(BODY_LIMIT) in answer.json()["detail"]


def test_a_stream_ends_when_its_client_goes_away(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""
        while b"first" not in data:
            data += receive(connection)
        assert "stream ended" not in served.lines()
    until(lambda: "stream ended" in served.lines())


def test_a_client_that_does_not_read_is_hung_up_on(served: Served) -> None:
    with served.connect() as connection:
        began = time.monotonic()
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert receive(connection).startswith(b"HTTP/1.1 200 ")
        until(lambda: "flood ended" in served.lines())
        assert time.monotonic() - began > 0.9 * BODY_TIMEOUT


def test_head_has_the_headers_of_get_and_no_body(served: Served) -> None:
    with served.connect() as connection:
        head = b" /pid HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall(b"HEAD" + head + b"\r\nGET" + head + b"Connection: close\r\n\r\n")
        _, headed, got, body = re.split(rb"HTTP/1.1 200 OK\r\n|\r\n\r\n(?=\d)", read_on(connection))
    assert int(body) == served.process.pid
    assert headed.removesuffix(b"\r\n\r\n") == got.replace(b"\r\nconnection: close", b"")


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        ((b"localhost:1",), 200),
        ((b"LOCALHOST.",), 200),
        ((b"127.0.0.9",), 200),
        ((b"[::1]:8000",), 200),
        ((b"rebound.example:8000",), 421),
        ((b"127.0.0.1.rebound.example",), 421),
        ((b"192.168.1.5",), 421),
        ((b"localhost@rebound.example",), 400),
        ((b"",), 400),
        ((), 400),
        ((b"localhost", b"rebound.example"), 400),
    ],
    ids=str,
)
def test_on_loopback_only_this_machine_is_a_host(served: Served, hosts: tuple[bytes, ...], status: int) -> None:
    with served.connect() as connection:
        lines = b"".join(b"Host: %s\r\n" % host for host in hosts)
        connection.sendall(b"GET /pid HTTP/1.1\r\n" + lines + b"Connection: close\r\n\r\n")
        head, _, body = read_on(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    if status != 200:
        assert b"application/problem+json" in head
        problem = json.loads(body)
        assert problem["status"] == status
        assert ("PGRECALL_ALLOWED_HOSTS" in problem["detail"]) is (status == 421)


def test_a_request_of_http_1_0_needs_no_host(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /pid HTTP/1.0\r\n\r\n")
        assert read_on(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("setting", "listening", "allowed"),
    [
        (None, "127.0.0.1", set()),
        (None, "::1", set()),
        (None, "0.0.0.0", None),
        (None, "::", None),
        ("recall.internal, [2001:db8::1]", "127.0.0.1", {"recall.internal", "2001:db8::1"}),
        ("Recall.internal", "0.0.0.0", {"recall.internal"}),
        ("recall.internal,*", "127.0.0.1", None),
    ],
)
def test_allowed_hosts_are_the_settings_or_follow_the_address(
    setting: str | None, listening: str, allowed: set[str] | None
) -> None:
    assert hosts(setting, listening) == allowed


@pytest.mark.parametrize(
    ("workers", "send"),
    [(1, lambda pid: os.kill(pid, signal.SIGTERM)), (2, lambda pid: os.killpg(pid, signal.SIGINT))],
    ids=["SIGTERM to one", "Ctrl-C to two"],
)
def test_a_signal_lets_requests_finish_and_accepts_no_more(
    tmp_path: Path, workers: int, send: Callable[[int], None]
) -> None:
    with serve(tmp_path, workers) as served, served.connect() as idle, ThreadPoolExecutor() as pool:
        answer = pool.submit(served.get, "/held")
        until(lambda: "held" in served.lines())
        send(served.process.pid)
        assert read_on(idle) == b""
        with pytest.raises(ConnectionRefusedError):
            until(lambda: served.connect().close() is not None)
        until(lambda: served.lines().count("closed") == workers - 1)
        assert "let go" not in served.lines()
        (tmp_path / "go").touch()
        assert answer.result().text == "done"
        assert served.process.wait(PATIENCE) == 0
    lines = served.lines()
    assert lines.count("closed") == workers
    assert lines[-4:] == ["let go", "closing", "closed", "returned"]


def test_the_end_comes_even_when_requests_and_application_will_not_end(tmp_path: Path) -> None:
    with (
        serve(tmp_path, PGRECALL_SHUTDOWN_TIMEOUT="1", SERVED_CLOSING=str(2 * PATIENCE)) as served,
        served.connect() as streamed,
        served.connect() as stalled,
        ThreadPoolExecutor() as pool,
    ):
        stalled.sendall(b"POST /length HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab")
        streamed.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert streamed.recv(65536).startswith(b"HTTP/1.1 200 ")
        answer = pool.submit(served.get, f"/slow?seconds={2 * PATIENCE}")
        until(lambda: "slow began" in served.lines())
        served.process.terminate()
        answered = answer.result()
        assert (answered.status_code, answered.headers["retry-after"]) == (503, "1")
        for head, body in ((str(answered.headers), answered.text), read_on(stalled).decode().split("\r\n\r\n")):
            assert "application/problem+json" in head
            assert "shutting down" in json.loads(body)["detail"]
        assert served.process.wait(PATIENCE) == 1
        assert "did not close within 1 seconds" in served.errors.read_text()
    lines = served.lines()
    assert lines[-2:] == ["closing", "returned"]
    assert {"slow cancelled", "stream ended"} == set(lines[lines.index("slow began") + 1 : -2])


def test_a_worker_that_dies_is_replaced_and_none_outlives_the_server(tmp_path: Path) -> None:
    with serve(tmp_path, workers=2) as served:
        first = served.get("/pid").json()
        os.kill(first, signal.SIGKILL)
        until(lambda: served.lines().count("opened") == 3)
        others = set()
        until(lambda: len(others) == 2 or others.add(served.get("/pid").json()) is not None)
        assert first not in others
        assert "status -9; starting another" in served.errors.read_text()
        served.process.kill()
        until(lambda: not any(map(alive, others)))
        assert served.lines().count("closed") == 2
        with pytest.raises(ConnectionRefusedError):
            served.connect()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_application_that_cannot_start_says_why_and_ends_the_server(tmp_path: Path, workers: int) -> None:
    with start(tmp_path, workers, SERVED_FAULT="the database is another one") as served:
        assert served.process.wait(PATIENCE) == 2
        errors = served.errors.read_text()
    assert "the database is another one" in errors
    assert "Traceback" not in errors
    assert served.lines()[-1] == "returned"


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_while_it_starts(tmp_path: Path, workers: int) -> None:
    with start(tmp_path, workers, SERVED_OPENING=str(2 * PATIENCE)) as served:
        until(lambda: served.lines().count("opening") == workers)
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.process.wait(PATIENCE) == 130
    assert served.lines()[workers:] == ["returned"]
    assert "Traceback" not in served.errors.read_text()


def test_an_address_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: Address already in use"):
            server.serve("x:y", host="127.0.0.1", port=port, workers=1, settings=Settings())

"""Requests that are none, or may be read in two ways, or go on where they should end, byte by byte over a socket."""

import json
import re
from contextlib import suppress

import pytest

from app.api.head import MAX_HEAD
from tests.api.served_app import BODY_LIMIT
from tests.api.test_server import read_answer, read_on, receive, serve, until

HOST = b"Host: localhost\r\n"
GET = b"GET /pid HTTP/1.1\r\n" + HOST
LAST = GET + b"Connection: close\r\n\r\n"
POST = b"POST /length HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED = {
    "NUL in a header": GET + b"X: a\0b\r\n\r\n",
    "carriage return in a header": GET + b"X: a\rb\r\n\r\n",
    "folded header": GET + b"X: a\r\n b\r\n\r\n",
    "space before the colon": GET + b"X : a\r\n\r\n",
    "line feeds": b"GET /pid HTTP/1.1\nHost: localhost\n\n",
    "length beside chunks": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks beside a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "chunked not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "almost chunked": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "length of no machine": POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "signed chunk": CHUNKED + b"-1\r\n",
    "chunk of no machine": CHUNKED + b"ffffffffffffffffff\r\nabc",
    "chunk that is longer": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "chunks by line feeds": CHUNKED + b"3\nabc\n0\n\n",
    "tunnel": b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/2 by prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "address without a path": b"GET http://localhost HTTP/1.1\r\n" + HOST + b"\r\n",
    "address that is none": b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n",
    "path that is no ASCII": "GET /é HTTP/1.1\r\n".encode() + HOST + b"\r\n",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("served")) as served:
        yield served
        assert "Traceback" not in served.errors.read_text()


def exchanged(served, sent):
    """All that comes back until the server hangs up."""
    with served.connect() as connection:
        connection.sendall(sent)
        return read_on(connection)


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED)
def test_what_is_no_request_is_refused_once_and_nothing_behind_it_is_read(served, sent):
    head, _, body = exchanged(served, sent + GET + b"\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["status"] == 400


def test_requests_sent_at_once_are_answered_in_order(served):
    several = b"".join(b"GET /path/%d HTTP/1.1\r\n%s\r\n" % (n, HOST) for n in range(50))
    with_bodies = b"".join(POST + b"Content-Length: %d\r\n\r\n" % n + b"x" * n for n in (7, 70_001, 0, 3))
    answer = exchanged(served, several + with_bodies + LAST)
    assert [int(n) for n in re.findall(rb"\r\n\r\n/path/(\d+)", answer)] == list(range(50))
    lengths = [int(n) for n in re.findall(rb"HTTP/1.1 201 .*?\r\n\r\n(\d+)", answer, re.DOTALL)]
    assert lengths == [7, 70_001, 0, 3]
    assert answer.endswith(b"\r\n\r\n%d" % served.process.pid)


def test_headers_behind_a_body_are_none_of_the_request(served):
    again = b"0\r\nHost: rebound.example\r\nAuthorization: Bearer x\r\n\r\n"
    answer = exchanged(served, CHUNKED + b'3;a="b\\"";c\r\nabc\r\n' + again + LAST)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"201", b"200"]


@pytest.mark.parametrize(
    "begun", [b"3\r\nabc\r\n0\r\nX-Endless: ", b"3;x=", b"0000"], ids=["trailer", "extension", "size"]
)
def test_what_stands_around_chunks_has_an_end(served, begun):
    sent, answer = 0, b""
    with served.connect() as connection:
        connection.sendall(CHUNKED + begun)
        connection.settimeout(0.001)
        while not answer and sent < 100 * MAX_HEAD:
            with suppress(TimeoutError):
                connection.send(b"0" * 4_096)
                sent += 4_096
                answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert MAX_HEAD <= sent < 8 * MAX_HEAD


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_offer_to_speak_another_protocol_is_passed_over(served, protocol):
    offer = (
        b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nUpgrade: %s\r\n" % protocol
    )
    with_body = POST + offer + b"Content-Length: 3\r\n\r\nabc"
    chunked = POST + offer + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    with served.connect() as connection:
        for sent in (GET + offer + b"\r\n", with_body, chunked):
            connection.sendall(sent)
            answer = read_answer(connection)
            assert answer.startswith(b"HTTP/1.1 20")
            assert sent.startswith(GET) or answer.endswith(b"\r\n\r\n3")
        connection.sendall(with_body[:-2])
        connection.sendall(b"bc" + with_body + chunked + LAST)
        assert re.findall(rb"HTTP/1.1 (\d+) ", read_on(connection)) == [b"201", b"201", b"201", b"200"]


def test_each_request_of_a_connection_is_told_of_its_end(served):
    ended = served.lines().count("stream ended")
    with served.connect() as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\n" + HOST + b"\r\n" + GET + b"\r\n")
        data = b""
        while b"first" not in data:
            data += receive(connection)
    until(lambda: served.lines().count("stream ended") == ended + 1)


def test_rubbish_behind_a_request_is_not_answered_inside_of_its_answer(served):
    with served.connect() as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\n" + HOST + b"\r\n")
        data = b""
        while b"first" not in data:
            data += receive(connection)
        connection.sendall(b"rubbish\r\n\r\n")
        assert read_on(connection) == b""


def test_who_asks_whether_to_go_on_is_told_so_or_why_not(served):
    expecting = POST + b"Expect: 100-continue\r\nConnection: close\r\n"
    with served.connect() as connection:
        connection.sendall(expecting + b"Content-Length: 3\r\n\r\n")
        assert receive(connection) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert read_on(connection).endswith(b"\r\n\r\n3")
    with served.connect() as connection:
        connection.sendall(expecting + b"Content-Length: %d\r\n\r\n" % (BODY_LIMIT + 1))
        assert receive(connection).startswith(b"HTTP/1.1 413 ")
    old = b"POST /length HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"
    assert exchanged(served, old).startswith(b"HTTP/1.1 201 ")

"""NDJSON in, NDJSON out, over real sockets: answers while the body is sent, faults, limits, clients that go away."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import pytest

from app import feed
from app.api import stream
from app.drafts import Draft
from app.errors import BadInput
from tests.conftest import DIMENSIONS, PATIENCE

HEADERS = {"Content-Type": stream.MEDIA_TYPE}


def vector(number):
    return [float(number + 1), *[0.25] * (DIMENSIONS - 1)]


def own(number, **more):
    return {"id": f"d{number}", "content": f"Text number {number}.", "embedding": vector(number)} | more


def ndjson(*items):
    return "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items).encode()


async def told(*parts):
    async def pieces():
        for part in parts:
            yield part

    return [entry async for entry in stream.entries(pieces())]


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_lines_are_found_however_they_are_cut(size):
    data = ndjson({"id": "a", "content": "ä"}, "", {"id": "b", "content": "x\u2028y"}, "nothing")[:-1]
    entries = await told(*(data[at : at + size] for at in range(0, len(data), size)))
    assert [entry.line for entry in entries] == [1, 3, 4]
    assert [entry.made for entry in entries[:2]] == [Draft("a", "ä"), Draft("b", "x\u2028y")]
    assert isinstance(entries[2].made, BadInput)


async def test_a_line_that_is_too_long_is_not_kept(monkeypatch):
    monkeypatch.setattr(stream, "MAX_LINE", 100)
    entries = await told(
        b'{"id": "a", "content": "', *[b"x" * 60] * 50, b'"}\n', ndjson({"id": "b", "content": "fine"})
    )
    assert "the line is 3,026 bytes long" in str(entries[0].made)
    assert entries[1].made == Draft("b", "fine")


async def test_each_line_has_its_answer_and_the_summary_comes_last(client, openai):
    body = ndjson(
        own(1),
        {"id": "e", "content": "Otters eat fish."},
        {"id": "x"},
        "{",
        own(1, doc_type="a"),
        own(2, embedding=[1.0]),
    )
    response = await client.post("/documents/stream", params={"tenant_id": "t"}, content=body, headers=HEADERS)
    *lines, summary = [json.loads(line) for line in response.text.splitlines()]
    assert (response.status_code, response.headers["content-type"]) == (200, stream.MEDIA_TYPE)
    by = {line["line"]: line for line in lines}
    assert {number: line["status"] for number, line in by.items()} == {
        1: "created",
        2: "created",
        3: "failed",
        4: "failed",
        5: "updated",
        6: "failed",
    }
    assert by[3]["error"]["field"] == "content"
    assert by[6]["error"]["field"] == "embedding"
    assert by[6]["error"]["status"] == 400
    assert by[4]["error"]["detail"].startswith("the line is not JSON: ")
    assert by[5]["version"] == 2
    assert summary == {
        "done": True,
        "created": 2,
        "updated": 1,
        "unchanged": 0,
        "failed": 3,
        "tokens": summary["tokens"],
    }
    assert summary["tokens"] > 0
    faults = await client.post(
        "/documents/stream", params={"tenant_id": "t", "answers": "faults"}, content=body, headers=HEADERS
    )
    assert [json.loads(line).get("line") for line in faults.text.splitlines()] == [3, 4, 6, None]


async def test_a_budget_ends_the_stream_and_says_which_lines_are_not_stored(client):
    items = [{"id": f"d{n}", "content": f"Sentence {n} about a heron."} for n in range(3)]
    response = await client.post(
        "/documents/stream", params={"tenant_id": "t", "max_tokens": 5}, content=ndjson(*items), headers=HEADERS
    )
    *lines, summary = [json.loads(line) for line in response.text.splitlines()]
    assert [line["status"] for line in lines] == ["failed"] * 3
    assert (summary["done"], "5 are spent" in summary["stopped"]["detail"]) == (False, True)
    assert {line["error"]["status"] for line in lines} | {summary["stopped"]["status"]} == {413}
    assert (await client.get("/documents", params={"tenant_id": "t"})).json()["documents"] == []


@pytest.mark.parametrize(
    ("params", "headers", "status"),
    [
        ({}, HEADERS, 400),
        ({"tenant_id": "no spaces"}, HEADERS, 400),
        ({"tenant_id": "t", "max_tokens": -1}, HEADERS, 400),
        ({"tenant_id": "t", "answers": "some"}, HEADERS, 400),
        ({"tenant_id": "t"}, {"Content-Type": "application/json"}, 415),
        ({"tenant_id": "t"}, {"Content-Type": "text/plain"}, 415),
    ],
)
async def test_what_is_wrong_with_the_request_is_answered_as_everywhere(client, params, headers, status):
    response = await client.post("/documents/stream", params=params, content=ndjson(own(1)), headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")


async def test_a_document_may_be_called_stream(client):
    body = {"tenant_id": "t", "content": "A stream runs to the sea."}
    assert (await client.put("/documents/stream", json=body)).status_code == 201
    assert (await client.get("/documents/stream", params={"tenant_id": "t"})).json()["id"] == "stream"
    assert (await client.delete("/documents/stream", params={"tenant_id": "t"})).status_code in (200, 204)


async def test_the_body_is_documented(client):
    operation = (await client.get("/docs/openapi.json")).json()["paths"]["/documents/stream"]["post"]
    assert operation["requestBody"]["content"].keys() == {stream.MEDIA_TYPE}
    assert operation["responses"]["200"]["content"].keys() == {stream.MEDIA_TYPE}
    assert {parameter["name"] for parameter in operation["parameters"]} == {"tenant_id", "max_tokens", "answers"}


async def test_no_more_is_taken_than_is_in_hand(database, embedder, settings, monkeypatch):
    monkeypatch.setattr(feed, "MOST_ENTRIES", 10)
    taken = 0

    async def endless():
        nonlocal taken
        for number in range(200):
            taken += 1
            yield feed.Entry(number, 100, Draft(**own(number)))

    answers = feed.Feed(database, embedder, settings, "t").answers(endless())
    seen = 0
    async for several in answers:
        seen += len(several)
        await asyncio.sleep(0.05)
        assert taken <= seen + 11
    assert seen == 200


@contextlib.contextmanager
def serving(settings, openai, folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PGRECALL", "OPENAI"))} | {
        "DATABASE_URL": settings.database_url,
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": openai.url,
        "PGRECALL_EMBEDDING_MODEL": "text-embedding-3-small",
        "PGRECALL_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
        "PGRECALL_BODY_TIMEOUT": "3",
    }
    with (
        (folder / "errors").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0"], env=environment, stderr=errors
        ) as process,
    ):
        try:
            deadline = time.monotonic() + PATIENCE
            while not (found := re.search(r"serving on (http://\S+),", (folder / "errors").read_text())):
                assert process.poll() is None, (folder / "errors").read_text()
                assert time.monotonic() < deadline, "it never said that it serves"
                time.sleep(0.1)
            yield process, found[1]
            process.send_signal(signal.SIGINT)
            process.wait()
        finally:
            process.kill()


def connect(address):
    parts = urlsplit(address)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)
    connection.sendall(
        b"POST /documents/stream?tenant_id=t HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
        b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    )
    return connection


def send(connection, data):
    connection.sendall(b"%x\r\n" % len(data) + data + b"\r\n")


def until(connection, text, held=b""):
    while text not in held:
        part = connection.recv(65_536)
        assert part, f"the server hung up after {held[-500:]!r}"
        held += part
    return held


def test_over_a_socket_answers_come_while_the_body_is_sent(settings, openai, owner, tmp_path):
    count = "select count(*) from sources where tenant_id = 't'"
    with serving(settings, openai, tmp_path) as (process, address):
        with connect(address) as connection:
            until(connection, b"100 Continue")
            send(connection, ndjson(own(1)))
            held = until(connection, b'"created"')  # the body is not over
            assert b"200 OK" in held
            send(connection, ndjson(own(2))[:20])
            send(connection, ndjson(own(2))[20:])
            held = until(connection, b'"line":2', held)
            send(connection, ndjson("nothing", own(3)))
            held = until(connection, b'"line":4', held)
            connection.sendall(b"0\r\n\r\n")
            held = until(connection, b"0\r\n\r\n", held)
            assert b'"done":true,"created":3,"updated":0,"unchanged":0,"failed":1' in held

        # A client that stops sending is given up; what it sent is stored and answered.
        with connect(address) as connection:
            send(connection, ndjson(own(4)) + b'{"id": "half", "con')
            held = until(connection, b"0\r\n\r\n")
            assert b'"done":false,"created":1' in held
            assert b"nothing came of the body for 3 seconds" in held

        # A client that goes away leaves whole documents.
        with connect(address) as connection:
            send(connection, ndjson(*map(own, range(5, 105))) + b'{"id": "half", "con')
            until(connection, b'"line":1')
        deadline = time.monotonic() + PATIENCE
        while owner.execute(count).fetchone() != (104,):
            assert time.monotonic() < deadline
            time.sleep(0.1)

        # A client that reads nothing is cut, and the server goes on.
        with connect(address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            flood = ndjson(*["bad"] * 10_000_000)
            with pytest.raises(OSError, match=r"."):  # timed out, or reset
                send(connection, flood)
        assert httpx.get(f"{address}/health/ready", timeout=PATIENCE).status_code == 200
        assert process.poll() is None
    halves = "select count(*) from sources s where not exists (select from documents d where d.tenant_id = s.tenant_id and d.id = s.id)"
    assert owner.execute(halves).fetchone() == (0,)

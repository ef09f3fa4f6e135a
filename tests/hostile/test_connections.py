"""Clients that take connections, memory or the model and give nothing: others are served meanwhile.

bench/hostile.py measures the same with a thousand of each.
"""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from msgspec.structs import replace

from app.api import body
from app.api.head import OTHER_FILES
from bench.hostile import KINDS, TENANT, Crowd, Memory, searching
from tests.conftest import PATIENCE
from tests.hostile.served import serving

FILES = 600
"""What the server may open: fewer than there are clients."""
MEGABYTES = 250
"""More than this many the crowds of this test must not cost: a thirtieth of what they would if all was kept."""


LIMITS = """
import resource
from app.server import _most_connections
print(_most_connections(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def connect(address):
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE)


@pytest.fixture(scope="module")
def beset(cluster, template, tmp_path_factory):
    folder = tmp_path_factory.mktemp("beset")
    # On a busy machine three hundred questions at once take longer than the usual wait for a connection.
    patient = {"pool_timeout": PATIENCE, "statement_timeout": PATIENCE}
    with serving(cluster, template, folder, files=FILES, body_timeout=2.0, header_timeout=2.0, **patient) as served:
        documents = [{"id": str(n), "content": f"Animal {n} swims in river {n % 7}."} for n in range(20)]
        httpx.post(f"{served.address}/documents", json={"tenant_id": TENANT, "documents": documents}, timeout=PATIENCE)
        yield served


def test_others_are_served_in_bounded_memory_whatever_a_crowd_does(beset):
    beset.openai.answer = f"{'x' * 1_000} " * 2_000
    memory = Memory(beset.process.pid)
    searching(beset.address, 1, PATIENCE)
    before, _ = memory.read()
    with contextlib.ExitStack() as stack:
        crowds = {name: stack.enter_context(Crowd(beset.address, kind, 100)) for name, kind in KINDS.items()}
        found = searching(beset.address, 6, PATIENCE)
        _, peak = memory.read()
    opened = {name: crowd.opened for name, crowd in crowds.items()}
    assert all(opened.values()), opened
    assert sum(opened.values()) > FILES - OTHER_FILES
    assert (found.failed, found.seconds != []) == ([], True)
    assert peak - before < MEGABYTES
    said = beset.said.read_text()
    assert "Traceback" not in said
    assert "accept" not in said  # "socket.accept() out of system resource"


def test_a_client_that_stops_reading_an_answer_lets_the_model_go(beset):
    beset.openai.calls.clear()
    beset.openai.answer = f"{'x' * 1_000} " * 20_000
    asked = json.dumps({"tenant_id": TENANT, "question": "Who reads no further?", "stream": True}).encode()
    with connect(beset.address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.sendall(
            b"POST /rag HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(asked), asked)
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        began = time.monotonic()
        mine = []
        while not mine:
            assert time.monotonic() - began < PATIENCE
            mine = [call for call in beset.openai.chat_calls if "reads no further" in str(call.body)]
            time.sleep(0.02)
        (call,) = mine
        assert call.ended.wait(PATIENCE), "the model writes on for nobody"
        assert call.disconnected


async def test_streams_of_documents_are_limited_and_their_places_come_back(client, monkeypatch):
    monkeypatch.setattr(body, "MOST_STREAMS", 2)
    over = asyncio.Event()

    async def held(arrived):
        yield b"\n"
        arrived.set()
        await over.wait()

    async def stream(lines):
        query = {"params": {"tenant_id": TENANT}, "headers": {"Content-Type": "application/x-ndjson"}}
        return await client.post("/documents/stream", content=lines, **query)

    opened = []
    for _ in range(body.MOST_STREAMS):
        arrived = asyncio.Event()
        opened.append(asyncio.create_task(stream(held(arrived))))
        await arrived.wait()
    refused = await stream(b"\n")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    gone, last = opened
    gone.cancel()
    await asyncio.wait([gone])
    assert (await stream(b"\n")).status_code == 200
    over.set()
    assert (await last).status_code == 200


async def test_large_bodies_together_are_limited_and_small_ones_go_on(client, app, monkeypatch):
    monkeypatch.setattr(body, "MOST_HELD", 1_000_000)
    arrived, over = asyncio.Event(), asyncio.Event()
    over.set()

    async def parts(size):
        yield b'{"tenant_id": "acme", "content": "' + b"x" * size
        arrived.set()
        await over.wait()
        yield b'"}'

    headers = {"Content-Type": "application/json"}
    over.clear()
    first = asyncio.create_task(client.put("/documents/one?wait=false", content=parts(900_000), headers=headers))
    await arrived.wait()
    refused = await client.put("/documents/two?wait=false", content=parts(900_000), headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    small = asyncio.create_task(client.put("/documents/three?wait=false", content=parts(100), headers=headers))
    over.set()
    assert (await first).status_code == 202
    assert (await small).status_code == 202
    again = await client.put("/documents/two?wait=false", content=parts(900_000), headers=headers)
    assert again.status_code == 202


def test_a_server_takes_as_many_files_as_it_is_allowed():
    said = subprocess.run(
        ["sh", "-c", f'ulimit -Sn 1024; ulimit -Hn 3000; exec "{sys.executable}" -c "$0"', LIMITS],
        capture_output=True,
        check=True,
        text=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    assert said.split() == [str(3_000 - OTHER_FILES), "3000"]


@pytest.fixture
def settings(settings, request):
    return replace(settings, **getattr(request, "param", {}))


@pytest.mark.parametrize("settings", [{"pool_size": 1, "pool_timeout": 0.3}], indirect=True, ids=[""])
async def test_a_process_whose_connections_are_all_in_use_is_ready_all_the_same(client, app):
    database = app.state.service.database
    async with database.write("acme"):
        busy = await client.post("/search", json={"tenant_id": "acme", "embedding": [1.0] * 64})
        ready = await client.get("/health/ready")
    assert (busy.status_code, ready.status_code) == (503, 200)

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from litestar import Litestar, Request, get, post
from litestar.params import JSONBody
from litestar.response import Stream
from litestar.types import Message

from app.api import problems
from app.api.body import BodyGuard

LIMIT, LARGER = 1_000, 5_000
SECONDS = 0.3


@post("/length")
async def length(request: Request[Any, Any, Any]) -> int:
    return len(await request.body())


@post("/larger", request_max_body_size=LARGER)
async def larger(data: JSONBody[dict[str, str]]) -> int:
    return len(data["text"])


@post("/slow-answer")
async def slow_answer(request: Request[Any, Any, Any]) -> Stream:
    await request.body()

    async def pieces() -> AsyncIterator[str]:
        for piece in "abc":
            await asyncio.sleep(SECONDS / 2)
            yield piece

    return Stream(pieces())


@get("/")
async def index() -> str:
    return "here"


def create() -> Litestar:
    return Litestar(
        [length, larger, slow_answer, index],
        middleware=[BodyGuard(SECONDS)],
        plugins=[problems.plugin],
        request_max_body_size=LIMIT,
        openapi_config=None,
        logging_config=None,
    )


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create()), base_url="http://test") as client:
        yield client


async def dripping(count: int, pause: float, piece: bytes = b"a") -> AsyncIterator[bytes]:
    for _ in range(count):
        yield piece
        await asyncio.sleep(pause)


def check_problem(answer: httpx.Response, status: int, detail: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("application/problem+json")
    problem = answer.json()
    assert set(problem) >= {"type", "title", "status", "detail"}
    assert problem["status"] == status
    assert detail in problem["detail"]


async def test_a_body_in_time_and_within_the_limit_passes(client: httpx.AsyncClient) -> None:
    assert (await client.post("/length", content=b"a" * LIMIT)).json() == LIMIT
    assert (await client.post("/length", content=dripping(3, 0.01))).json() == 3
    assert (await client.post("/length")).json() == 0
    assert (await client.get("/")).text == "here"


@pytest.mark.parametrize(("count", "pause"), [(2, 60.0), (1_000, SECONDS / 10)], ids=["stalls", "drips"])
async def test_a_slow_body_is_given_up(client: httpx.AsyncClient, count: int, pause: float) -> None:
    began = asyncio.get_running_loop().time()
    answer = await client.post("/length", content=dripping(count, pause))
    check_problem(answer, 408, f"within {SECONDS} seconds")
    assert answer.headers["connection"] == "close"
    assert asyncio.get_running_loop().time() - began > 0.9 * SECONDS


async def test_the_answer_may_take_longer_than_the_body(client: httpx.AsyncClient) -> None:
    assert (await client.post("/slow-answer", content=b"question")).text == "abc"


async def test_an_announced_size_over_the_limit_is_refused_unread(client: httpx.AsyncClient) -> None:
    asked = []

    async def content() -> AsyncIterator[bytes]:
        asked.append(True)
        yield b""

    answer = await client.post("/length", content=content(), headers={"Content-Length": str(LIMIT + 1)})
    check_problem(answer, 413, f"at most {LIMIT} bytes")
    assert not asked


async def test_an_unannounced_size_over_the_limit_is_refused_as_soon_as_it_shows(client: httpx.AsyncClient) -> None:
    given = []

    async def content() -> AsyncIterator[bytes]:
        for number in range(100):
            given.append(number)
            yield b"a" * 100

    check_problem(await client.post("/length", content=content()), 413, f"at most {LIMIT} bytes")
    assert len(given) == LIMIT // 100 + 1


async def test_a_route_has_its_own_limit(client: httpx.AsyncClient) -> None:
    answer = await client.post("/larger", json={"text": "a" * (LARGER - 20)})
    assert answer.json() == LARGER - 20
    check_problem(await client.post("/larger", json={"text": "a" * LARGER}), 413, f"at most {LARGER} bytes")
    chunks = dripping(6, 0, b"a" * 1_000)
    check_problem(await client.post("/larger", content=chunks), 413, f"at most {LARGER} bytes")


async def test_a_client_that_hangs_up_is_no_error_of_ours() -> None:
    coming: list[Any] = [
        {"type": "http.request", "body": b"abc", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Any:
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/length",
        "raw_path": b"/length",
        "query_string": b"",
        "headers": [(b"content-length", b"9")],
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await create()(scope, receive, send)
    assert sent[0]["type"] == "http.response.start"
    assert sent[0]["status"] == 400

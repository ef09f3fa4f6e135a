"""A small application, and a program that serves it, for test_server.py. What happened stands in SERVED_LOG, a line each."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, get, post
from litestar.response import ServerSentEvent, Stream

from app import server, telemetry
from app.api import problems
from app.api.body import BodyGuard
from app.api.methods import Heads
from app.errors import SetupError
from app.settings import read

BODY_LIMIT = 1_000_000


def note(line: str) -> None:
    with Path(os.environ["SERVED_LOG"]).open("a") as log:
        log.write(f"{line}\n")


@asynccontextmanager
async def lifespan(_: Litestar) -> AsyncIterator[None]:
    note("opening")
    await asyncio.sleep(float(os.environ.get("SERVED_OPENING", "0")))
    if fault := os.environ.get("SERVED_FAULT"):
        raise SetupError(fault)
    note("opened")
    yield
    note("closing")
    await asyncio.sleep(float(os.environ.get("SERVED_CLOSING", "0")))
    note("closed")


@get("/pid")
async def pid() -> int:
    return os.getpid()


@get("/slow")
async def slow(seconds: float) -> str:
    try:
        note("slow began")
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        note("slow cancelled")
        raise
    note("slow ended")
    return "done"


@get("/held")
async def held() -> str:
    """Until there is a file `go` beside the log."""
    note("held")
    while not Path(os.environ["SERVED_LOG"]).with_name("go").exists():  # noqa: ASYNC110 - the test's to make
        await asyncio.sleep(0.02)
    note("let go")
    return "done"


@post("/length")
async def length(request: Request[Any, Any, Any]) -> int:
    return len(await request.body())


async def tokens() -> AsyncIterator[str]:
    try:
        yield "first"
        await asyncio.sleep(60)
    finally:
        note("stream ended")


@get("/stream")
async def stream() -> ServerSentEvent:
    return ServerSentEvent(tokens())


async def flood() -> AsyncIterator[bytes]:
    try:
        while True:
            yield bytes(1_000_000)
            await asyncio.sleep(0)
    finally:
        note("flood ended")


@get("/flood")
async def flooding() -> Stream:
    return Stream(flood())


@get(["/path", "/path/{rest:path}"])
async def path(request: Request[Any, Any, Any]) -> str:
    return request.scope["raw_path"].decode()


def create_app() -> Litestar:
    app = Litestar(
        [pid, slow, held, length, stream, flooding, path],
        lifespan=[lifespan],
        middleware=[BodyGuard(read().body_timeout)],
        plugins=[problems.plugin],
        request_max_body_size=BODY_LIMIT,
        openapi_config=None,
        logging_config=None,
    )
    app.asgi_handler = Heads(app.asgi_handler)
    return app


def main(workers: str) -> int:
    settings = read()
    telemetry.set_up(settings)
    try:
        return server.serve(
            "tests.api.served_app:create_app",
            host="127.0.0.1",
            port=0,
            workers=int(workers),
            settings=settings,
            on_started=lambda address: print(address, flush=True),
        )
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        note("returned")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

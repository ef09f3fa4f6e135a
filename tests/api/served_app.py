"""A small application and a program that serves it, for test_server.py; `log` holds what happened, a line each."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from litestar import Litestar, Request, get, post
from litestar.response import ServerSentEvent

from app import server, telemetry
from app.errors import SetupError
from app.settings import read

TARGET = f"{__name__ if __name__ != '__main__' else 'tests.api.served_app'}:create_app"


def note(line: str) -> None:
    with Path(os.environ["SERVED_LOG"]).open("a") as log:
        log.write(f"{line}\n")


@asynccontextmanager
async def lifespan(_: Litestar) -> AsyncIterator[None]:
    if fault := os.environ.get("SERVED_FAULT"):
        raise SetupError(fault)
    note("opened")
    yield
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


@get("/path")
async def path(request: Request[Any, Any, Any]) -> str:
    return request.scope["raw_path"].decode()


def create_app() -> Litestar:
    return Litestar([pid, slow, length, stream, path], lifespan=[lifespan], openapi_config=None, logging_config=None)


def main(port: str, workers: str) -> int:
    settings = read()
    telemetry.set_up(settings)

    def started(address: str) -> None:
        print(address, flush=True)

    try:
        return server.serve(
            TARGET, host="127.0.0.1", port=int(port), workers=int(workers), settings=settings, on_started=started
        )
    except SetupError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        note("returned")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

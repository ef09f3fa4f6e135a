"""The real application on a clone of its own, called in process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from litestar import Litestar

from app.asgi import create_app


@pytest.fixture
def app(settings) -> Litestar:
    return create_app(settings)


@asynccontextmanager
async def opened(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """The application from start to end, and a client of it."""
    ready, done = asyncio.Event(), asyncio.Event()

    async def live() -> None:
        # One task for both ends of the lifespan: pytest-asyncio sets up and tears down in different ones.
        async with app.lifespan():
            ready.set()
            await done.wait()

    life = asyncio.create_task(live())
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([life, waiting], return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        await life
    # An unexpected error must come out as a problem, so it is not raised into the test.
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
        yield client
    done.set()
    await life


@pytest.fixture
async def client(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    async with opened(app) as client:
        yield client

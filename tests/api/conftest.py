"""The real application on a clone of its own, called in process."""

from collections.abc import AsyncIterator

import httpx
import pytest

from app.asgi import create_app


@pytest.fixture
def app(settings):
    return create_app(settings)


@pytest.fixture
async def client(app) -> AsyncIterator[httpx.AsyncClient]:
    # An unexpected error must come out as a problem, so it is not raised into the test.
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as opened:
        yield opened

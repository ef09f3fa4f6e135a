"""Request bodies: read in time and within their limits, decoded to the letter."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from litestar import Request
from litestar.datastructures import Headers
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.middleware import ASGIMiddleware
from litestar.status_codes import HTTP_400_BAD_REQUEST, HTTP_408_REQUEST_TIMEOUT
from litestar.types import ASGIApp, Receive, ReceiveMessage, Scope, Send

from app.api import faults, guard
from app.errors import TooLarge, Unavailable


class StrictRequest(Request[Any, Any, Any]):
    """A request whose JSON is decoded as the type of its handler's `data`.

    Litestar would take "1" for 1, as it has to in query parameters, and leaves alone what is of the right type already.
    """

    async def body(self) -> bytes:
        """The body; routes that read it need one."""
        body = await super().body()
        if not body:
            raise faults.NO_BODY
        return body

    async def json(self) -> Any:
        """The handler's `data`, about the tenant of the key. Raises BadInput naming the field at fault, NotAllowed."""
        kind = self.route_handler.parsed_fn_signature.parameters["data"].annotation
        data = faults.decoded(await self.body(), kind)
        guard.settle_tenant(data, guard.caller_of(self))
        return data


STREAMED = "streamed"
"""In a handler's `opt`: its body may be of any length and take any time, as long as something comes of it."""


FREE = 65_536
"""Bytes of each body that are not counted: small requests are taken while large ones wait."""

MOST_HELD = 256_000_000
"""Bytes of bodies beyond what is free that a process holds at once: a slow sender's are held until its time is up."""

MOST_STREAMS = 32
"""Bodies that are streamed to a process at once; each has at most 32 MB in hand."""


class BodyGuard(ASGIMiddleware):
    """A body has to arrive whole within `seconds` (408) and within its route's `request_max_body_size` (413).

    Of a body that is streamed the next piece has to arrive within `seconds` whenever the route asks for it.

    All bodies together are held to MOST_HELD and MOST_STREAMS (503).

    Litestar enforces that size too, by Content-Length and while it reads; it is counted here because its 413 does not
    say what the limit is. The errors are raised where the body is read, so that the one error map answers them.
    """

    scopes = (ScopeType.HTTP,)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._held = 0
        self._streams = 0

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Pass the request on with a guarded `receive`.

        Raises TooLarge when Content-Length is over the limit, Unavailable when too many bodies are streamed.
        """
        handler = scope["route_handler"]
        headers = Headers.from_scope(scope)
        announced = headers.get("content-length", "0")
        if not isinstance(handler, HTTPRouteHandler) or (announced == "0" and "transfer-encoding" not in headers):
            await next_app(scope, receive, send)
            return

        limit = handler.resolve_request_max_body_size()
        too_large = TooLarge("", f"the body is too large; allowed: at most {limit} bytes on this route")
        if limit is not None and int(announced) > limit:
            raise too_large
        streamed = bool(handler.opt.get(STREAMED))
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.seconds
        size, held, whole = 0, 0, False

        async def guarded() -> ReceiveMessage:
            nonlocal size, held, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(clock() + self.seconds if streamed else deadline):
                    message = await receive()
            except TimeoutError:
                late = "nothing came of the body for" if streamed else "the body did not arrive whole within"
                raise HTTPException(
                    f"{late} {self.seconds:g} seconds",
                    status_code=HTTP_408_REQUEST_TIMEOUT,
                    headers={"Connection": "close"},
                ) from None
            if message["type"] != "http.request":
                # Litestar would make this a 500 and a client that hung up our error.
                raise HTTPException("the body ended early", status_code=HTTP_400_BAD_REQUEST)
            size += len(message["body"])
            if limit is not None and size > limit:
                raise too_large
            held = 0 if streamed else self._hold(size, held)
            whole = not message["more_body"]
            return message

        with self._streaming() if streamed else nullcontext():
            try:
                await next_app(scope, guarded, send)
            finally:
                self._held -= held

    def _hold(self, size: int, held: int) -> int:
        """Count a body of which so much has arrived and `held` bytes are counted; returns how many are then."""
        counted = max(0, size - FREE)
        if self._held + counted - held > MOST_HELD:
            raise Unavailable("too many large bodies are arriving; try again", retry_after=5)
        self._held += counted - held
        return counted

    @contextmanager
    def _streaming(self) -> Iterator[None]:
        if self._streams >= MOST_STREAMS:
            raise Unavailable(f"{MOST_STREAMS} streams of documents are under way; try again", retry_after=5)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

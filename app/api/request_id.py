"""The id of a request: the caller's or one made here, for the logs of both sides."""

import re
import uuid

from litestar.datastructures import MutableScopeHeaders
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.telemetry import request_id

_ACCEPTED = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """ASGI middleware: the caller's X-Request-ID, or one made here, in every log line and in the response.

    Accepted are 1 to 128 visible ASCII characters. Has to stand around the router, not in Litestar's own middleware,
    which a request for a route that does not exist never reaches.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request under its id."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        known = given if _ACCEPTED.fullmatch(given) else uuid.uuid4().hex

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableScopeHeaders.from_message(message)["X-Request-ID"] = known
            await send(message)

        token = request_id.set(known)
        try:
            await self._app(scope, receive, answer)
        finally:
            request_id.reset(token)

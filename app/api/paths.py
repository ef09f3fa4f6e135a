"""Document ids in paths: any text, slashes included, on every route."""

from urllib.parse import quote, unquote_to_bytes

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from app.drafts import MAX_ID_BYTES, check_text
from app.errors import BadInput

PREFIX = b"/documents/"
STREAM = "stream"
"""Behind the prefix a route of its own, for POST only."""


class RawIds:
    """ASGI middleware: gives the router an id as one path segment, percent-encoded.

    Servers decode a path before routing, after which `a%2Fb`, `a/b` and `a//b` cannot be told apart and a router
    normalises slashes away. Everything after `/documents/`, as the client sent it, is the id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rewrite `path` where it names a document."""
        if scope["type"] == ScopeType.HTTP:
            raw = scope.get("raw_path", b"").partition(b"?")[0]
            if raw.startswith(PREFIX) and len(raw) > len(PREFIX):
                encoded = quote(unquote_to_bytes(raw[len(PREFIX) :]), safe="")
                if encoded == STREAM and scope["method"] != HttpMethod.POST:
                    encoded = f"%{ord(STREAM[0]):02X}{STREAM[1:]}"  # the document of this name, not the route
                scope["path"] = PREFIX.decode() + encoded.replace(".", "%2E")
        await self._app(scope, receive, send)


def decoded(segment: str) -> str:
    """The id a path segment stands for. Raises BadInput unless it is 1 to 512 bytes of UTF-8 without NUL."""
    try:
        text = unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise BadInput("id", "is not UTF-8; allowed: percent-encoded UTF-8 of 1 to 512 bytes") from None
    check_text("id", text, 1, MAX_ID_BYTES)
    return text

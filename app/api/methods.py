"""HEAD wherever there is GET."""

from litestar.datastructures import MutableScopeHeaders
from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send


class Heads:
    """ASGI middleware: answers HEAD as GET without the body, and says in Allow that it does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == HttpMethod.HEAD

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableScopeHeaders.from_message(message)
                methods = set(headers.get("Allow", "").split(", ")) - {""}
                if methods:
                    more = {"HEAD"} if "GET" in methods else set()
                    headers["Allow"] = ", ".join(sorted(methods | more))
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # A copy: the server, too, looks at the method to know whether a body follows.
        await self._app({**scope, "method": HttpMethod.GET} if is_head else scope, receive, answer)

"""What stands before the application on a socket: whom a request is for, and an answer for requests that are cut short."""

import asyncio
import ipaddress
import re
from functools import lru_cache
from http import HTTPStatus

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems

_HOST = re.compile(r"(?:\[(?P<address>[0-9a-fA-F:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d*)?")


class Front:
    """Refuses what is meant for another host, and answers for an application that was cancelled before it did.

    A Host that is not served gets 421, none or several get 400, a request cut short by a shutdown gets 503.

    `hosts`: names and addresses beside those of this machine itself, None for any. A page of another site can make its
    own name point to this machine; the browser then lets it read the answers, but says that name in Host.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await problems.send(send, *refused)
            return
        try:
            await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            if begun:
                raise
            detail = "the server is shutting down; try again"
            await problems.send(
                send, HTTPStatus.SERVICE_UNAVAILABLE, detail, {"Retry-After": "1", "Connection": "close"}
            )

    def _refused(self, scope: Scope) -> tuple[HTTPStatus, str] | None:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1:
            # HTTP/1.0 does not require it, and no browser speaks that.
            old = not given and scope["http_version"] == "1.0"
            return None if old else (HTTPStatus.BAD_REQUEST, f"{len(given)} Host headers; allowed: one")
        if self._hosts is None:
            return None
        host = _HOST.fullmatch(given[0])
        if host is None:
            return HTTPStatus.BAD_REQUEST, f"Host: {given[0][:80]!r} is no host; allowed: a name or an address"
        name = (host["address"] or host["name"]).lower().removesuffix(".")
        if name in self._hosts or is_local(name):
            return None
        allowed = ", ".join(("localhost, loopback addresses", *sorted(self._hosts)))
        detail = f"Host: {name[:80]!r} is not served here; allowed: {allowed}. PGRECALL_ALLOWED_HOSTS adds others"
        return HTTPStatus.MISDIRECTED_REQUEST, detail


def hosts(setting: str | None, listening: str) -> frozenset[str] | None:
    """PGRECALL_ALLOWED_HOSTS for a server that listens on this address; None stands for any.

    By default only this machine's own names where nobody else reaches the server, and any elsewhere.
    """
    if setting is None:
        return frozenset() if is_local(listening) else None
    names = frozenset(name.strip().strip("[]").lower() for name in setting.split(","))
    return None if "*" in names else names


@lru_cache(maxsize=1_000)
def is_local(host: str) -> bool:
    """Whether this name or address can only mean the machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Who is asking: the key of a request, what it allows, and whose rows it is about.

Each route says which scope it needs (`needs`); the guard in front of all of them refuses requests whose key has another. The
tenant of a key goes into the request where the request names none, and must agree where it names one: in the query before
it is parsed, in the path, and in the body as it is decoded (`body.StrictRequest`), so that no handler can forget to ask.
"""

import ipaddress
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote

import msgspec
from litestar import Request
from litestar.enums import ScopeType
from litestar.handlers import HTTPRouteHandler
from litestar.middleware import ASGIMiddleware
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import ASGIApp, Message, Receive, Send
from litestar.types import Scope as Connection

from app.api import operations, parameters
from app.api.service import Service
from app.errors import BadInput, LimitReached, NotAllowed, NotAuthenticated
from app.keys import Caller, Scope, token_of
from app.tenants import LeftOut

NEEDED = "needed_scope"
KEYED = "never_without_a_key"
_STREAMS = "streams"
_LIMIT = "limit"
_ENDS_IN = "minute_ends_in"

COMPONENTS = Components(
    security_schemes={
        "key": SecurityScheme(
            type="http",
            scheme="bearer",
            bearer_format="pgr_…",
            description="A key made with `pgrecall key create`. While the database has none, none is asked for (docs/keys.md).",
        )
    },
    headers={**operations.HEADERS},
)

MINUTE = 60
"""Seconds in which a key's requests are counted."""

UNSAFE = (
    "this address can be reached by others and there is no key yet: make one (`pgrecall key create`), listen on loopback, or "
    "start with --insecure behind something that checks who is asking"
)


def needs(scope: Scope, opt: Mapping[str, Any] | None = None, *, keyed: bool = False) -> dict[str, Any]:
    """Arguments of a route: the scope a key needs for it. `keyed`: it is not served without a key, also in open mode."""
    return {"opt": {NEEDED: scope, KEYED: keyed, **(opt or {})}, "security": [{"key": [scope]}]}


class KeyGuard(ASGIMiddleware):
    """Asks for a key on every route that needs a scope, counts the request, and puts the caller into `request.user`."""

    scopes = (ScopeType.HTTP,)

    async def handle(self, scope: Connection, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Pass the request on. Raises NotAuthenticated, NotAllowed, LimitReached."""
        handler = scope["route_handler"]
        needed = handler.opt.get(NEEDED)
        if needed is None:
            await next_app(scope, receive, send)
            return
        service: Service = scope["litestar_app"].state.service
        caller = await service.keys.caller(token_of(scope["headers"]))
        scope["user"] = caller
        if caller is None:
            _check_open(scope, handler, service)
        else:
            await _count(scope, service, caller)
            if needed not in caller.scopes:
                raise NotAllowed(
                    f"this needs a key with the scope {needed}; this key has {', '.join(sorted(caller.scopes))}"
                )
            if caller.tenant_id is not None and isinstance(handler, HTTPRouteHandler):
                _name_tenant(scope, handler, caller.tenant_id)
        try:
            await next_app(scope, receive, send)
        finally:
            for ended in scope["state"].pop(_STREAMS, ()):
                ended()


async def _count(scope: Connection, service: Service, caller: Caller) -> None:
    if caller.requests_per_minute is not None:
        scope["state"][_LIMIT] = caller.requests_per_minute
    try:
        await service.limits.request(caller)
    except LimitReached as reached:
        scope["state"][_ENDS_IN] = reached.retry_after
        raise


async def tell_limit(message: Message, scope: Connection) -> None:
    """Say in an answer what its key's limit is, and that it is reached, after draft-ietf-httpapi-ratelimit-headers-11.

    How many requests are left before that is not said: other processes take their shares without this one's knowing.
    """
    limit = scope["state"].get(_LIMIT)
    if limit is None or message["type"] != "http.response.start":
        return
    headers = [*message["headers"], (b"ratelimit-policy", f'"requests";q={limit};w={MINUTE}'.encode())]
    if (ends_in := scope["state"].get(_ENDS_IN)) is not None:
        headers.append((b"ratelimit", f'"requests";r=0;t={ends_in}'.encode()))
    message["headers"] = headers


def _check_open(scope: Connection, handler: Any, service: Service) -> None:
    if handler.opt[KEYED]:
        raise NotAuthenticated(
            "this needs a key with the scope admin, and there is none yet: pgrecall key create --scope admin"
        )
    server = scope.get("server")
    if service.settings.auth != "insecure" and server is not None and _reached_by_others(server[0]):
        raise NotAuthenticated(UNSAFE)


@lru_cache(maxsize=1_000)
def _reached_by_others(host: str) -> bool:
    """Whether a connection came to an address that is not loopback; what is no address is no socket either."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_loopback


def _name_tenant(scope: Connection, handler: HTTPRouteHandler, tenant_id: str) -> None:
    if "tenant_id" not in parameters.accepted(handler)[0]:
        return
    query = scope["query_string"]
    if all(name != "tenant_id" for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)):
        named = f"tenant_id={quote(tenant_id, safe='')}".encode()
        scope["query_string"] = query + b"&" + named if query else named


def check_tenant(request: Request[Any, Any, Any]) -> None:
    """Raise NotAllowed where the query or the path names another tenant than the key's."""
    caller = caller_of(request)
    if caller is None or caller.tenant_id is None:
        return
    for named in (request.query_params.get("tenant_id"), request.path_params.get("tenant_id")):
        if named is not None and named != caller.tenant_id:
            raise _other("tenant_id")


def caller_of(request: Request[Any, Any, Any]) -> Caller | None:
    """Who is asking, None in open mode."""
    caller: Caller | None = request.scope.get("user")
    return caller


def settle_tenant(data: Any, caller: Caller | None, path: str = "") -> None:
    """Name the key's tenant in a body that names none, in each of its parts that can.

    Raises NotAllowed where another one is named, BadInput where neither the body nor the key names one.
    """
    if not isinstance(data, msgspec.Struct):
        return
    bound = None if caller is None else caller.tenant_id
    for name in data.__struct_fields__:
        value, place = getattr(data, name), f"{path}{name}"
        if name == "tenant_id":
            if value is None or isinstance(value, LeftOut):
                if bound is not None:
                    data.tenant_id = bound  # type: ignore[attr-defined]  # it is one of its fields
                elif value is not None:
                    raise BadInput(place, "is missing; it is required")
            elif bound is not None and value != bound:
                raise _other(place)
        elif isinstance(value, list) and value and hasattr(value[0], "tenant_id"):
            for index, each in enumerate(value):
                settle_tenant(each, caller, f"{place}[{index}].")


def _other(place: str) -> NotAllowed:
    return NotAllowed(f"{place}: is not the tenant of this key; leave it out, or use a key of that tenant")


async def open_stream(request: Request[Any, Any, Any], service: Service) -> None:
    """Count a stream until the answer to this request has ended. Raises LimitReached."""
    ended: Callable[[], None] = await service.limits.open_stream(caller_of(request))
    request.scope["state"].setdefault(_STREAMS, []).append(ended)


def check_routes(handlers: list[HTTPRouteHandler]) -> None:
    """Raise TypeError for a route that does not say what it needs."""
    for handler in handlers:
        if NEEDED not in handler.opt:
            raise TypeError(f"the route {handler.operation_id} does not say which scope it needs")

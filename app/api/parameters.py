"""What a request may say beside its body: query parameters that its route knows, once each, and a type for its body."""

import re
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.params import QueryParameter

from app.errors import BadInput

MAX_PAGE = 1_000

# The range is checked in the handler, whose message names both ends.
Limit = Annotated[
    int,
    QueryParameter(
        description=f"How many make a page, 1 to {MAX_PAGE:,}.", schema_extra={"minimum": 1, "maximum": MAX_PAGE}
    ),
]
After = Annotated[str | None, QueryParameter(description="`next` of the page before.")]


_BLANK_FOR_PLUS = re.compile(r"T\S+ \d\d:?\d\d")
"""What is left of +02:00 in a query string that was not percent-encoded."""
_KINDS = {int: "a whole number", bool: "true or false"}


def check(request: Request[Any, Any, Any]) -> None:
    """Raise BadInput, or 415.

    A misspelt filter must not widen a deletion, nor a second tenant_id overrule the one a proxy has looked at.
    """
    known, has_body = accepted(request.route_handler)
    _check_encoding(request.scope["query_string"])
    for name in request.query_params:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise BadInput(name[:60], f"there is no such parameter on this route; allowed: {allowed}")
        if name != "doc_type" and len(request.query_params.getall(name)) > 1:
            raise BadInput(name, "is given more than once")
        _check_value(name, request.query_params[name], _taken(request.route_handler)[name])
    coding = request.headers.get("Content-Encoding", "identity")
    if request.method in {"POST", "PUT"} and coding.lower() != "identity":
        raise HTTPException(
            f"Content-Encoding: {coding[:80]!r} is not taken; allowed: a body as it is",
            status_code=415,
            headers={"Accept-Encoding": "identity"},
        )
    # A page of another site can send a body of any other type to a server on this machine.
    if has_body and request.content_type[0] != "application/json":
        raise HTTPException("the body must be application/json, and Content-Type say so", status_code=415)


def _check_encoding(query: bytes) -> None:
    """What is not UTF-8 would be read with replacement characters, and a filter ask for those."""
    try:
        unquote_to_bytes(query).decode()
    except UnicodeDecodeError:
        for name, value in parse_qsl(query.decode("latin-1"), encoding="latin-1"):
            try:
                f"{name}={value}".encode("latin-1").decode()
            except UnicodeDecodeError:
                raise BadInput(
                    name[:60] if name.isascii() else "", "is not UTF-8; allowed: percent-encoded UTF-8"
                ) from None
        raise BadInput("", "the query is not UTF-8; allowed: percent-encoded UTF-8") from None


def _check_value(name: str, value: str, taken: "_Taken") -> None:
    """Raise BadInput for a value that Litestar would refuse without saying what is allowed."""
    if taken.texts and value not in taken.texts:
        raise BadInput(name, f"is {value[:80]!r}; allowed: {', '.join(map(repr, taken.texts))}")
    if datetime in taken.kinds and _BLANK_FOR_PLUS.search(value):
        raise BadInput(name, "has a blank before its time zone; allowed: + written as %2B, or a moment that ends in Z")
    for kind, words in _KINDS.items():
        if kind in taken.kinds:
            try:
                msgspec.convert(value, kind, strict=False)
            except msgspec.ValidationError:
                raise BadInput(name, f"is {value[:80]!r}; allowed: {words}{taken.limits}") from None


class _Taken(NamedTuple):
    """What a query parameter may be: its types, the texts it is one of, its range in words."""

    kinds: frozenset[Any]
    texts: list[str]
    limits: str


@lru_cache(maxsize=100)
def accepted(handler: HTTPRouteHandler) -> tuple[list[str], bool]:
    """The names of a route's query parameters, and whether it takes a body."""
    return list(_taken(handler)), "data" in handler.parsed_fn_signature.parameters


@lru_cache(maxsize=100)
def _taken(handler: HTTPRouteHandler) -> dict[str, _Taken]:
    """A route's query parameters by name."""
    found = {}
    for name, each in handler.parsed_fn_signature.parameters.items():
        given = each.kwarg_definition
        if isinstance(given, QueryParameter):
            parts, extra = list(_parts(each.annotation)), given.schema_extra or {}
            limits = f" from {extra['minimum']:,} to {extra['maximum']:,}" if "minimum" in extra else ""
            texts = [part for part in parts if isinstance(part, str)]
            found[given.name or name] = _Taken(frozenset(parts), texts, limits)
    return found


def _parts(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal or not get_args(annotation):
        yield from get_args(annotation) or (annotation,)
    else:
        for each in get_args(annotation):
            yield from _parts(each)

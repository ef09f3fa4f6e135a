"""What a request may say beside its body: query parameters that its route knows, once each, and a type for its body."""

import re
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args, get_origin

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


def check(request: Request[Any, Any, Any]) -> None:
    """Raise BadInput, or 415.

    A misspelt filter must not widen a deletion, nor a second tenant_id overrule the one a proxy has looked at.
    """
    known, has_body = accepted(request.route_handler)
    for name in request.query_params:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise BadInput(name[:60], f"there is no such parameter on this route; allowed: {allowed}")
        if name != "doc_type" and len(request.query_params.getall(name)) > 1:
            raise BadInput(name, "is given more than once")
        value, kinds = request.query_params[name], _kinds(request.route_handler)[name]
        if (values := [each for each in kinds if isinstance(each, str)]) and value not in values:
            raise BadInput(name, f"is {value[:80]!r}; allowed: {', '.join(map(repr, values))}")
        if datetime in kinds and _BLANK_FOR_PLUS.search(value):
            raise BadInput(
                name, "has a blank before its time zone; allowed: + written as %2B, or a moment that ends in Z"
            )
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


@lru_cache(maxsize=100)
def accepted(handler: HTTPRouteHandler) -> tuple[list[str], bool]:
    """The names of a route's query parameters, and whether it takes a body."""
    parameters = handler.parsed_fn_signature.parameters
    defined = ((name, each.kwarg_definition) for name, each in parameters.items())
    known = [given.name or name for name, given in defined if isinstance(given, QueryParameter)]
    return known, "data" in parameters


@lru_cache(maxsize=100)
def _kinds(handler: HTTPRouteHandler) -> dict[str, list[Any]]:
    """For each of a route's query parameters its types, and the texts it has to be one of."""
    parameters = handler.parsed_fn_signature.parameters
    return {
        each.kwarg_definition.name or name: list(_parts(each.annotation))
        for name, each in parameters.items()
        if isinstance(each.kwarg_definition, QueryParameter)
    }


def _parts(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal or not get_args(annotation):
        yield from get_args(annotation) or (annotation,)
    else:
        for each in get_args(annotation):
            yield from _parts(each)

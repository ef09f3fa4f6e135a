"""What a request may say beside its body: query parameters that its route knows, once each, and a type for its body."""

from functools import lru_cache
from typing import Annotated, Any

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

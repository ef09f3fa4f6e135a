"""Every error as an RFC 9457 problem, mapped once; no driver's or upstream's text gets out."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.plugins.problem_details import ProblemDetailsConfig, ProblemDetailsException, ProblemDetailsPlugin
from litestar.types import Send
from msgspec import Meta, Struct

from app import errors, keys
from app.api import faults

log = logging.getLogger(__name__)

STATUS: Mapping[type[errors.PgrecallError], HTTPStatus] = {
    errors.BadInput: HTTPStatus.BAD_REQUEST,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.BudgetSpent: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.NotAuthenticated: HTTPStatus.UNAUTHORIZED,
    errors.NotAllowed: HTTPStatus.FORBIDDEN,
    errors.LimitReached: HTTPStatus.TOO_MANY_REQUESTS,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.VersionConflict: HTTPStatus.PRECONDITION_FAILED,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StorageFull: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.TimedOut: HTTPStatus.GATEWAY_TIMEOUT,
    errors.UpstreamFailed: HTTPStatus.BAD_GATEWAY,
    errors.SetupError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.PgrecallError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The nearest entry in an error's ancestry decides."""

MEDIA_TYPE = "application/problem+json"
_IN_THE_LOG = "something unexpected went wrong; the log has it under this request's X-Request-ID"
_MISSING = re.compile(r"^Missing required \w+ parameter '([^']+)'")
"""Litestar names a missing parameter in its message only."""


_NAMES = {"in_state": "state", "if_match": "If-Match", "if_none_match": "If-None-Match"}
"""Parameters whose names are other ones in Python."""


def _type(name: str) -> str:
    return "urn:pgrecall:problem:" + "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def _status(error: type[errors.PgrecallError]) -> HTTPStatus:
    return next(STATUS[kind] for kind in error.__mro__ if kind in STATUS)


def _ours(error: errors.PgrecallError) -> ProblemDetailsException:
    if isinstance(error, errors.BadInput):
        return _refused([error])
    return _problem(error, str(error), _headers(error))


def _headers(error: errors.PgrecallError) -> dict[str, str] | None:
    match error:
        case errors.Unavailable() | errors.LimitReached():
            return {"Retry-After": str(error.retry_after)}
        case errors.NotAuthenticated():
            return {"WWW-Authenticate": 'Bearer realm="pgrecall"'}
    return None


def _refused(found: list[errors.BadInput]) -> ProblemDetailsException:
    listed = [Fault(each.field, each.fault) for each in found]
    extra = {"faults": listed} | ({"field": found[0].field} if found[0].field else {})
    return _problem(found[0], "; ".join(map(str, found)), None, extra)


def _problem(
    error: errors.PgrecallError, detail: str, headers: dict[str, str] | None, extra: dict[str, Any] | None = None
) -> ProblemDetailsException:
    return ProblemDetailsException(
        status_code=_status(type(error)),
        type_=_type(type(error).__name__),
        title=(type(error).__doc__ or "").split("\n", 1)[0].rstrip("."),
        detail=detail,
        headers=headers,
        extra=extra,
    )


def _frameworks(error: HTTPException) -> ProblemDetailsException:
    if isinstance(error, ProblemDetailsException):
        return error
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return _refused(_found(error))
    status = HTTPStatus(error.status_code)
    detail = error.detail
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = sorted((error.headers or {}).get("allow", "GET").split(", "))
        detail = f"this path does not take this method; allowed: {', '.join(allowed)}"
    elif detail == HTTPStatus.NOT_FOUND.phrase:
        detail = "there is no such path; /docs lists all"
    return ProblemDetailsException(
        status_code=status, type_=_phrase(status), title=status.phrase, detail=detail, headers=error.headers
    )


def _phrase(status: HTTPStatus) -> str:
    return _type(status.phrase.title().replace(" ", "").replace("-", ""))


def _found(error: HTTPException) -> list[errors.BadInput]:
    if missing := _MISSING.search(error.detail):
        return [errors.BadInput(missing[1], "is missing; it is required")]
    listed = error.extra if isinstance(error.extra, list) else []
    return [
        errors.BadInput(_named(each), faults.worded(each["message"]))
        for each in listed
        if isinstance(each, dict) and "message" in each
    ] or [errors.BadInput("", error.detail)]


def _named(fault: Mapping[str, Any]) -> str:
    key: str = fault.get("key", "")
    return _NAMES.get(key, key)


def described(error: Exception) -> "Problem":
    """The problem an error is, for a line of a stream, whose status has been sent; logged as its answer would be."""
    if isinstance(error, errors.PgrecallError):
        made = _logged(error)
    else:
        made = _frameworks(error) if isinstance(error, HTTPException) else _unexpected(error)
    extra = made.extra if isinstance(made.extra, dict) else {}
    return Problem(made.type_ or "", made.title or "", made.status_code, made.detail, **extra)


async def send(send: Send, status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None) -> None:
    """Answer with a problem where there is no application to do it."""
    body = encoded(status, detail)
    said = {"Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **(headers or {})}
    listed = [(name.lower().encode(), value.encode()) for name, value in said.items()]
    await send({"type": "http.response.start", "status": status, "headers": listed})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def encoded(status: HTTPStatus, detail: str) -> bytes:
    """A problem's JSON."""
    if status == HTTPStatus.BAD_REQUEST:
        return msgspec.json.encode(_sample(status, errors.BadInput("", detail)))
    return msgspec.json.encode(Problem(_phrase(status), status.phrase, status, detail))


def _unexpected(error: Exception) -> ProblemDetailsException:
    if isinstance(error, ValueError) and str(error).endswith("is out of range"):
        # msgspec takes a number in a query parameter for a moment and lets datetime's complaint through.
        return _ours(errors.BadInput("", f"a moment's {error}; allowed: ISO 8601 such as 2026-01-31T12:00:00Z"))
    log.error("unexpected error", exc_info=error)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return ProblemDetailsException(status_code=status, type_=_phrase(status), title=status.phrase, detail=_IN_THE_LOG)


def _kinds(error: type[errors.PgrecallError] = errors.PgrecallError) -> Iterator[type[errors.PgrecallError]]:
    yield error
    for each in error.__subclasses__():
        if each.__module__ == errors.__name__:  # those of commands do not answer requests
            yield from _kinds(each)


TYPES: Mapping[str, HTTPStatus] = {_type(kind.__name__): _status(kind) for kind in _kinds()} | {
    _phrase(status): status
    for status in (
        HTTPStatus.NOT_FOUND,
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.MISDIRECTED_REQUEST,
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
}
"""Every problem there is, and its status."""


class Fault(Struct):
    """What is wrong and what is allowed.

    `field` is the path of a value, such as documents[3].content, a parameter or a header; empty for the whole body.
    """

    field: str
    fault: str


class Problem(Struct, omit_defaults=True):
    """RFC 9457. Where the request is at fault `faults` holds what was found, and `field` is the first one's."""

    type: Annotated[
        str,
        Meta(
            description="A later release may know more than "
            + ", ".join(f"{urn} ({status.value})" for urn, status in sorted(TYPES.items(), key=lambda each: each[1]))
        ),
    ]
    title: str
    status: int
    detail: str
    field: str | None = None
    faults: list[Fault] | None = None


def _sample(status: HTTPStatus, error: errors.PgrecallError) -> Problem:
    made = _ours(error)
    return Problem(made.type_ or "", made.title or "", status, made.detail, **(made.extra or {}))  # type: ignore[arg-type]


_EXAMPLES: Mapping[HTTPStatus, Problem] = {
    status: _sample(status, error)
    for status, error in (
        (HTTPStatus.BAD_REQUEST, errors.BadInput("top_k", "is 500; allowed: 1 to 100")),
        (HTTPStatus.UNAUTHORIZED, errors.NotAuthenticated(keys.REFUSED)),
        (HTTPStatus.FORBIDDEN, errors.NotAllowed("this needs a key with the scope write; this key has read")),
        (HTTPStatus.TOO_MANY_REQUESTS, errors.LimitReached("600 requests a minute are what this key may make")),
        (HTTPStatus.NOT_FOUND, errors.NotFound("there is no document 'faq/password' in tenant 'acme'")),
        (HTTPStatus.PRECONDITION_FAILED, errors.VersionConflict()),
        (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, errors.TooLarge("id", "is 600 bytes; allowed: 1 to 512 bytes in UTF-8")),
        (HTTPStatus.BAD_GATEWAY, errors.EmbeddingFailed()),
        (HTTPStatus.SERVICE_UNAVAILABLE, errors.PoolExhausted()),
        (HTTPStatus.GATEWAY_TIMEOUT, errors.TimedOut()),
        (HTTPStatus.INSUFFICIENT_STORAGE, errors.StorageFull()),
    )
} | {
    status: Problem(_phrase(status), status.phrase, status, detail)
    for status, detail in (
        (HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive whole within 60 seconds"),
        (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json, and Content-Type say so"),
        (HTTPStatus.MISDIRECTED_REQUEST, "Host: 'example.com' is not served here"),
        (
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            "request line and headers are too large; allowed: at most 65536 bytes",
        ),
        (HTTPStatus.INTERNAL_SERVER_ERROR, _IN_THE_LOG),
    )
}

BODY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
"""Of routes that take a body."""
KEYED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
"""Of routes that ask for a key."""
BARE = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.MISDIRECTED_REQUEST,
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
"""Of every route, whatever it does: the server has them before the application, and where it shuts down."""
ANY = (
    *BARE,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.GATEWAY_TIMEOUT,
    HTTPStatus.INSUFFICIENT_STORAGE,
)
"""Of every route that asks the database."""


def documented(*more: HTTPStatus, always: Iterable[HTTPStatus] = (*ANY, *KEYED)) -> dict[int, ResponseSpec]:
    """The problems of a route: those that it always may have, and more."""
    return {
        status.value: ResponseSpec(
            Problem,
            description=status.phrase,
            media_type=MEDIA_TYPE,
            generate_examples=False,
            examples=[Example(status.phrase, value=_EXAMPLES[status])],
        )
        for status in sorted((*always, *more))
    }


def _logged(error: errors.PgrecallError) -> ProblemDetailsException:
    problem = _ours(error)
    if problem.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        # A cause outside of this program is told in a line; the way there is always the same.
        cause = str(error.__cause__ or "").strip().splitlines()
        log.warning("%s: %s%s", type(error).__name__, error, f" ({cause[-1].strip()})" if cause else "")
    return problem


plugin = ProblemDetailsPlugin(
    ProblemDetailsConfig(
        exception_to_problem_detail_map={
            errors.PgrecallError: _logged,
            HTTPException: _frameworks,
            Exception: _unexpected,
        }
    )
)

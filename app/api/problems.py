"""Every error as an RFC 9457 problem, mapped once; no driver's or upstream's text gets out."""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.plugins.problem_details import ProblemDetailsConfig, ProblemDetailsException, ProblemDetailsPlugin
from msgspec import Struct

from app import errors

log = logging.getLogger(__name__)

STATUS: Mapping[type[errors.PgrecallError], HTTPStatus] = {
    errors.BadInput: HTTPStatus.BAD_REQUEST,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.VersionConflict: HTTPStatus.PRECONDITION_FAILED,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.TimedOut: HTTPStatus.GATEWAY_TIMEOUT,
    errors.UpstreamFailed: HTTPStatus.BAD_GATEWAY,
    errors.SetupError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.PgrecallError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The nearest entry in an error's ancestry decides."""


_MISSING = re.compile(r"^Missing required \w+ parameter '([^']+)'")
"""Litestar names a missing parameter in its message only."""


def _type(name: str) -> str:
    return "urn:pgrecall:problem:" + "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def _ours(error: errors.PgrecallError) -> ProblemDetailsException:
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    extra: dict[str, Any] = {}
    if isinstance(error, errors.BadInput) and error.field:
        extra["field"] = error.field
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, errors.Unavailable) else None
    return ProblemDetailsException(
        status_code=status,
        type_=_type(type(error).__name__),
        title=(type(error).__doc__ or "").split("\n", 1)[0].rstrip("."),
        detail=str(error),
        headers=headers,
        extra=extra or None,
    )


def _frameworks(error: HTTPException) -> ProblemDetailsException:
    if isinstance(error, ProblemDetailsException):
        return error
    status = HTTPStatus(error.status_code)
    detail, extra = error.detail, {}
    found = error.extra if isinstance(error.extra, list) else []
    missing = _MISSING.search(detail)
    if missing:
        found = [{"key": missing[1], "message": "is missing"}]
    faults = [
        {"field": fault.get("key", ""), "fault": fault["message"]}
        for fault in found
        if isinstance(fault, dict) and "message" in fault
    ]
    if faults:
        detail = "; ".join(
            f"{fault['field']}: {fault['fault']}" if fault["field"] else fault["fault"] for fault in faults
        )
        extra = {"field": faults[0]["field"], "faults": faults}
    return ProblemDetailsException(
        status_code=status,
        type_=_type(status.phrase.title().replace(" ", "").replace("-", "")),
        title=status.phrase,
        detail=detail,
        headers=error.headers,
        extra=extra or None,
    )


def _not_utf8(_: UnicodeDecodeError) -> ProblemDetailsException:
    # Litestar's JSON decoder lets this one through.
    return _ours(errors.BadInput("", "the body is not UTF-8; allowed: JSON in UTF-8"))


def _too_deep(_: RecursionError) -> ProblemDetailsException:
    return _ours(errors.BadInput("", "the body is nested too deeply; allowed: JSON of a few levels"))


def _unexpected(error: Exception) -> ProblemDetailsException:
    if isinstance(error, ValueError) and str(error).endswith("is out of range"):
        # msgspec takes a number for a moment and lets datetime's complaint through.
        return _ours(errors.BadInput("", f"a moment's {error}; allowed: ISO 8601 such as 2026-01-31T12:00:00Z"))
    log.error("unexpected error", exc_info=error)
    return ProblemDetailsException(
        status_code=HTTPStatus.INTERNAL_SERVER_ERROR,
        type_=_type("InternalServerError"),
        title=HTTPStatus.INTERNAL_SERVER_ERROR.phrase,
        detail="something unexpected went wrong; the log has it under this request's X-Request-ID",
    )


class Problem(Struct, omit_defaults=True):
    """RFC 9457. `field` names the value at fault, where one is."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None


def _documented(status: HTTPStatus, error: errors.PgrecallError) -> ResponseSpec:
    found = _ours(error)
    example = Problem(found.type_ or "", found.title or "", status, found.detail, getattr(error, "field", None))
    return ResponseSpec(
        Problem,
        description=status.phrase,
        media_type="application/problem+json",
        generate_examples=False,
        examples=[Example(status.phrase, value=example)],
    )


DOCUMENTED = {
    status.value: _documented(status, error)
    for status, error in (
        (HTTPStatus.BAD_REQUEST, errors.BadInput("top_k", "Expected `int` <= 100")),
        (HTTPStatus.SERVICE_UNAVAILABLE, errors.PoolExhausted()),
    )
}
"""Problems any route may answer with; the rest differ in `type` and `status` only."""


def _logged(error: errors.PgrecallError) -> ProblemDetailsException:
    problem = _ours(error)
    if problem.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        # A cause outside of this program is told in a line; the way there is always the same.
        cause = str(error.__cause__ or "").strip().splitlines()
        log.warning("%s: %s%s", type(error).__name__, error, f" ({cause[-1]})" if cause else "")
    return problem


plugin = ProblemDetailsPlugin(
    ProblemDetailsConfig(
        exception_to_problem_detail_map={
            errors.PgrecallError: _logged,
            HTTPException: _frameworks,
            UnicodeDecodeError: _not_utf8,
            RecursionError: _too_deep,
            Exception: _unexpected,
        }
    )
)

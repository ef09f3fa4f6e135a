"""What the OpenAPI document says of a route beyond what its handler shows: headers of answers, and the stream."""

from dataclasses import dataclass

from litestar.openapi.spec import (
    Example,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)
from litestar.openapi.spec.enums import OpenAPIType

from app.api.schemas import sole

_EVENTS = """\
event: sources
data: {"sources": [{"source": 1, "id": "faq/password", …}]}

data: {"token": "Open Settings"}

data: {"token": " and choose Security [Source 1]."}

event: usage
data: {"model": "gpt-4o-mini", "usage": {…}, "cited": [1], "miscited": []}

data: [DONE]

"""
_LINES = """\
{"id": "faq/password", "content": "To reset your password, open Settings and choose Security."}
{"id": "faq/2fa", "content": "Use a key.", "metadata": {"lang": "en"}}
"""
_STREAM = """\
With `"stream": true`, server-sent events: `sources` first, with the sources as in the whole answer; then one without a \
name for each piece, `{"token": …}`; then `usage`, with `model`, `usage`, `cited` and `miscited`, or `error`, with `title` and \
`detail`, where the answer ends unfinished; and `data: [DONE]` last."""


REQUEST_ID = "X-Request-ID"
HEADERS = {
    REQUEST_ID: OpenAPIHeader(
        description="The request's own, or a new one. It stands in the log.", schema=Schema(type=OpenAPIType.STRING)
    )
}
"""Of the document's components."""
BEFORE_THE_APPLICATION = {"421", "431"}
"""Answers of the server, which have no id."""

_POLICY = 'With a key that has a limit: q requests in each w seconds, such as "requests";q=600;w=60.'
_REACHED = (
    'Where it is the limit of requests that is reached: none are left for t seconds, such as "requests";r=0;t=17.'
)


def _without_null(schema: Schema) -> Schema | Reference:
    if schema.one_of:
        kinds = schema.one_of
        schema.one_of = [each for each in kinds if not (isinstance(each, Schema) and each.type == OpenAPIType.NULL)]
    if isinstance(schema.type, list):
        kept = [each for each in schema.type if each != OpenAPIType.NULL]
        schema.type = kept[0] if len(kept) == 1 else kept
    if schema.enum:
        schema.enum = [each for each in schema.enum if each is not None]
    return sole(schema)


@dataclass
class Described(Operation):
    """A route of ours, with the headers of its answers. A parameter that may be left out is not null: none can be sent."""

    def __post_init__(self) -> None:
        for parameter in self.parameters or ():
            if isinstance(parameter, Parameter) and isinstance(parameter.schema, Schema):
                parameter.schema = _without_null(parameter.schema)
        self._add("503", "Retry-After", OpenAPIType.INTEGER, "Seconds after which to try again, where known.")
        for status in ("429", "507"):
            self._add(status, "Retry-After", OpenAPIType.INTEGER, "Seconds after which to try again.")
        self._add("401", "WWW-Authenticate", OpenAPIType.STRING, "Bearer: a key is asked for.")
        self._add("429", "RateLimit", OpenAPIType.STRING, _REACHED)
        for status in ("200", "201", "202", "429"):
            self._add(status, "RateLimit-Policy", OpenAPIType.STRING, _POLICY)
        for status in (self.responses or {}).keys() - BEFORE_THE_APPLICATION:
            if response := self._response(status):
                response.headers = {
                    **(response.headers or {}),
                    REQUEST_ID: Reference(f"#/components/headers/{REQUEST_ID}"),
                }
        for parameter in self.parameters or ():
            if isinstance(parameter, Parameter) and (parameter.name, parameter.param_in) == ("tenant_id", "query"):
                parameter.required = False
                parameter.description = f"{parameter.description} May be left out with a key, which names it."

    def _response(self, status: str) -> OpenAPIResponse | None:
        found = (self.responses or {}).get(status)
        return found if isinstance(found, OpenAPIResponse) else None

    def _add(self, status: str, name: str, kind: OpenAPIType, says: str) -> None:
        if response := self._response(status):
            header = OpenAPIHeader(description=says, schema=Schema(type=kind))
            response.headers = {**(response.headers or {}), name: header}


@dataclass
class Tagged(Described):
    """Answers with the document's ETag."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for status in ("200", "201", "202", "304"):
            self._add(status, "ETag", OpenAPIType.STRING, "Of the stored document, for If-Match and If-None-Match.")


@dataclass
class Streamed(Described):
    """Answers with server-sent events on demand."""

    def __post_init__(self) -> None:
        super().__post_init__()
        response = self._response("200")
        if response and response.content is not None:
            # Without a type: to some readers a schema is the whole stream's, a text, to others that of each event.
            schema = Schema(description=_STREAM)
            examples: dict[str, Example | Reference] = {"answer": Example(summary="an answer", value=_EVENTS)}
            response.content["text/event-stream"] = OpenAPIMediaType(schema=schema, examples=examples)


@dataclass
class Conversed(Described):
    """Takes NDJSON while it answers with NDJSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        schema = Schema(
            description="A JSON object a line, as an item of `documents` in `POST /documents`. The body may be of any length.",
            type=OpenAPIType.STRING,
        )
        example = Example(summary="two documents", value=_LINES)
        self.request_body = RequestBody(
            content={"application/x-ndjson": OpenAPIMediaType(schema=schema, examples={"two documents": example})},
            required=True,
        )

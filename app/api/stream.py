"""`POST /documents/stream`: documents as NDJSON of any length, an answer for each as it is stored."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, post
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import QueryParameter
from litestar.response import Stream
from litestar.response.base import ASGIResponse
from litestar.types import Message, Receive, ReceiveMessage, Scope, Send
from msgspec import Struct

from app import tenants
from app.api import faults, guard, operations, problems
from app.api.body import STREAMED
from app.api.documents import ChunkCounts, Item, TenantQuery
from app.api.problems import Problem
from app.api.service import Service
from app.drafts import Draft, check_range
from app.errors import BadInput, TooLarge
from app.feed import Answer, Entry, Feed
from app.keys import Caller
from app.meter import Meter
from app.outcomes import Outcome

MEDIA_TYPE = "application/x-ndjson"
MAX_LINE = 16_000_000
"""Bytes of a line, as of the body that puts one document."""
LINES_AT_ONCE = 50
"""After so many lines other requests have their turn."""
MAX_BUDGET = 10**12


class Line(Struct, kw_only=True, omit_defaults=True):
    """What became of a line. `error` is a problem as it would answer a request with this document alone."""

    line: int
    id: str | None
    status: Literal["created", "updated", "unchanged", "failed"]
    version: int | None = None
    chunks: ChunkCounts | None = None
    error: Problem | None = None


class Summary(Struct, kw_only=True, omit_defaults=True):
    """The last line; without it the answer is not whole. `stopped` says why not every line was read; `done` is false then."""

    done: bool
    created: int
    updated: int
    unchanged: int
    failed: int
    tokens: int
    stopped: Problem | None = None


_STORED = Line(line=1, id="faq/password", status="created", version=1, chunks=ChunkCounts(1, 0, 0))
_SUMMARY = Summary(done=True, created=1, updated=0, unchanged=0, failed=0, tokens=13)

MaxTokens = Annotated[
    int | None,
    QueryParameter(
        name="max_tokens",
        description="Stop before more tokens than this are embedded.",
        schema_extra={"minimum": 0, "maximum": MAX_BUDGET},
    ),
]
Answers = Annotated[
    Literal["all", "faults"],
    QueryParameter(
        name="answers",
        description="faults: lines only for what is not stored, for clients that read nothing before they have sent all.",
    ),
]


class Conversation(Stream):
    """A stream that is made while the request's body is still read.

    Litestar's own listens to the connection in order to end with it, and takes the body's pieces away.
    """

    def to_asgi_response(self, *given: Any, **named: Any) -> ASGIResponse:
        """As Stream's, listening to nothing."""
        response = super().to_asgi_response(*given, **named)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001  the body is read elsewhere
            over = asyncio.Event()

            async def sent(message: Message) -> None:
                await send(message)
                if message["type"] == "http.response.body" and not message["more_body"]:
                    over.set()

            async def finished() -> ReceiveMessage:
                await over.wait()
                return {"type": "http.disconnect"}

            await response(scope, finished, sent)

        return answer  # type: ignore[return-value]  # Litestar calls it and nothing else


@post(
    "/documents/stream",
    operation_id="stream_documents",
    **guard.needs("write", {STREAMED: True}),
    summary="Store documents as they arrive, any number of them",
    tags=["documents"],
    status_code=200,
    request_max_body_size=None,
    operation_class=operations.Conversed,
    responses=problems.documented(*problems.BODY)
    | {
        200: ResponseSpec(
            Line | Summary,
            description="A line for each as it is stored, the line of its document in `line`; a summary last",
            media_type=MEDIA_TYPE,
            generate_examples=False,
            examples=[Example("stored", value=_STORED), Example("summary", value=_SUMMARY)],
        )
    },
)
async def stream_documents(
    service: NamedDependency[Service],
    request: Request[Any, Any, Any],
    tenant_id: TenantQuery,
    max_tokens: MaxTokens = None,
    answers: Answers = "all",
) -> Conversation:
    """A line at fault is answered with its problem, and the next one is read. Each document is stored whole or not at all."""
    tenants.check(tenant_id)
    if max_tokens is not None:
        check_range("max_tokens", max_tokens, 0, MAX_BUDGET)
    if request.content_type[0] != MEDIA_TYPE:
        raise HTTPException(f"the body must be {MEDIA_TYPE}, and Content-Type say so", status_code=415)
    allowed = _Allowed(service, guard.caller_of(request), Meter(max_tokens))
    await allowed.check()
    await guard.open_stream(request, service)
    feed = Feed(service.database, service.embedder, service.settings, tenant_id, allowed.meter, allowed.check)
    # The first piece before the answer begins: whoever asks to go on (Expect: 100-continue) is told so by its reading.
    parts = request.stream()
    first = await anext(parts, b"")
    return Conversation(_answered(feed, allowed, first, parts, whole=answers == "all"), media_type=MEDIA_TYPE)


@dataclass
class _Allowed:
    """Whether a key is still valid and what its tenant may store, asked before each batch; tokens of those before are charged then."""

    service: Service
    caller: Caller | None
    meter: Meter
    charged: int = 0

    async def check(self) -> None:
        self.charge()
        self.caller = await self.service.keys.still(self.caller)
        await self.service.limits.storing(self.caller)

    def charge(self) -> None:
        spent, self.charged = self.meter.tokens - self.charged, self.meter.tokens
        self.service.limits.spent(self.caller, spent)


async def _answered(
    feed: Feed, allowed: _Allowed, first: bytes, parts: AsyncIterator[bytes], *, whole: bool
) -> AsyncGenerator[bytes, None]:
    counts: Counter[str] = Counter()
    try:
        async for shown in _lines(feed, first, parts, counts, whole=whole):
            yield shown
    finally:
        allowed.charge()
    yield (
        msgspec.json.encode(
            Summary(
                done=feed.stopped is None,
                created=counts["created"],
                updated=counts["updated"],
                unchanged=counts["unchanged"],
                failed=counts["failed"],
                tokens=feed.meter.tokens,
                stopped=None if feed.stopped is None else problems.described(feed.stopped),
            )
        )
        + b"\n"
    )


async def _lines(
    feed: Feed, first: bytes, parts: AsyncIterator[bytes], counts: Counter[str], *, whole: bool
) -> AsyncGenerator[bytes, None]:
    async for several in feed.answers(entries(_chained(first, parts))):
        lines = [_line(answer) for answer in several]
        counts.update(line.status for line in lines)
        shown = b"".join(msgspec.json.encode(line) + b"\n" for line in lines if whole or line.status == "failed")
        if shown:
            yield shown


def _line(answer: Answer) -> Line:
    outcome = answer.outcome
    if isinstance(outcome, Outcome):
        chunks = ChunkCounts(outcome.embedded, outcome.reused, outcome.removed)
        return Line(line=answer.line, id=outcome.id, status=outcome.status, version=outcome.version, chunks=chunks)
    return Line(line=answer.line, id=answer.id, status="failed", error=problems.described(outcome))


async def _chained(first: bytes, parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    yield first
    async for part in parts:
        yield part


async def entries(parts: AsyncIterator[bytes]) -> AsyncGenerator[Entry, None]:
    """The documents of NDJSON that comes in pieces; blank lines count, but are none."""
    number, size = 1, 0
    pieces: list[bytes] = []
    async for part in parts:
        for place, piece in enumerate(part.split(b"\n")):
            if place:  # there was an end of line before it
                if found := _entry(number, size, pieces):
                    yield found
                if number % LINES_AT_ONCE == 0:
                    await asyncio.sleep(0)
                number, size, pieces = number + 1, 0, []
            size += len(piece)
            if size <= MAX_LINE:
                pieces.append(piece)
            else:
                pieces = []
    if found := _entry(number, size, pieces):
        yield found


def _entry(number: int, size: int, pieces: list[bytes]) -> Entry | None:
    if size > MAX_LINE:
        return Entry(number, 0, TooLarge("", f"the line is {size:,} bytes long; allowed: at most {MAX_LINE:,}"))
    line = b"".join(pieces)
    if not line.strip():
        return None
    try:
        return Entry(number, size, Draft(**msgspec.structs.asdict(faults.decoded(line, Item, "line"))))
    except BadInput as fault:
        return Entry(number, size, fault)

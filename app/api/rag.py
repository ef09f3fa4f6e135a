"""`POST /rag`: an answer from the documents with `[Source N]` citations, whole or streamed."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.exceptions import ClientException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body
from litestar.response import Stream
from msgspec import Meta, Struct

from app import questions, rag, search, spaces, tenants, text
from app.api import guard, operations, problems
from app.api.fields import After, Before, DocType, Metadata, TenantId, Threshold, TopK
from app.api.search import FOUND, Rerank, asked, stage
from app.api.service import Service
from app.chat import Usage
from app.drafts import MAX_QUERY_BYTES, check_text
from app.embedding import Embedder
from app.model import Model
from app.rag import Done, Event, Failed, Given, Source, Token, Used
from app.search import Found

MAX_PROMPT_BYTES = 32_000
T = TypeVar("T")


class RagRequest(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A question, and what may be used to answer it."""

    tenant_id: TenantId = msgspec.field(default_factory=tenants.LeftOut)
    question: Annotated[
        str,
        Meta(description=f"1 to {MAX_QUERY_BYTES:,} bytes in UTF-8.", extra_json_schema={"extra": {"minLength": 1}}),
    ]
    system_prompt: Annotated[
        str | None,
        Meta(
            description=f"Replaces the default instructions to the chat model: 1 to {MAX_PROMPT_BYTES:,} bytes in UTF-8.",
            extra_json_schema={"extra": {"minLength": 1}},
        ),
    ] = None
    stream: Annotated[bool, Meta(description="Answer with server-sent events.")] = False
    mode: Annotated[search.Mode, Meta(description="How the sources are searched, as in /search.")] = "vector"
    rerank: Rerank = False
    top_k: TopK = 5
    threshold: Threshold | None = None
    doc_type: DocType = None
    metadata: Metadata = {}
    created_after: After = None
    created_before: Before = None


class RagResponse(Struct):
    """An answer. Every [Source N] in it is one of `sources`; `cited` lists those it uses.

    `miscited`: numbers that the model cited although there is no such source, taken out of the answer.
    """

    answer: str
    sources: list[Source]
    cited: list[int]
    model: str
    usage: Usage | None
    miscited: list[int]


_ASKED = RagRequest(tenant_id="acme", question="How do I reset my password?", doc_type="faq")
_SOURCE = Source(**{name: getattr(FOUND.results[0], name) for name in FOUND.results[0].__slots__}, source=1)
_ANSWER = RagResponse(
    answer="Open Settings and choose Security [Source 1].",
    sources=[_SOURCE],
    cited=[1],
    model="gpt-4o-mini",
    usage=Usage(412, 11, 423),
    miscited=[],
)


@post(
    "/rag",
    operation_id="rag",
    **guard.needs("read"),
    summary="Answer a question from the documents",
    tags=["rag"],
    status_code=200,
    operation_class=operations.Streamed,
    responses=problems.documented(*problems.BODY, HTTPStatus.BAD_GATEWAY)
    | {
        200: ResponseSpec(
            RagResponse, description="The answer", generate_examples=False, examples=[Example("answer", value=_ANSWER)]
        )
    },
)
async def answer_question(
    request: Request[Any, Any, Any],
    service: NamedDependency[Service],
    data: Annotated[RagRequest, Body(examples=[Example("a question", value=_ASKED)])],
) -> Response[Any]:
    """Cites [Source N]; says so when the documents do not hold the answer.

    With `"stream": true` the answer comes as server-sent events: `event: sources` first, then a `data: {"token": …}` for
    each piece, then `event: usage` or `event: error`, and `data: [DONE]` last.
    """
    narrowed = asked(data)
    reranking = stage(service.reranker, data.rerank, data.question)
    if data.system_prompt is not None:
        check_text("system_prompt", data.system_prompt, 1, MAX_PROMPT_BYTES)
    caller = guard.caller_of(request)
    await service.limits.embedding(caller)
    if data.stream:
        await guard.open_stream(request, service)

    async def searched(embedder: Embedder) -> tuple[Embedder, Found]:
        vector = await _attended(request, _question(embedder, data))
        return embedder, await search.search(
            service.database,
            service.settings,
            data.tenant_id,
            vector,
            question=text.plain(data.question),
            top_k=data.top_k,
            threshold=data.threshold,
            conditions=narrowed,
            options=search.Options(mode=data.mode),
            stage=reranking,
            space=Model(embedder.model, embedder.dimensions),
        )

    # All database work ends here: a stream holds no connection.
    embedder, found = await spaces.following(service.database, service.settings, service.embedder, searched)
    parts = (service.chat, embedder, data.question, found.hits)
    options: dict[str, Any] = {"system_prompt": data.system_prompt, "settings": service.settings}
    if data.stream:
        return Stream(
            _sent(rag.stream(*parts, **options), partial(service.limits.spent, caller)),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    answer = await _attended(request, rag.answer(*parts, **options))
    service.limits.spent(caller, answer.usage.total_tokens if answer.usage else 0)
    return Response(
        RagResponse(answer.answer, answer.sources, answer.cited, answer.model, answer.usage, answer.miscited)
    )


async def _attended(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """Do the work as long as the client is there: a model is not to write what nobody will read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientException("the client went away")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))


async def _question(embedder: Embedder, data: RagRequest) -> npt.NDArray[np.float32]:
    ((vector, _),) = await questions.embed(embedder, data.tenant_id, [data.question], ["question"])
    return vector


async def _sent(events: AsyncGenerator[Event], spent: Callable[[int], None]) -> AsyncGenerator[bytes]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Used) and event.usage:
                spent(event.usage.total_tokens)
            yield _frame(event)


def _frame(event: Event) -> bytes:
    match event:
        case Given():
            return _named("sources", {"sources": event.sources})
        case Token():
            return b"data: " + msgspec.json.encode(event) + b"\n\n"
        case Used():
            return _named("usage", event)
        case Failed():
            return _named("error", event)
        case Done():
            return b"data: [DONE]\n\n"


def _named(name: str, data: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"

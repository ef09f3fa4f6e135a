"""`POST /search`: the chunks most similar to a question or a vector."""

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from litestar import post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body
from msgspec import UNSET, Meta, Struct, UnsetType

from app import explanation, filters, questions, rerank, scans, search, spaces, tenants
from app.api import guard, operations, problems
from app.api.fields import (
    After,
    Before,
    DocType,
    EfSearch,
    Metadata,
    Oversampling,
    Query,
    QueryEmbedding,
    TenantId,
    Threshold,
    TopK,
    Weight,
)
from app.api.service import Service
from app.conditions import Conditions
from app.drafts import MAX_DOC_TYPES, MAX_QUERY_BYTES, check_model, check_moment, check_range, check_text, check_vector
from app.embedding import Embedder
from app.errors import BadInput
from app.explanation import Explanation
from app.model import Model
from app.questions import Embedded
from app.rerank import Reranker, Stage
from app.search import Hit, Options, Scan

MAX_SEARCHES = 100
AT_ONCE = 4
"""Searches of a batch under way at the same time, each on a connection of its own."""


class Reranking(Struct, forbid_unknown_fields=True):
    """How to rerank."""

    candidates: Annotated[
        int,
        Meta(
            description="Chunks the reranker scores; at least top_k.",
            extra_json_schema={"extra": {"minimum": 1, "maximum": rerank.MAX_CANDIDATES}},
        ),
    ] = rerank.CANDIDATES


Rerank = Annotated[
    bool | Reranking,
    Meta(description="Have the configured reranker order the candidates by its own score (rerank_score)."),
]


class SearchRequest(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What to search for: `query` (embedded here) or `embedding` (a vector of the database's model)."""

    tenant_id: TenantId = msgspec.field(default_factory=tenants.LeftOut)
    query: Query = None
    embedding: QueryEmbedding = None
    embedding_model: Annotated[
        str | None,
        Meta(
            description="Name of the model `embedding` is of; refused unless it is the one whose vectors are searched."
        ),
    ] = None
    top_k: TopK = 10
    threshold: Threshold | None = None
    doc_type: DocType = None
    metadata: Metadata = {}
    created_after: After = None
    created_before: Before = None
    mode: Annotated[
        search.Mode,
        Meta(
            description="vector: by meaning. text: by the words of `query` (BM25). hybrid: both, fused in one statement."
        ),
    ] = "vector"
    fusion: Annotated[
        Literal["rrf", "relative"],
        Meta(
            description="How hybrid joins its legs. relative: similarity and BM25 of every chunk that either leg found, "
            "each brought to 0..1, and nearness to the best of them. rrf: reciprocal ranks (k = 60)."
        ),
    ] = "relative"
    vector_weight: Weight = 1.0
    text_weight: Weight = 1.0
    diversity: Annotated[
        float,
        Meta(
            description="How much a hit's likeness to those above it counts against it (maximal marginal relevance).",
            extra_json_schema={"extra": {"minimum": 0, "maximum": 1}},
        ),
    ] = 0.0
    rerank: Rerank = False
    group_by: Annotated[Literal["id"] | None, Meta(description="id: the best chunk of each document.")] = None
    exact: Annotated[bool, Meta(description="Measure every chunk that passes instead of walking the index.")] = False
    ef_search: EfSearch = None
    oversampling: Oversampling = None
    rescore: Annotated[
        bool, Meta(description="false: take top_k from the index as it orders them, which is oversampling 1.")
    ] = True
    explain: Annotated[
        bool | Literal["analyze"],
        Meta(description="true: say how the search was done; analyze: run it again and say what PostgreSQL measured."),
    ] = False


class SearchResponse(Struct):
    """Chunks by score (the reranker's where one was asked), best first; ties by id, then by place. `scan`: how they were found."""

    results: list[Hit]
    count: int
    scan: Scan
    explain: Explanation | UnsetType = UNSET


class BatchRequest(Struct, forbid_unknown_fields=True):
    """Searches of one or several tenants."""

    searches: Annotated[
        list[SearchRequest],
        Meta(description="1 to 100.", extra_json_schema={"extra": {"minItems": 1, "maxItems": 100}}),
    ]


class BatchResponse(Struct):
    """An answer for each search, in their order."""

    answers: list[SearchResponse]


class Narrowed(Protocol):
    """What searches and questions have in common."""

    tenant_id: str
    top_k: int
    threshold: float | None
    doc_type: str | list[str] | None
    metadata: dict[str, Any]
    created_after: datetime | None
    created_before: datetime | None


def asked(data: Narrowed) -> Conditions:
    """The filters of a search or a question, whose tenant and numbers are in range. Raises BadInput."""
    tenants.check(data.tenant_id)
    check_range("top_k", data.top_k, 1, search.MAX_TOP_K)
    if data.threshold is not None:
        check_range("threshold", data.threshold, -1, 1)
    return conditions(data.doc_type, data.metadata, data.created_after, data.created_before)


def conditions(
    doc_type: str | list[str] | None,
    metadata: dict[str, Any],
    created_after: datetime | None,
    created_before: datetime | None,
) -> Conditions:
    """The filters of a request. Raises BadInput naming the field at fault."""
    types = [doc_type] if isinstance(doc_type, str) else doc_type
    if types is not None and len(types) > MAX_DOC_TYPES:
        raise BadInput("doc_type", f"has {len(types):,} types; allowed: at most {MAX_DOC_TYPES:,}")
    for index, each in enumerate(types or ()):
        check_text("doc_type" if isinstance(doc_type, str) else f"doc_type[{index}]", each, 0, MAX_QUERY_BYTES)
    check_moment("created_after", created_after)
    check_moment("created_before", created_before)
    return Conditions(
        doc_types=None if types is None else tuple(types),
        metadata=filters.parse(metadata),
        created_after=created_after,
        created_before=created_before,
    )


def stage(reranker: Reranker | None, asked: bool | Reranking, query: str | None) -> Stage | None:
    """What the reranker is to do, None where it was not asked. Raises BadInput."""
    if asked is False:
        return None
    candidates = asked.candidates if isinstance(asked, Reranking) else rerank.CANDIDATES
    check_range("rerank.candidates", candidates, 1, rerank.MAX_CANDIDATES)
    if query is None:
        raise BadInput("query", "is missing; the reranker reads it, also beside an embedding")
    return Stage(rerank.required(reranker), query, candidates)


EXAMPLE = SearchRequest(
    tenant_id="acme", query="How do I reset my password?", top_k=3, doc_type="faq", metadata={"lang": "en"}
)
FOUND = SearchResponse(
    results=[
        Hit(
            id="faq/password",
            chunk_index=0,
            content="To reset your password, open Settings and choose Security.",
            similarity=0.7421,
            score=0.7421,
            doc_type="faq",
            metadata={"lang": "en"},
            created_at=datetime.fromisoformat("2026-01-31T12:00:00+00:00"),
            start_offset=0,
        )
    ],
    count=1,
    scan=Scan("exact"),
)


@post(
    "/search",
    operation_id="search",
    **guard.needs("read"),
    summary="Find the best chunks",
    tags=["search"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented(*problems.BODY, HTTPStatus.BAD_GATEWAY)
    | {200: ResponseSpec(SearchResponse, description="Found", examples=[Example("found", value=FOUND)])},
)
async def search_chunks(
    service: NamedDependency[Service],
    data: Annotated[SearchRequest, Body(examples=[Example("a question with filters", value=EXAMPLE)])],
) -> SearchResponse:
    """min(top_k, matching) chunks of the tenant, never fewer; `scan` says whether an index was walked."""
    (answer,) = await _answers(service, [data], [""])
    return answer


@post(
    "/search/batch",
    operation_id="search_batch",
    **guard.needs("read"),
    summary="Several searches in one request",
    tags=["search"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented(*problems.BODY, HTTPStatus.BAD_GATEWAY)
    | {
        200: ResponseSpec(
            BatchResponse,
            description="An answer for each search, in their order",
            examples=[Example("two answers", value=BatchResponse([FOUND, FOUND]))],
        )
    },
)
async def search_several(
    service: NamedDependency[Service],
    data: Annotated[BatchRequest, Body(examples=[Example("two questions", value=BatchRequest([EXAMPLE, EXAMPLE]))])],
) -> BatchResponse:
    """Up to 100 searches, their questions embedded in one call. One that is at fault fails them all, by its place."""
    check_range("searches", len(data.searches), 1, MAX_SEARCHES)
    places = [f"searches[{index}]" for index in range(len(data.searches))]
    return BatchResponse(await _answers(service, data.searches, places))


async def _answers(service: Service, searches: Sequence[SearchRequest], places: Sequence[str]) -> list[SearchResponse]:
    """Everything is checked before anything is embedded, and embedded before a connection is taken."""

    async def answered(embedder: Embedder) -> list[SearchResponse]:
        return await _answers_of(service, embedder, searches, places)

    brought = [(data.embedding_model, len(data.embedding)) for data in searches if data.embedding is not None]
    await spaces.expect(service.database, service.settings, service.embedder, brought)
    return await spaces.following(service.database, service.settings, service.embedder, answered)


async def _answers_of(
    service: Service, embedder: Embedder, searches: Sequence[SearchRequest], places: Sequence[str]
) -> list[SearchResponse]:
    checked = []
    for data, place in zip(searches, places, strict=True):
        try:
            reranking = stage(service.reranker, data.rerank, data.query)
            checked.append((asked(data), _options(data), reranking, _given(embedder, data)))
        except BadInput as error:
            raise (error.under(place) if place else error) from None
    begun = time.perf_counter()
    vectors = await _embedded(embedder, searches, places, [given for *_, given in checked])
    embedding = 1000 * (time.perf_counter() - begun)
    turn = asyncio.Semaphore(AT_ONCE)

    async def answered(index: int) -> SearchResponse:
        async with turn:
            narrowed, options, reranking, _ = checked[index]
            return await _answer(
                service, embedder, searches[index], narrowed, options, reranking, vectors[index], embedding
            )

    if len(searches) == 1:
        return [await answered(0)]
    return list(await asyncio.gather(*(answered(index) for index in range(len(searches)))))


async def _answer(
    service: Service,
    embedder: Embedder,
    data: SearchRequest,
    narrowed: Conditions,
    options: Options,
    reranking: Stage | None,
    embedded: Embedded | None,
    embedding: float,
) -> SearchResponse:
    begun = time.perf_counter()
    found = await search.search(
        service.database,
        service.settings,
        data.tenant_id,
        embedded.vector if embedded else None,
        question=data.query or "",
        top_k=data.top_k,
        threshold=data.threshold,
        conditions=narrowed,
        options=options,
        stage=reranking,
        space=Model(embedder.model, embedder.dimensions),
    )
    response = SearchResponse(found.hits, len(found.hits), found.scan)
    if data.explain:
        total = embedding + 1000 * (time.perf_counter() - begun)
        response.explain = await explanation.of(
            service.database,
            data.tenant_id,
            found,
            embedding=embedding,
            remembered=bool(embedded and embedded.remembered),
            total=total,
            analyze=data.explain == "analyze",
        )
    return response


def _given(embedder: Embedder, data: SearchRequest) -> npt.NDArray[np.float32] | None:
    """The vector that came with a search, checked. Raises BadInput where the mode asks for something else."""
    both = data.query is not None and data.embedding is not None
    neither = data.query is None and data.embedding is None
    if data.mode == "vector" and (neither or (both and not data.rerank)):
        raise BadInput("query", "give either query or embedding, not both and not neither")
    if data.mode != "vector" and data.query is None:
        raise BadInput("query", f"is missing; the mode {data.mode} searches its words")
    check_model(data.embedding_model, data.embedding, embedder.model)
    return None if data.embedding is None else check_vector(data.embedding, embedder.dimensions)


async def _embedded(
    embedder: Embedder,
    searches: Sequence[SearchRequest],
    places: Sequence[str],
    given: Sequence[npt.NDArray[np.float32] | None],
) -> list[Embedded | None]:
    """A vector for each search that needs one, those of the same tenant embedded in one call."""
    vectors = [None if vector is None else Embedded(vector, remembered=True) for vector in given]
    needed: dict[str, list[int]] = {}
    for index, data in enumerate(searches):
        by_words = data.mode == "text" and data.threshold is None and not data.diversity
        if vectors[index] is None and not by_words:
            needed.setdefault(data.tenant_id, []).append(index)
    for tenant_id, indices in needed.items():
        texts = [searches[index].query or "" for index in indices]
        fields = [f"{places[index]}.query".lstrip(".") for index in indices]
        for index, embedded in zip(indices, await questions.embed(embedder, tenant_id, texts, fields), strict=True):
            vectors[index] = embedded
    return vectors


def _options(data: SearchRequest) -> Options:
    for name in ("vector_weight", "text_weight"):
        check_range(name, getattr(data, name), 0, 100)
    if data.vector_weight == data.text_weight == 0:
        raise BadInput("vector_weight", "is 0, and so is text_weight; allowed: one of them above 0")
    check_range("diversity", data.diversity, 0, 1)
    if data.ef_search is not None:
        check_range("ef_search", data.ef_search, 10, scans.MAX_EF_SEARCH)
    if data.oversampling is not None:
        check_range("oversampling", data.oversampling, 1, search.MAX_OVERSAMPLING)
    return Options(
        exact=data.exact,
        ef_search=data.ef_search,
        oversampling=data.oversampling if data.rescore else 1.0,
        grouped=data.group_by == "id",
        mode=data.mode,
        fusion=data.fusion,
        vector_weight=data.vector_weight,
        text_weight=data.text_weight,
        diversity=data.diversity,
    )

"""Documents over HTTP: put one or many, read, list, delete."""

from collections.abc import Container, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body, HeaderParameter, PathParameter, QueryParameter
from msgspec import Meta, Struct

from app import documents, erasure, tenants, upsert
from app.api import guard, operations, problems
from app.api.erasure import Erasure, example, told
from app.api.fields import Content, CreatedAt, Embedding, EmbeddingModel, Id, Labels, TenantId, Title, Type
from app.api.parameters import MAX_PAGE, After, Limit
from app.api.paths import decoded
from app.api.preconditions import Precondition, quoted
from app.api.search import conditions
from app.api.service import Service
from app.documents import Document
from app.drafts import MAX_ID_BYTES, Draft, check_range, check_text
from app.errors import BadInput
from app.keys import Caller
from app.meter import Meter
from app.outcomes import Outcome
from app.plans import MAX_BATCH
from app.tags import tag

MAX_BATCH_BODY = 64_000_000
BYTES_A_TOKEN = 4
"""Of text that is embedded later, for a limit of tokens; of English text about right."""

IfMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-Match", description="Act only on the document with one of these ETags; * for any document."
    ),
]
IfNoneMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-None-Match", description="Not if the document has one of these ETags; * for any document."
    ),
]
IdPath = Annotated[str, PathParameter(description="The id, percent-encoded; slashes may stand as they are.")]
TenantQuery = Annotated[
    str, QueryParameter(name="tenant_id", description="Whose document.", schema_extra={"pattern": tenants.PATTERN})
]


class PutDocument(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One document. What is left out becomes empty; created_at stays."""

    tenant_id: TenantId = msgspec.field(default_factory=tenants.LeftOut)
    content: Content
    title: Title = None
    doc_type: Type = None
    metadata: Labels = {}
    created_at: CreatedAt = None
    embedding: Embedding = None
    embedding_model: EmbeddingModel = None


class Item(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One document of a batch."""

    id: Id
    content: Content
    title: Title = None
    doc_type: Type = None
    metadata: Labels = {}
    created_at: CreatedAt = None
    embedding: Embedding = None
    embedding_model: EmbeddingModel = None


class PutDocuments(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Up to 1,000 documents, written all or none."""

    tenant_id: TenantId = msgspec.field(default_factory=tenants.LeftOut)
    documents: Annotated[list[Item], Meta(description=f"1 to {MAX_BATCH:,}, no id twice.")]


Wait = Annotated[
    bool,
    QueryParameter(
        name="wait",
        description="false: store the text and answer 202; `pgrecall worker` cuts and embeds it. Searches find what they "
        "found before until it has.",
    ),
]


class ChunkCounts(Struct):
    """Chunks written anew, kept, and gone."""

    embedded: int
    reused: int
    removed: int


class Stored(Struct):
    """What a put did to one document. `state` pending: a worker will cut and embed it."""

    id: str
    status: Literal["created", "updated", "unchanged"]
    version: int
    chunks: ChunkCounts
    state: Literal["ready", "pending"] = "ready"


class StoredAll(Struct):
    """What a batch did, in the order it was given."""

    documents: list[Stored]


class ChunkPlace(Struct):
    """Where a chunk starts, in characters from 0."""

    chunk_index: int
    start_offset: int


class DocumentSummary(Struct, kw_only=True):
    """A document without its text.

    `version` counts from 1. `embedding_origin`: `caller` where the document brought its vector, else `pgrecall`;
    `embedding_model` is null until there is one. `state`: `ready`, `pending` (waits for a worker; `error` is why the last try failed) or `failed` (given up, `error` says
    why). `chunk_count` counts the chunks that can be searched, of the text before until it is ready.
    """

    id: str
    tenant_id: str
    title: str | None
    doc_type: str | None
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    version: int
    state: Literal["pending", "ready", "failed"]
    error: str | None
    embedding_origin: Literal["pgrecall", "caller"]
    embedding_model: str | None
    chunk_count: int


class DocumentWhole(DocumentSummary, kw_only=True):
    """A document with its text and where its chunks start in it, which is known once it is ready."""

    content: str
    chunks: list[ChunkPlace]


class DocumentPage(Struct):
    """Documents in the order of their ids. `next` is the `after` of the next page, null on the last."""

    documents: list[DocumentSummary]
    next: str | None


class Deleted(Struct):
    """How many documents were deleted."""

    deleted: int


_MOMENT = datetime.fromisoformat("2026-01-31T12:00:00+00:00")
_PUT = PutDocument(
    tenant_id="acme",
    content="To reset your password, open Settings and choose Security.",
    doc_type="faq",
    metadata={"lang": "en"},
)
_STORED = Stored("faq/password", "created", 1, ChunkCounts(1, 0, 0))
_PENDING = Stored("faq/password", "created", 1, ChunkCounts(0, 0, 0), "pending")
_SUMMARY: dict[str, Any] = {
    "id": "faq/password",
    "tenant_id": "acme",
    "title": None,
    "doc_type": "faq",
    "metadata": {"lang": "en"},
    "created_at": _MOMENT,
    "updated_at": _MOMENT,
    "version": 1,
    "state": "ready",
    "error": None,
    "embedding_origin": "pgrecall",
    "embedding_model": "all-MiniLM-L6-v2-int8",
    "chunk_count": 1,
}
_WHOLE = DocumentWhole(**_SUMMARY, content=_PUT.content, chunks=[ChunkPlace(0, 0)])


def _stored(outcome: Outcome) -> Stored:
    counts = ChunkCounts(outcome.embedded, outcome.reused, outcome.removed)
    return Stored(outcome.id, outcome.status, outcome.version, counts, outcome.state)


def _summary(tenant_id: str, document: Document) -> dict[str, Any]:
    return {
        "tenant_id": tenant_id,
        "chunk_count": len(document.start_offsets),
        **{name: getattr(document, name) for name in Document._fields if name not in {"content", "start_offsets"}},
    }


async def _put(
    service: Service,
    caller: Caller | None,
    tenant_id: str,
    drafts: Sequence[Draft],
    expected: Container[str | None] | None = None,
    *,
    wait: bool,
) -> list[Outcome]:
    tenants.check(tenant_id)
    await service.limits.storing(caller)
    meter = Meter()
    try:
        outcomes = await upsert.put(
            service.database,
            service.embedder,
            service.settings,
            tenant_id,
            drafts,
            expected=expected,
            token_limit=service.settings.request_tokens,
            meter=meter,
            later=not wait,
        )
    finally:
        service.limits.spent(caller, meter.tokens)
    # A worker embeds them in nobody's name, so they are charged now, by their size.
    waiting = {outcome.id for outcome in outcomes if outcome.state == "pending" and outcome.status != "unchanged"}
    if waiting:
        sizes = (len(draft.content.encode()) for draft in drafts if draft.id in waiting)
        service.limits.spent(caller, sum(sizes) // BYTES_A_TOKEN)
    return outcomes


@put(
    "/documents/{document_id:str}",
    operation_id="put_document",
    **guard.needs("write"),
    summary="Store one document",
    tags=["documents"],
    operation_class=operations.Tagged,
    responses=problems.documented(*problems.BODY, HTTPStatus.BAD_GATEWAY, HTTPStatus.PRECONDITION_FAILED)
    | {
        200: ResponseSpec(Stored, description="Updated or unchanged", examples=[Example("stored", value=_STORED)]),
        201: ResponseSpec(Stored, description="Created", examples=[Example("created", value=_STORED)]),
        202: ResponseSpec(Stored, description="Stored, to be embedded", examples=[Example("pending", value=_PENDING)]),
    },
)
async def put_document(
    request: Request[Any, Any, Any],
    service: NamedDependency[Service],
    document_id: IdPath,
    data: Annotated[PutDocument, Body(examples=[Example("a document", value=_PUT)])],
    wait: Wait = True,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response[Stored]:
    """Cut, embed and store. The same document again writes nothing; unchanged chunks keep their rows."""
    fields = msgspec.structs.asdict(data)
    tenant_id = fields.pop("tenant_id")
    draft = Draft(id=decoded(document_id), **fields)
    (outcome,) = await _put(
        service, guard.caller_of(request), tenant_id, [draft], Precondition(if_match, if_none_match), wait=wait
    )
    status = 202 if outcome.state == "pending" else 201 if outcome.status == "created" else 200
    headers = {"ETag": quoted(tag(outcome.version, outcome.updated_at), outcome.state)}
    return Response(_stored(outcome), status_code=status, headers=headers)


@post(
    "/documents",
    operation_id="put_documents",
    **guard.needs("write"),
    summary="Store up to 1,000 documents, all or none",
    tags=["documents"],
    status_code=200,
    request_max_body_size=MAX_BATCH_BODY,
    operation_class=operations.Described,
    responses=problems.documented(*problems.BODY, HTTPStatus.BAD_GATEWAY)
    | {
        200: ResponseSpec(StoredAll, description="Stored", examples=[Example("stored", value=StoredAll([_STORED]))]),
        202: ResponseSpec(
            StoredAll,
            description="Stored, some to be embedded",
            examples=[Example("pending", value=StoredAll([_PENDING]))],
        ),
    },
)
async def put_documents(
    request: Request[Any, Any, Any],
    service: NamedDependency[Service],
    data: Annotated[
        PutDocuments,
        Body(
            examples=[
                Example(
                    "two documents",
                    value=PutDocuments(
                        tenant_id="acme",
                        documents=[
                            Item(id="faq/password", content=_PUT.content),
                            Item(id="faq/2fa", content="Use a key."),
                        ],
                    ),
                )
            ]
        ),
    ],
    wait: Wait = True,
) -> Response[StoredAll]:
    """The item at fault is named, `documents[3].content`, and then none is written."""
    drafts = [Draft(**msgspec.structs.asdict(item)) for item in data.documents]
    tenants.check(data.tenant_id)
    try:
        outcomes = await _put(service, guard.caller_of(request), data.tenant_id, drafts, wait=wait)
    except BadInput as fault:
        # A put of one document names its fields without the item.
        raise (fault.under("documents[0]") if len(drafts) == 1 else fault) from None
    status = 202 if any(outcome.state == "pending" for outcome in outcomes) else 200
    return Response(StoredAll([_stored(outcome) for outcome in outcomes]), status_code=status)


@get(
    "/documents/{document_id:str}",
    operation_id="get_document",
    **guard.needs("read"),
    summary="Read one document whole",
    tags=["documents"],
    operation_class=operations.Tagged,
    responses=problems.documented(HTTPStatus.NOT_FOUND)
    | {
        200: ResponseSpec(DocumentWhole, description="The document", examples=[Example("read", value=_WHOLE)]),
        304: ResponseSpec(None, description="If-None-Match names the ETag it has"),
    },
)
async def get_document(
    service: NamedDependency[Service], document_id: IdPath, tenant_id: TenantQuery, if_none_match: IfNoneMatch = None
) -> Response[DocumentWhole | None]:
    """The text exactly as it was put, with the places of its chunks."""
    unseen = Precondition(if_none_match=if_none_match, reading=True)
    document = await documents.get(service.database, tenants.check(tenant_id), decoded(document_id))
    current, is_ready = tag(document.version, document.updated_at), document.state == "ready"
    headers = {"ETag": quoted(current, document.state)}
    # Until then it changes without a new tag: the next try, the reason of a failure.
    if is_ready and current not in unseen:
        return Response(None, status_code=304, headers=headers)
    whole = DocumentWhole(
        **_summary(tenant_id, document),
        content=document.content or "",
        chunks=[ChunkPlace(index, start) for index, start in enumerate(document.start_offsets)] if is_ready else [],
    )
    return Response(whole, headers=headers)


MetadataQuery = Annotated[
    str | None, QueryParameter(name="metadata", description='Conditions as in search, as JSON: {"lang": "en"}')
]
StateQuery = Annotated[
    Literal["pending", "ready", "failed"] | None, QueryParameter(name="state", description="Only in this state.")
]
DocTypeQuery = Annotated[list[str] | None, QueryParameter(name="doc_type", description="One of these types.")]

AfterQuery = Annotated[
    datetime | None, QueryParameter(description="created_at at or after this moment (with time zone).")
]
BeforeQuery = Annotated[datetime | None, QueryParameter(description="created_at before this moment (with time zone).")]


def _metadata(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise BadInput("metadata", 'is not a JSON object; allowed: conditions such as {"lang": "en"}') from None


@get(
    "/documents",
    operation_id="list_documents",
    **guard.needs("read"),
    summary="List documents by id",
    tags=["documents"],
    operation_class=operations.Described,
    responses=problems.documented()
    | {
        200: ResponseSpec(
            DocumentPage,
            description="A page",
            examples=[Example("the last page", value=DocumentPage([DocumentSummary(**_SUMMARY)], None))],
        )
    },
)
async def list_documents(
    service: NamedDependency[Service],
    tenant_id: TenantQuery,
    limit: Limit = 100,
    after: After = None,
    doc_type: DocTypeQuery = None,
    metadata: MetadataQuery = None,
    created_after: AfterQuery = None,
    created_before: BeforeQuery = None,
    in_state: StateQuery = None,
) -> DocumentPage:
    """A keyset page: documents written meanwhile neither shift nor repeat the others."""
    tenants.check(tenant_id)
    check_range("limit", limit, 1, MAX_PAGE)
    if after is not None:
        check_text("after", after, 0, MAX_ID_BYTES)
    narrowed = conditions(doc_type, _metadata(metadata), created_after, created_before)
    found = await documents.page(service.database, tenant_id, narrowed, limit=limit + 1, after=after, state=in_state)
    page = found[:limit]
    return DocumentPage(
        [DocumentSummary(**_summary(tenant_id, document)) for document in page],
        page[-1].id if len(found) > limit else None,
    )


@delete(
    "/documents/{document_id:str}",
    operation_id="delete_document",
    **guard.needs("write"),
    summary="Delete one document",
    tags=["documents"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented(HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED)
    | {200: ResponseSpec(Erasure, description="Deleted", examples=[Example("deleted", value=example("faq/password"))])},
)
async def delete_document(
    service: NamedDependency[Service], document_id: IdPath, tenant_id: TenantQuery, if_match: IfMatch = None
) -> Erasure:
    """Text, chunks, vectors, words and cache go in one transaction; another looks whether they are gone."""
    expected = Precondition(if_match)
    tenants.check(tenant_id)
    return told(
        await erasure.document(service.database, service.settings, tenant_id, decoded(document_id), expected=expected)
    )


@delete(
    "/documents",
    operation_id="delete_documents",
    **guard.needs("write"),
    summary="Delete the documents that match a filter",
    tags=["documents"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented()
    | {200: ResponseSpec(Deleted, description="Deleted", examples=[Example("deleted", value=Deleted(12))])},
)
async def delete_documents(
    service: NamedDependency[Service],
    tenant_id: TenantQuery,
    doc_type: DocTypeQuery = None,
    metadata: MetadataQuery = None,
    created_after: AfterQuery = None,
    created_before: BeforeQuery = None,
) -> Deleted:
    """At least one filter is required. All that match go in one transaction."""
    narrowed = conditions(doc_type, _metadata(metadata), created_after, created_before)
    return Deleted(await documents.remove_matching(service.database, tenants.check(tenant_id), narrowed))

"""What waits for a worker, over HTTP: how much, and what was given up tried again."""

from datetime import UTC, datetime
from typing import Annotated

import msgspec
from litestar import get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Body
from msgspec import Meta, Struct

from app import pending, tenants
from app.api import guard, operations, problems
from app.api.documents import TenantQuery
from app.api.fields import TenantId
from app.api.service import Service
from app.drafts import MAX_ID_BYTES, check_text
from app.errors import BadInput
from app.plans import MAX_BATCH


class Status(Struct, kw_only=True):
    """How much a tenant has and how much of it waits.

    `pending` documents wait to be embedded, `failed` ones were given up; `ready_last_minute` and `ready_last_hour` became ready.
    `oldest_pending_seconds`: how long the document that waits longest has been waiting, null where none waits.
    """

    tenant_id: str
    documents: int
    chunks: int
    pending: int
    failed: int
    oldest_pending_seconds: float | None
    ready_last_minute: int
    ready_last_hour: int


class Retry(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Which documents that were given up are to be tried again: these, or all."""

    tenant_id: TenantId = msgspec.field(default_factory=tenants.LeftOut)
    ids: Annotated[list[str] | None, Meta(description=f"1 to {MAX_BATCH:,} ids; exactly one of this and `all`.")] = None
    all: Annotated[bool, Meta(description="true: every one of the tenant.")] = False


class Retried(Struct):
    """How many documents are pending again."""

    retried: int


_STATUS = Status(
    tenant_id="acme",
    documents=1_200,
    chunks=5_400,
    pending=3,
    failed=1,
    oldest_pending_seconds=1.7,
    ready_last_minute=40,
    ready_last_hour=900,
)


@get(
    "/status",
    operation_id="status",
    **guard.needs("read"),
    summary="How much a tenant has and how much of it waits",
    tags=["queue"],
    operation_class=operations.Described,
    responses=problems.documented()
    | {200: ResponseSpec(Status, description="The tenant", examples=[Example("a tenant", value=_STATUS)])},
)
async def status(service: NamedDependency[Service], tenant_id: TenantQuery) -> Status:
    """Counts every document of the tenant: for dashboards and people, not for every request."""
    found = await pending.status(service.database, tenants.check(tenant_id))
    oldest = found.oldest_pending_at
    return Status(
        tenant_id=tenant_id,
        documents=found.documents,
        chunks=found.chunks,
        pending=found.pending,
        failed=found.failed,
        oldest_pending_seconds=None if oldest is None else max(0.0, (datetime.now(UTC) - oldest).total_seconds()),
        ready_last_minute=found.ready_last_minute,
        ready_last_hour=found.ready_last_hour,
    )


@post(
    "/queue/retry",
    operation_id="retry",
    **guard.needs("write"),
    summary="Try documents that were given up again",
    tags=["queue"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented(*problems.BODY)
    | {200: ResponseSpec(Retried, description="Queued", examples=[Example("one", value=Retried(1))])},
)
async def retry(
    service: NamedDependency[Service],
    data: Annotated[
        Retry, Body(examples=[Example("one document", value=Retry(tenant_id="acme", ids=["faq/password"]))])
    ],
) -> Retried:
    """Documents in state failed become pending, with their attempts forgotten; others stay as they are."""
    tenants.check(data.tenant_id)
    if data.all == (data.ids is not None):
        raise BadInput("ids", "and all: exactly one of them is required; allowed: a list of ids, or all as true")
    if data.ids is not None and not 1 <= len(data.ids) <= MAX_BATCH:
        raise BadInput("ids", f"{len(data.ids)} items; allowed: 1 to {MAX_BATCH:,}")
    for index, document_id in enumerate(data.ids or ()):
        check_text(f"ids[{index}]", document_id, 1, MAX_ID_BYTES)
    return Retried(await pending.retry(service.database, data.tenant_id, data.ids))

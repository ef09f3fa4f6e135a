"""Erasing over HTTP: what went, that it cannot be read any more, and where it still is."""

from typing import Annotated

from litestar import delete
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import PathParameter
from msgspec import Meta, Struct

from app import erasure, tenants
from app.api import guard, operations, problems
from app.api.service import Service
from app.erasure import Erased

Counts = Annotated[dict[str, int], Meta(description="Rows by table.")]
TenantPath = Annotated[
    str,
    PathParameter(description="Whose documents and all that came of them.", schema_extra={"pattern": tenants.PATTERN}),
]


class Remaining(Struct):
    """Where erased rows still are although nobody can read them, until when, and what ends it."""

    where: str
    until: str
    finish: str


class Erasure(Struct):
    """What an erasure did.

    `removed`: rows that went. `readable`: rows from before it that a transaction after it could still read; none where it
    is `complete`. `put_since`: documents put after it, which stay.
    """

    tenant_id: str
    id: Annotated[str | None, Meta(description="The document; null where the whole tenant went.")]
    complete: bool
    removed: Counts
    readable: Counts
    put_since: int
    remains: list[Remaining]


def told(erased: Erased, *, registered: bool = True) -> Erasure:
    """An erasure as it is answered; see `erasure.remains`."""
    remains = erasure.remains(erased.tenant_id, erased.id, registered=registered)
    return Erasure(*erased, [Remaining(*each) for each in remains])


def example(document_id: str | None) -> Erasure:
    """An answer for the documentation."""
    tables = ["document_terms", "embedding_cache", "documents", "sources"]
    removed = dict.fromkeys(tables, 1)
    return told(
        Erased("acme", document_id, complete=True, removed=removed, readable=dict.fromkeys(tables, 0), put_since=0)
    )


@delete(
    "/tenants/{tenant_id:str}",
    operation_id="erase_tenant",
    **guard.needs("admin"),
    summary="Erase a tenant",
    tags=["tenants"],
    status_code=200,
    operation_class=operations.Described,
    responses=problems.documented()
    | {200: ResponseSpec(Erasure, description="Erased", examples=[Example("erased", value=example(None))])},
)
async def erase_tenant(service: NamedDependency[Service], tenant_id: TenantPath) -> Erasure:
    """Documents, chunks, vectors, words, statistics, cache and queued work in one transaction. Cannot be undone."""
    return told(await erasure.tenant(service.database, service.settings, tenants.check(tenant_id)))

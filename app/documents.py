"""Stored documents: read, listed and deleted whole, within one tenant. `upsert` puts them there."""

from collections.abc import Container
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    ARRAY,
    Delete,
    Integer,
    Select,
    Table,
    TableClause,
    Text,
    bindparam,
    delete,
    func,
    literal_column,
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from app import cache, holdings, terms
from app.conditions import Conditions, where, where_values
from app.database import Database
from app.errors import BadInput, NotFound, VersionConflict
from app.statements import rendered
from app.tables import document_terms, documents, sources, tenant_sources
from app.tags import tag

_tenant = bindparam("tenant_id", type_=Text)
_document = bindparam("document_id", type_=Text)
_ids = bindparam("ids", type_=ARRAY(Text))

LOCKED_STATE = (
    select(sources.c.version, sources.c.updated_at)
    .where(sources.c.tenant_id == _tenant, sources.c.id == _document)
    .with_for_update()
)
"""What the tag of one document is made of, with writers kept out until the transaction ends."""


def _of(table: TableClause | Table) -> Delete:
    return delete(table).where(table.c.tenant_id == _tenant, table.c.id == func.any(_ids))


REMOVE = _of(sources)
"""Documents; what refers to them goes by the foreign keys, where it has not gone before to be counted."""

REMOVE_CHUNKS = _of(documents)
"""The chunks of documents."""

COUNT_TERMS = (
    select(func.count())
    .select_from(document_terms)
    .where(document_terms.c.tenant_id == _tenant, document_terms.c.id == func.any(_ids))
)
"""How many chunks of documents can be searched by their words."""

TRANSACTION: Select[str] = select(literal_column("pg_current_xact_id()::xid::text", Text))
"""The number of this transaction: rows of later ones have a later number."""


STATES = {name: name for name in ("pending", "ready", "failed")}


class Document(NamedTuple):
    """A stored document."""

    id: str
    title: str | None
    content: str | None
    doc_type: str | None
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    version: int
    state: str
    error: str | None
    embedding_origin: str
    embedding_model: str | None
    start_offsets: list[int]


_shown = [tenant_sources.c[name] for name in Document._fields if name != "content"]
GET = select(*_shown, tenant_sources.c.content).where(
    tenant_sources.c.tenant_id == _tenant, tenant_sources.c.id == bindparam("document_id", type_=Text)
)
"""One document whole."""


def listing(conditions: Conditions, *, after: bool, state: str | None = None) -> Select[Any]:
    """A page of documents in the order of their ids, without their texts. Parameters: those of `where`, limit, after."""
    statement = select(*_shown).where(*where(conditions, tenant_sources)).order_by(tenant_sources.c.id)
    if state is not None:
        # As a literal: what is not ready has an index of its own.
        statement = statement.where(tenant_sources.c.state == literal_column(f"'{STATES[state]}'"))
    if after:
        statement = statement.where(tenant_sources.c.id > bindparam("after", type_=Text))
    return statement.limit(bindparam("page", type_=Integer))


def matching(conditions: Conditions) -> Select[Any]:
    """Ids of the documents that satisfy the conditions, locked. Parameters: those of `where`."""
    # In the order of the ids as batches do, and by conditions that are looked at again after each wait.
    return select(sources.c.id).where(*where(conditions, sources)).order_by(sources.c.id).with_for_update()


_GET = rendered(GET)


async def get(database: Database, tenant_id: str, document_id: str) -> Document:
    """The document with its whole text. Raises NotFound."""
    statement = _GET.with_values("get", {"tenant_id": tenant_id, "document_id": document_id})
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    if not rows:
        raise NotFound(f"there is no document {document_id!r} in tenant {tenant_id!r}")
    return Document(**rows[0])


async def page(
    database: Database,
    tenant_id: str,
    conditions: Conditions,
    *,
    limit: int,
    after: str | None = None,
    state: str | None = None,
) -> list[Document]:
    """At most `limit` documents with ids behind `after`, in this state if given, by id; `content` is None."""
    values = where_values(tenant_id, conditions) | {"page": limit} | ({} if after is None else {"after": after})
    statement = rendered(listing(conditions, after=after is not None, state=state)).with_values("page", values)
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    return [Document(content=None, **row) for row in rows]


class Removed(NamedTuple):
    """What went with documents: rows by table, the digests of their cached vectors, and the transaction's number."""

    rows: dict[str, int]
    digests: list[bytes]
    transaction: str


async def remove(
    database: Database, tenant_id: str, document_id: str, *, expected: Container[str | None] | None = None
) -> Removed:
    """Delete one document and all that came of it. Raises NotFound, or VersionConflict where its tag is not in `expected`."""
    async with database.write(tenant_id) as connection:
        values = {"tenant_id": tenant_id, "document_id": document_id}
        stored = (await connection.execute(LOCKED_STATE, values)).one_or_none()
        if stored is None:
            raise NotFound(f"there is no document {document_id!r} in tenant {tenant_id!r}")
        if expected is not None and tag(stored.version, stored.updated_at) not in expected:
            raise VersionConflict(
                f"version {stored.version} of this document is stored now, which the condition does not allow"
            )
        return await take(connection, tenant_id, [document_id])


async def remove_matching(database: Database, tenant_id: str, conditions: Conditions) -> int:
    """Delete every document that satisfies the conditions, of which there must be one. How many they were."""
    if conditions == Conditions():
        raise BadInput("", "a filter is required: doc_type, metadata, created_after or created_before")
    async with database.write(tenant_id) as connection:
        found = await connection.execute(matching(conditions), where_values(tenant_id, conditions))
        ids = list(found.scalars())
        await take(connection, tenant_id, ids)
        return len(ids)


async def take(connection: AsyncConnection, tenant_id: str, ids: list[str]) -> Removed:
    """Remove these documents, whose rows are locked, and before them everything that came of them."""
    values = {"tenant_id": tenant_id, "ids": ids}
    transaction = (await connection.execute(TRANSACTION)).scalar_one()
    rows = {}
    for held in await holdings.made_at_run_time(connection):
        if held.by_id:
            rows[held.table.name] = (await connection.execute(_of(held.table), values)).rowcount
    rows["document_terms"] = (await connection.execute(COUNT_TERMS, values)).scalar_one()
    await terms.forget_documents(connection, tenant_id, ids)
    digests = await cache.erase(connection, tenant_id, ids)
    rows["embedding_cache"] = len(digests)
    for removal, table in ((REMOVE_CHUNKS, documents), (REMOVE, sources)):
        rows[table.name] = (await connection.execute(removal, values)).rowcount
    return Removed(rows, digests, transaction)

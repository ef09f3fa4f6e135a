"""Many new rows in one statement: columns travel as binary arrays and become rows in the server.

COPY FROM is refused under row-level security. A temporary table to copy into would be one for each transaction, with its
entries in the catalogue; `unnest` of arrays does the same in one round trip and leaves nothing behind.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app import packing

WORTHWHILE = 8
"""Rows from which on one statement for all of them beats one for each."""
AT_ONCE = 250
"""Rows of a statement: half a second of work, far below PGRECALL_STATEMENT_TIMEOUT also where the server is busy."""

CREATE = text("""
insert into sources (tenant_id, id, title, content, content_sha256, doc_type, metadata, created_at, ready_at,
                     chunk_keys, start_offsets, state, chunker, embedding_origin, embedding_model)
select :tenant_id, id, title, content, content_sha256, doc_type, metadata, created_at, ready_at,
       string_to_array(chunk_keys, ' '), cast(string_to_array(start_offsets, ' ') as integer[]), state, chunker,
       embedding_origin, embedding_model
  from unnest(cast(:id as text[]), cast(:title as text[]), cast(:content as text[]), cast(:content_sha256 as bytea[]),
              cast(:doc_type as text[]), cast(:metadata as jsonb[]), cast(:created_at as timestamptz[]),
              cast(:ready_at as timestamptz[]), cast(:chunk_keys as text[]), cast(:start_offsets as text[]),
              cast(:state as text[]), cast(:chunker as text[]), cast(:embedding_origin as text[]),
              cast(:embedding_model as text[]))
       as row (id, title, content, content_sha256, doc_type, metadata, created_at, ready_at, chunk_keys, start_offsets,
               state, chunker, embedding_origin, embedding_model)
    on conflict do nothing returning id
""")
"""Texts of documents that do not exist yet; returns the ids that did not."""

ADD_CHUNKS = text("""
insert into documents (tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding)
select :tenant_id, row.*
  from unnest(cast(:id as text[]), cast(:chunk_key as text[]), cast(:doc_type as text[]), cast(:metadata as jsonb[]),
              cast(:created_at as timestamptz[]), cast(:content as text[]), cast(:embedding as vector[])) as row
""")
"""Chunks with their vectors."""

_TEXTS = ("id", "title", "content", "doc_type", "state", "chunker", "embedding_origin", "embedding_model")


async def create(connection: AsyncConnection, tenant_id: str, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Insert rows of `sources`, all of this tenant, as far as their ids are free. The ids that were."""
    created: set[str] = set()
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        values = {name: packing.texts(row[name] for row in some) for name in _TEXTS} | {
            "tenant_id": tenant_id,
            "content_sha256": packing.blobs(row["content_sha256"] for row in some),
            "metadata": packing.objects(row["metadata"] for row in some),
            "created_at": packing.moments(row["created_at"] for row in some),
            "ready_at": packing.moments(row["ready_at"] for row in some),
            "chunk_keys": packing.texts(" ".join(row["chunk_keys"]) for row in some),
            "start_offsets": packing.texts(" ".join(map(str, row["start_offsets"])) for row in some),
        }
        _check(values, some[0])
        created.update((await connection.execute(CREATE, values)).scalars())
    return created


async def add_chunks(connection: AsyncConnection, tenant_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows of `documents`, all of this tenant."""
    element = await vector_type(connection)
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        columns = ("id", "chunk_key", "doc_type", "content")
        values = {name: packing.texts(row[name] for row in some) for name in columns} | {
            "tenant_id": tenant_id,
            "metadata": packing.objects(row["metadata"] for row in some),
            "created_at": packing.moments(row["created_at"] for row in some),
            "embedding": packing.vectors([row["embedding"] for row in some], element),
        }
        _check(values, some[0])
        await connection.execute(ADD_CHUNKS, values)


def _check(values: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    if values.keys() != row.keys():
        raise TypeError(f"columns {sorted(values.keys() ^ row.keys())} are only in the statement, or only in the rows")


async def vector_type(connection: AsyncConnection) -> int:
    """The number of pgvector's type, which the pool has registered on the driver's connection."""
    driver = (await connection.get_raw_connection()).driver_connection
    info = driver.adapters.types.get("vector") if driver is not None else None
    if info is None:
        raise TypeError("pgvector's type is not registered on this connection")
    return int(info.oid)

"""Vectors of the other model for every chunk that has none: by tenant and document, resumable, at a bounded rate.

What is done is in the table itself, so a run that was killed goes on where it was, and a run that finds documents written
meanwhile without their second vector fills them in. A batch is read, embedded while nothing is locked, and written under
the lock of its documents' sources, from `documents` as it is then: a chunk that has gone gets no vector.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psycopg
from pgvector import Vector
from pgvector.psycopg import register_vector

from app import cache
from app.database import Database
from app.embedding import Embedder
from app.errors import EmbeddingFailed, PgrecallError
from app.meter import Meter
from app.settings import Settings

BATCH = 256
"""Chunks read, embedded and written at a time."""

MISSING = """
select d.tenant_id, d.id, d.chunk_key, d.content
  from documents d
  join sources s on s.tenant_id = d.tenant_id and s.id = d.id and (%(callers)s or s.embedding_origin = 'pgrecall')
 where (d.tenant_id, d.id, d.chunk_key) > (%(tenant_id)s, %(id)s, %(chunk_key)s)
   and not exists (select from pgrecall_run_documents r
                    where r.tenant_id = d.tenant_id and r.id = d.id and r.chunk_key = d.chunk_key)
 order by d.tenant_id, d.id, d.chunk_key limit %(batch)s
"""
"""The next chunks that have no second vector; of those whose vectors their callers brought only where that is asked."""

LOCK = """
select from sources s join (select distinct * from unnest(%(tenants)s::text[], %(ids)s::text[]) k (tenant_id, id)) k
    on s.tenant_id = k.tenant_id and s.id = k.id
 order by s.tenant_id, s.id for share of s
"""
"""Writers of these documents kept out, in the order in which they lock."""

FILL = """
insert into pgrecall_run_documents (tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding)
select d.tenant_id, d.id, d.chunk_key, d.doc_type, d.metadata, d.created_at, d.content, k.embedding
  from unnest(%(tenants)s::text[], %(ids)s::text[], %(keys)s::text[], %(vectors)s::vector[]) k (tenant_id, id, chunk_key, embedding)
  join documents d on d.tenant_id = k.tenant_id and d.id = k.id and d.chunk_key = k.chunk_key
on conflict do nothing
"""
"""Vectors for the chunks that are still there, with the labels they have now."""


class Chunk(NamedTuple):
    """A chunk that has no second vector."""

    tenant_id: str
    id: str
    chunk_key: str
    content: str


class Refused(NamedTuple):
    """A chunk that the other model gives no vector for, and why."""

    tenant_id: str
    id: str
    reason: str


@dataclass
class Filled:
    """What a backfill did. `too_long`: documents (tenant, id) with chunks longer than the other model reads. `stopped`: what came in its way, such as a server that is away or a budget that is spent."""

    meter: Meter
    chunks: int = 0
    refused: list[Refused] = field(default_factory=list)
    too_long: set[tuple[str, str]] = field(default_factory=set)
    stopped: PgrecallError | None = None


async def fill(
    connection: psycopg.Connection[Any],
    database: Database,
    embedder: Embedder,
    settings: Settings,
    meter: Meter,
    *,
    told: Callable[[int], None],
    rate: float | None = None,
    batch: int = BATCH,
    callers: bool = False,
) -> Filled:
    """Give every chunk its second vector that has none, at most `rate` a second. `told` gets how many have been.

    `connection` is the owner's, `embedder` the other model's, `meter` counts what is embedded and may limit it. Ends
    early where its server is away or the limit is reached; what was done stays. With `callers` the texts of documents whose
    vectors their callers brought are embedded too.
    """
    register_vector(connection)
    filled = Filled(meter)
    begun = time.monotonic()
    place = {"tenant_id": "", "id": "", "chunk_key": ""}
    while True:
        rows = await asyncio.to_thread(_read, connection, place | {"batch": batch, "callers": callers})
        if not rows:
            return filled
        place = {"tenant_id": rows[-1].tenant_id, "id": rows[-1].id, "chunk_key": rows[-1].chunk_key}
        tokens = embedder.count_tokens([row.content for row in rows])
        by_tenant: dict[str, list[Chunk]] = defaultdict(list)
        for row, size in zip(rows, tokens, strict=True):
            if size > embedder.max_tokens:
                reason = f"has {size:,} tokens, {embedder.model} reads {embedder.max_tokens:,}"
                filled.refused.append(Refused(row.tenant_id, row.id, reason))
                filled.too_long.add((row.tenant_id, row.id))
            else:
                by_tenant[row.tenant_id].append(row)
        for tenant_id, some in by_tenant.items():
            done, vectors = await _embedded(database, embedder, settings, tenant_id, some, filled)
            if done:
                await asyncio.to_thread(_write, connection, done, vectors)
            filled.chunks += len(done)
            told(filled.chunks)
            if filled.stopped is not None:
                return filled
        if rate is not None:
            await asyncio.sleep(max(0.0, begun + filled.chunks / rate - time.monotonic()))


async def _embedded(
    database: Database, embedder: Embedder, settings: Settings, tenant_id: str, chunks: list[Chunk], filled: Filled
) -> tuple[list[Chunk], npt.NDArray[np.float32]]:
    """The chunks that the model takes, and their vectors. What came in the way is put into `filled`."""
    texts = [chunk.content for chunk in chunks]
    vectors, faults = await cache.embed_each(database, embedder, settings, tenant_id, texts, meter=filled.meter)
    for position, fault in faults.items():
        if isinstance(fault, EmbeddingFailed) and fault.index is not None:
            filled.refused.append(Refused(tenant_id, chunks[position].id, str(fault)))
        else:
            filled.stopped = fault
    done = [position for position in range(len(chunks)) if position not in faults]
    return [chunks[position] for position in done], vectors[done]


def _read(connection: psycopg.Connection[Any], values: dict[str, Any]) -> list[Chunk]:
    return [Chunk(*row) for row in connection.execute(MISSING, values).fetchall()]


def _write(connection: psycopg.Connection[Any], chunks: Sequence[Chunk], vectors: npt.NDArray[np.float32]) -> None:
    values = {
        "tenants": [chunk.tenant_id for chunk in chunks],
        "ids": [chunk.id for chunk in chunks],
        "keys": [chunk.chunk_key for chunk in chunks],
        "vectors": [Vector(vector) for vector in vectors],
    }
    with connection.transaction():
        connection.execute(LOCK, values)
        connection.execute(FILL, values)

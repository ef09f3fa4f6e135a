"""Vectors already paid for: the same text of the same tenant is embedded once, across calls and processes."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, Integer, LargeBinary, bindparam, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.batching import Attempt, Vectors
from app.database import Database
from app.embedding import Embedder
from app.errors import EmbeddingFailed, PgrecallError
from app.meter import Meter
from app.settings import Settings
from app.statements import rendered
from app.tables import embedding_cache as cached

KNOWN = (
    select(cached.c.content_sha256, cached.c.embedding)
    .where(cached.c.tenant_id == bindparam("tenant_id"))
    .where(cached.c.model == bindparam("model"))
    .where(cached.c.dimensions == bindparam("dimensions"))
    .where(cached.c.input_type == "document")
    .where(cached.c.content_sha256 == func.any(bindparam("digests", type_=ARRAY(LargeBinary))))
)
"""Vectors of texts by their digest."""

_newest = select(cached.c.created_at).where(cached.c.tenant_id == bindparam("tenant_id"))
FORGET = delete(cached).where(
    cached.c.tenant_id == bindparam("tenant_id"),
    cached.c.created_at
    < _newest.order_by(cached.c.created_at.desc()).offset(bindparam("kept", type_=Integer)).limit(1).scalar_subquery(),
)
"""What is older than the newest `kept` entries of a tenant. Entries of one call share a moment, so a call more may stay."""

LEAVE = text(
    """
with texts as (
    select distinct on (digest) sha256(convert_to(d.content, 'UTF8')) as digest, d.id
      from unnest(cast(:ids as text[]), cast(:keys as text[])) as gone (id, chunk_key)
      join documents d on d.tenant_id = :tenant_id and d.id = gone.id and d.chunk_key = gone.chunk_key
), found as (
    select c.model, c.dimensions, c.content_sha256, t.id
      from texts t
     cross join embedding_models m
      join embedding_cache c on c.tenant_id = :tenant_id and c.model = m.name and c.dimensions = m.dimensions
       and c.input_type = 'document' and c.content_sha256 = t.digest
       for update of c skip locked
)
update embedding_cache c set left_by = found.id from found
 where c.tenant_id = :tenant_id and c.model = found.model and c.dimensions = found.dimensions
   and c.input_type = 'document' and c.content_sha256 = found.content_sha256
"""
)
"""Which document the texts of chunks that are about to be removed were in, so that its deletion takes their vectors along. Two
writers that leave the same texts do not wait for each other: either's document will do."""

ERASE = text(
    """
with found as (
    select model, dimensions, input_type, content_sha256 from embedding_cache
     where tenant_id = :tenant_id
       and (left_by = any (:ids) or content_sha256 = any (array(
            select sha256(convert_to(content, 'UTF8')) from documents where tenant_id = :tenant_id and id = any (:ids))))
     order by created_at, content_sha256, model, dimensions, input_type
       for update
)
delete from embedding_cache c using found
 where c.tenant_id = :tenant_id and c.model = found.model and c.dimensions = found.dimensions
   and c.input_type = found.input_type and c.content_sha256 = found.content_sha256
returning c.content_sha256
"""
).columns(cached.c.content_sha256)
"""Vectors of the texts that documents, which are about to be removed, have or had; in an order, for two not to wait in a
circle. A document beside them that has such a text keeps its rows."""


def digest(text: str) -> bytes:
    """SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode()).digest()


async def embed(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    texts: Sequence[str],
    *,
    meter: Meter | None = None,
) -> Vectors:
    """Document vectors of `texts`, shape (len(texts), dimensions), as `embed_each`, if every text has one.

    Raises EmbeddingFailed with `faults` for texts at fault, else BudgetSpent or what else came in the way. What was
    computed is kept all the same.
    """
    return (await embed_each(database, embedder, settings, tenant_id, texts, meter=meter)).complete()


async def embed_each(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    texts: Sequence[str],
    *,
    meter: Meter | None = None,
) -> Attempt:
    """Document vectors of `texts`, asking the model only for what is not known yet; and why some have none.

    No connection is held while the model works. What was computed is kept before this returns, so a write that fails
    afterwards does not pay again.
    """
    meter = meter or Meter()
    by_digest = {digest(text): text for text in texts}
    meter.deduplicated += len(texts) - len(by_digest)
    if not settings.cache_rows or not texts:
        return await embedder.embed_each(texts, "document", meter)
    key = {"tenant_id": tenant_id, "model": embedder.model, "dimensions": embedder.dimensions}
    known = {
        row["content_sha256"]: row["embedding"].to_numpy()
        for row in await _known(database, tenant_id, key | {"digests": list(by_digest)})
    }
    meter.cache_hits += len(known)
    missing = {text: d for d, text in by_digest.items() if d not in known}
    attempt = await embedder.embed_each(list(missing), "document", meter)
    faults = {missing[text]: attempt.faults[row] for row, text in enumerate(missing) if row in attempt.faults}
    computed = {d: vector for d, vector in zip(missing.values(), attempt.vectors, strict=True) if d not in faults}
    if computed:
        await _keep(database, settings, tenant_id, key, computed)
    known |= computed
    return _attempt([digest(text) for text in texts], known, faults, embedder.dimensions)


def _attempt(
    digests: list[bytes],
    known: Mapping[bytes, npt.NDArray[np.float32]],
    faults: Mapping[bytes, PgrecallError],
    dimensions: int,
) -> Attempt:
    """What is known and what is at fault, by the positions of this call's texts."""
    vectors = np.full((len(digests), dimensions), np.nan, np.float32)
    placed: dict[int, PgrecallError] = {}
    for position, d in enumerate(digests):
        fault = faults.get(d)
        if fault is None:
            vectors[position] = known[d]
        elif isinstance(fault, EmbeddingFailed) and fault.index is not None:
            placed[position] = EmbeddingFailed(str(fault), position)
        else:
            placed[position] = fault
    return Attempt(vectors, placed)


async def _keep(
    database: Database,
    settings: Settings,
    tenant_id: str,
    key: dict[str, Any],
    computed: dict[bytes, npt.NDArray[np.float32]],
) -> None:
    # In the order of the key: two calls with the same texts must not wait for each other in a circle.
    rows = [
        key | {"input_type": "document", "content_sha256": d, "embedding": v}
        for d, v in sorted(computed.items(), key=_first)
    ]
    async with database.write(tenant_id) as connection:
        await connection.execute(insert(cached).on_conflict_do_nothing(), rows)
        await connection.execute(FORGET, {"tenant_id": tenant_id, "kept": settings.cache_rows})


def _first(item: tuple[bytes, Any]) -> bytes:
    return item[0]


_KNOWN = rendered(KNOWN)


async def _known(database: Database, tenant_id: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    (rows,) = await database.fetch(tenant_id, [_KNOWN.with_values("known vectors", values)], primary=True)
    return rows


async def leave(connection: AsyncConnection, tenant_id: str, chunks: Sequence[tuple[str, str]]) -> None:
    """Note the document of chunks, (document, chunk_key) each, that are about to be removed."""
    ids, keys = zip(*chunks, strict=True)
    await connection.execute(LEAVE, {"tenant_id": tenant_id, "ids": list(ids), "keys": list(keys)})


async def erase(connection: AsyncConnection, tenant_id: str, ids: Sequence[str]) -> list[bytes]:
    """Remove the vectors of what these documents, about to be removed, say or said. The digest of each removed entry."""
    return list((await connection.execute(ERASE, {"tenant_id": tenant_id, "ids": list(ids)})).scalars())

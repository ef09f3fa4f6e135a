"""Vectors already paid for: the same text of the same tenant is embedded once, across calls and processes."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, Integer, LargeBinary, Text, bindparam, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.batching import Attempt, Vectors
from app.database import Database
from app.embedding import Embedder
from app.errors import EmbeddingFailed, PgrecallError
from app.meter import Meter
from app.settings import Settings
from app.statements import rendered
from app.tables import documents, embedding_models
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

_of_tenant = bindparam("of_tenant", type_=Text)
_chunks = select(func.sha256(func.convert_to(documents.c.content, "UTF8"))).where(documents.c.tenant_id == _of_tenant)
LEAVE = (
    update(cached)
    .where(
        cached.c.tenant_id == _of_tenant,
        cached.c.model == embedding_models.c.name,
        cached.c.dimensions == embedding_models.c.dimensions,
        cached.c.input_type == "document",
        cached.c.content_sha256
        == func.any(
            func.array(
                _chunks.where(
                    documents.c.id == bindparam("document_id", type_=Text),
                    documents.c.chunk_key == func.any(bindparam("keys", type_=ARRAY(Text))),
                ).scalar_subquery()
            )
        ),
    )
    .values(left_by=bindparam("document_id", type_=Text))
)
"""Which document the texts of chunks that are about to be removed were in, so that its deletion takes their vectors along."""

ERASE = (
    delete(cached)
    .where(
        cached.c.tenant_id == _of_tenant,
        or_(
            cached.c.left_by == func.any(bindparam("ids", type_=ARRAY(Text))),
            cached.c.content_sha256
            == func.any(
                func.array(
                    _chunks.where(documents.c.id == func.any(bindparam("ids", type_=ARRAY(Text)))).scalar_subquery()
                )
            ),
        ),
    )
    .returning(cached.c.content_sha256)
)
"""Vectors of the texts that documents, which are about to be removed, have or had. A document beside them that has such a
text keeps its rows."""


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


async def leave(connection: AsyncConnection, removed: Sequence[Mapping[str, Any]]) -> None:
    """Note the document of chunks that are about to be removed: `tenant_id`, `document_id` and `keys` of each document."""
    values = [
        {"of_tenant": row["tenant_id"], "document_id": row["document_id"], "keys": row["keys"]} for row in removed
    ]
    await connection.execute(LEAVE, values)


async def erase(connection: AsyncConnection, tenant_id: str, ids: Sequence[str]) -> list[bytes]:
    """Remove the vectors of what these documents, about to be removed, say or said. The digest of each removed entry."""
    return list((await connection.execute(ERASE, {"of_tenant": tenant_id, "ids": list(ids)})).scalars())

"""Vectors already paid for: the same text of the same tenant is embedded once, across calls and processes."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, Integer, LargeBinary, bindparam, delete, func, select
from sqlalchemy.dialects.postgresql import insert

from app.database import Database, rendered
from app.embedding import Embedder
from app.settings import Settings
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


def digest(text: str) -> bytes:
    """SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode()).digest()


async def embed(
    database: Database, embedder: Embedder, settings: Settings, tenant_id: str, texts: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Document vectors of `texts`, shape (len(texts), dimensions), asking the model only for what is not known yet.

    No connection is held while the model works. What was computed is kept before this returns, so a write that fails
    afterwards does not pay again.
    """
    digests = [digest(text) for text in texts]
    if not settings.cache_rows or not texts:
        return await embedder.embed(texts, "document")
    key = {"tenant_id": tenant_id, "model": embedder.model, "dimensions": embedder.dimensions}
    known = {
        row["content_sha256"]: row["embedding"].to_numpy()
        for row in await _known(database, tenant_id, key | {"digests": list(dict.fromkeys(digests))})
    }
    missing = {d: text for d, text in zip(digests, texts, strict=True) if d not in known}
    if missing:
        computed = dict(zip(missing, await embedder.embed(list(missing.values()), "document"), strict=True))
        async with database.write(tenant_id) as connection:
            # In the order of the key: two calls with the same texts must not wait for each other in a circle.
            await connection.execute(
                insert(cached).on_conflict_do_nothing(),
                [
                    key | {"input_type": "document", "content_sha256": d, "embedding": v}
                    for d, v in sorted(computed.items(), key=lambda item: item[0])
                ],
            )
            await connection.execute(FORGET, {"tenant_id": tenant_id, "kept": settings.cache_rows})
        known |= computed
    return np.stack([known[d] for d in digests])


_KNOWN = rendered(KNOWN)


async def _known(database: Database, tenant_id: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    (rows,) = await database.fetch(tenant_id, [_KNOWN.with_values("known vectors", values)], primary=True)
    return rows

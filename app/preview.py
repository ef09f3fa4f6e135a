"""What a load would do, and what it would cost; nothing is written."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import ARRAY, LargeBinary, bindparam, func, select

from app import cache
from app.database import Database
from app.difference import compare
from app.drafts import Draft
from app.embedding import Embedder
from app.files import Step
from app.loading import Counts, Seen, Told, readable
from app.settings import Settings
from app.statements import rendered
from app.tables import embedding_cache as cached

CACHED = (
    select(cached.c.content_sha256)
    .where(cached.c.tenant_id == bindparam("tenant_id"))
    .where(cached.c.model == bindparam("model"))
    .where(cached.c.dimensions == bindparam("dimensions"))
    .where(cached.c.input_type == "document")
    .where(cached.c.content_sha256 == func.any(bindparam("digests", type_=ARRAY(LargeBinary))))
)
"""Which of these texts have a vector that is paid for."""

_CACHED = rendered(CACHED)


@dataclass
class Cost:
    """Chunks without a row: those whose vector is known, those that would be embedded, and the latter's tokens."""

    cached: int = 0
    chunks: int = 0
    tokens: int = 0

    def price(self, per_million: float) -> float:
        """What the tokens cost."""
        return self.tokens * per_million / 1e6


async def preview(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    steps: Iterable[Step],
    *,
    counts: Counts,
    told: Told,
    seen: Seen | None = None,
    advanced: Callable[[], None] = lambda: None,
) -> Cost:
    """As `loading.load`, only that it is told and not done. A text that comes several times is embedded once."""
    cost = Cost()
    wanted: set[bytes] = set()
    async for run in readable(steps, embedder.dimensions, counts, told, seen):
        drafts: list[Draft] = [each.draft for each in run]
        found = await compare(database, embedder, settings, tenant_id, drafts, chunks=True)
        texts: dict[bytes, str] = {}
        for difference in found:
            setattr(counts, difference.status, getattr(counts, difference.status) + 1)
            counts.reused += difference.reused
            texts |= {cache.digest(text): text for text in difference.fresh}
        fresh = {digest: text for digest, text in texts.items() if digest not in wanted}
        wanted |= fresh.keys()
        known = await _known(database, embedder, settings, tenant_id, list(fresh))
        missing = [text for digest, text in fresh.items() if digest not in known]
        cost.cached += len(known)
        cost.chunks += len(missing)
        cost.tokens += sum(await asyncio.to_thread(embedder.count_tokens, missing))
        counts.bytes += sum(each.size for each in run)
        advanced()
    return cost


async def _known(
    database: Database, embedder: Embedder, settings: Settings, tenant_id: str, digests: list[bytes]
) -> set[bytes]:
    if not digests or not settings.cache_rows:
        return set()
    key = {"tenant_id": tenant_id, "model": embedder.model, "dimensions": embedder.dimensions}
    statement = _CACHED.with_values("cached", key | {"digests": digests})
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    return {row["content_sha256"] for row in rows}

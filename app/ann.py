"""Recall of the index without judgements: the search as served against the exact one, on a tenant's own vectors."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace
from sqlalchemy import Integer, Text, bindparam, func, select

from app import evaluation, search, statistics
from app.database import Database
from app.errors import TimedOut
from app.search import Found, Scan
from app.settings import Settings
from app.statements import rendered
from app.tables import tenant_documents

LIKENESS = 0.5
"""Cosine similarity of a sampled vector to the chunk it is made of."""

EQUAL = 1e-6
"""Similarities that differ less are ties: which of two equal chunks comes last is no matter of recall."""


class Compared(NamedTuple):
    """One vector searched both ways. `recall`: share of the exact search's chunks, or others as near, that were served."""

    tenant_id: str
    recall: float
    scan: Scan
    served_ms: float
    exact_ms: float


_chunk = tenant_documents
_tenant = bindparam("tenant_id", type_=Text)
_drawn = (
    select(_chunk.c.id, _chunk.c.chunk_key)
    .where(_chunk.c.tenant_id == _tenant)
    .order_by(func.hashtextextended(_chunk.c.id + _chunk.c.chunk_key, statistics.SEED))
    .limit(bindparam("sample", type_=Integer))
    .subquery("drawn")
)
SAMPLE = rendered(
    select(_chunk.c.embedding)
    .join(_drawn, (_drawn.c.id == _chunk.c.id) & (_drawn.c.chunk_key == _chunk.c.chunk_key))
    .where(_chunk.c.tenant_id == _tenant)
)
"""Vectors of a tenant's chunks, the same ones each time. Ordering by a hash reads the primary key only."""


async def sample(database: Database, tenant_id: str, count: int) -> npt.NDArray[np.float32]:
    """Query vectors made of up to `count` stored ones, shape (count, dimensions), of length 1.

    Each is a stored vector turned away, in a random direction, to a cosine similarity of LIKENESS. A stored vector as
    it is would be an easier query than any that people ask: it is itself in the index, with its neighbours linked.
    """
    statement = SAMPLE.with_values("sampled vectors", {"tenant_id": tenant_id, "sample": count})
    (rows,) = await database.fetch(tenant_id, [statement])
    if not rows:
        return np.empty((0, 0), np.float32)
    return turned(np.array([row["embedding"].to_numpy() for row in rows], np.float64), LIKENESS)


def turned(vectors: npt.NDArray[np.float64], likeness: float) -> npt.NDArray[np.float32]:
    """Unit vectors of exactly this cosine similarity to the given ones (shape (count, dimensions)), otherwise random."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    away = np.random.default_rng(statistics.SEED).standard_normal(unit.shape)
    away -= (away * unit).sum(axis=1, keepdims=True) * unit
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    made: npt.NDArray[np.float32] = (likeness * unit + (1 - likeness**2) ** 0.5 * away).astype(np.float32)
    return made


async def run(
    database: Database, settings: Settings, tenant_id: str, vectors: Sequence[npt.NDArray[np.float32]], k: int
) -> AsyncGenerator[Compared, None]:
    """Search for the k nearest chunks of each vector, as served and exactly, taking turns at going first."""
    exactly = replace(settings, exact_rows=evaluation.ALL_ROWS)
    for ways in (settings, exactly):  # plans and pages are there when the clock starts
        await _timed(database, ways, tenant_id, vectors[0], k)
    for turn, vector in enumerate(vectors):
        if turn % 2:
            exact, exact_ms = await _timed(database, exactly, tenant_id, vector, k)
            served, served_ms = await _timed(database, settings, tenant_id, vector, k)
        else:
            served, served_ms = await _timed(database, settings, tenant_id, vector, k)
            exact, exact_ms = await _timed(database, exactly, tenant_id, vector, k)
        yield Compared(tenant_id, recall(served, exact), served.scan, served_ms, exact_ms)


def recall(served: Found, exact: Found) -> float:
    """Share of the exact hits that were served; a hit as near as the last exact one counts."""
    if not exact.hits:
        return 1.0
    last = exact.hits[-1].score - EQUAL
    return min(1.0, sum(hit.score >= last for hit in served.hits) / len(exact.hits))


async def _timed(
    database: Database, settings: Settings, tenant_id: str, vector: npt.NDArray[np.float32], k: int
) -> tuple[Found, float]:
    begun = time.perf_counter()
    found = await search.search(database, settings, tenant_id, vector, top_k=k)
    if not found.scan.full:
        raise TimedOut("a search ran into its time limit; raise PGRECALL_STATEMENT_TIMEOUT")
    return found, 1000 * (time.perf_counter() - begun)

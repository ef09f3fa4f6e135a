"""What of a document is stored, as far as it decides about a write: looked up, or locked for the write."""

import contextlib
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, Text, bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database
from app.plans import Plan
from app.statements import rendered
from app.tables import sources, tenant_documents, tenant_sources


class Overtaken(Exception):
    """Another writer changed what this write was going to build on."""


class Stored(NamedTuple):
    """What of a `sources` row decides about a write."""

    id: str
    version: int
    title: str | None
    content_sha256: bytes | None
    doc_type: str | None
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    chunk_keys: list[str]
    start_offsets: list[int]
    state: str
    chunker: str | None
    embedding_origin: str
    embedding_model: str | None

    def reusable(self, plan: Plan, embedding: npt.NDArray[np.float32] | None = None) -> set[str]:
        """Chunks whose rows can stay: same text, and embedded here or brought again as it is stored.

        The keys are those of the rows that are there, whether or not a newer text is pending beside them.
        """
        # Not by embedding_model: `documents` is wholly in the active space, the names follow a change of the model later.
        same_origin = self.embedding_origin == plan.origin
        same_vector = plan.own is None or (embedding is not None and np.array_equal(plan.own, embedding))
        return set(self.chunk_keys) if same_origin and same_vector else set()

    def matches(self, plan: Plan, embedding: npt.NDArray[np.float32] | None) -> bool:
        """Whether writing the plan would change nothing. `embedding`: the stored vector of a document that brought one."""
        return (
            self.state == "ready"
            and self.content_sha256 == plan.sha256
            and (self.title, self.doc_type) == (plan.draft.title, plan.draft.doc_type)
            and _same(self.metadata, plan.draft.metadata)
            and plan.draft.created_at in (None, self.created_at)
            and (self.chunker, self.embedding_origin) == (plan.chunker, plan.origin)
            and (plan.own is None or (embedding is not None and np.array_equal(plan.own, embedding)))
        )


def _same(left: Any, right: Any) -> bool:
    """Equality as JSON has it: true is not 1, but 1 is 1.0."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    if isinstance(left, int | float) and isinstance(right, int | float) and float in (type(left), type(right)):
        # jsonb gives 1e23 back as the whole number 10^23, which is not what the float is to the last digit.
        with contextlib.suppress(OverflowError):
            left, right = float(left), float(right)
    return bool(left == right)


IDS = bindparam("ids", type_=ARRAY(Text))
TENANT = bindparam("tenant_id", type_=Text)

STORED = select(*(tenant_sources.c[name] for name in Stored._fields)).where(
    tenant_sources.c.tenant_id == TENANT, tenant_sources.c.id == func.any(IDS)
)
"""What is stored under these ids, without their texts."""

_STORED = rendered(STORED)

LOCKED = (
    select(*(sources.c[name] for name in Stored._fields))
    .where(sources.c.tenant_id == TENANT, sources.c.id == func.any(IDS))
    .order_by(sources.c.id)
    .with_for_update()
)
"""The same, locked in the order of the ids so that two batches never wait for each other in a circle."""

OWN_VECTORS = select(tenant_documents.c.id, tenant_documents.c.embedding).where(
    tenant_documents.c.tenant_id == TENANT, tenant_documents.c.id == func.any(IDS)
)
"""The vectors of documents that brought their own (one chunk each)."""

_OWN_VECTORS = rendered(OWN_VECTORS)


async def look_up(database: Database, tenant_id: str, ids: list[str]) -> dict[str, Stored]:
    """What is stored under these ids, by id."""
    statement = _STORED.with_values("stored", {"tenant_id": tenant_id, "ids": ids})
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    return {row["id"]: Stored(**row) for row in rows}


async def own_vectors(database: Database, tenant_id: str, ids: list[str]) -> dict[str, npt.NDArray[np.float32]]:
    """The vectors of these documents, which brought their own, by id."""
    if not ids:
        return {}
    statement = _OWN_VECTORS.with_values("own vectors", {"tenant_id": tenant_id, "ids": ids})
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    return {row["id"]: row["embedding"].to_numpy() for row in rows}


async def lock(
    connection: AsyncConnection, tenant_id: str, plans: list[Plan]
) -> tuple[dict[str, Stored], dict[str, npt.NDArray[np.float32]]]:
    """The rows as they are now, with other writers kept out, and the vectors of those that brought their own."""
    if not plans:
        return {}, {}
    values = {"tenant_id": tenant_id, "ids": [plan.draft.id for plan in plans]}
    locked = {row.id: Stored(*row) for row in await connection.execute(LOCKED, values)}
    if len(locked) < len(plans):
        raise Overtaken  # deleted in between
    callers = [row.id for row in locked.values() if row.embedding_origin == "caller"]
    if not callers:
        return locked, {}
    rows = await connection.execute(OWN_VECTORS, values | {"ids": callers})
    return locked, {row.id: row.embedding.to_numpy() for row in rows}

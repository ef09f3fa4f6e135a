"""The write transaction of a put, and its statements.

The `sources` rows are locked (two writers of a document queue there) and the difference is taken against what is stored
*now*; where that is no longer what the vectors were computed for, the attempt is made again.
"""

from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import Text, bindparam, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert_into
from sqlalchemy.ext.asyncio import AsyncConnection

from app import bulk, cache, shadow, spaces, terms
from app.database import Database
from app.difference import Rows, revise
from app.embedding import Embedder
from app.errors import SpaceChanged, Unavailable, VersionConflict
from app.outcomes import Outcome
from app.plans import Plan
from app.stored import Overtaken, Stored, lock
from app.tables import documents, sources
from app.tags import tag

T = TypeVar("T")
TRIES = 5

OF_TENANT = bindparam("of_tenant", type_=Text)  # an UPDATE's parameters may not be called as its columns are

NOW = select(func.now())
"""When this transaction began: the updated_at of every row it writes."""

REMOVE_CHUNKS = shadow.removing(documents)
"""Chunks of one document that are no longer in its text."""

RELABEL_CHUNKS = shadow.relabelling(documents)
"""Type, metadata and date of the chunks that stay, where they differ."""

CREATE = upsert_into(sources).on_conflict_do_nothing().returning(sources.c.id)
"""Texts of documents that do not exist yet; returns the ids that did not."""

ADD_CHUNKS = insert(documents)
"""Chunks with their vectors."""

PLACES = [
    "content_sha256",
    "chunk_keys",
    "start_offsets",
    "state",
    "chunker",
    "embedding_origin",
    "embedding_model",
]
_REPLACED = ["title", "content", "doc_type", "metadata", "created_at", *PLACES]
UNCLAIMED: dict[str, Any] = {"attempts": 0, "not_before": None, "claimed_by": None, "error": None}
REPLACE = (
    update(sources)
    .where(sources.c.tenant_id == OF_TENANT, sources.c.id == bindparam("document_id", type_=Text))
    .values(
        {name: bindparam(f"new_{name}", type_=sources.c[name].type) for name in _REPLACED}
        | {"version": sources.c.version + 1, "updated_at": func.now(), "ready_at": func.now()}
        | UNCLAIMED
    )
)
"""A document's text and where its chunks stand in it."""

QUEUE = (
    update(sources)
    .where(sources.c.tenant_id == OF_TENANT, sources.c.id == bindparam("document_id", type_=Text))
    .values(
        {
            name: bindparam(f"new_{name}", type_=sources.c[name].type)
            for name in ("title", "content", "doc_type", "metadata", "created_at")
        }
        | {"version": sources.c.version + 1, "updated_at": func.now(), "ready_at": None}
        | {"state": "pending", "content_sha256": None}
        | UNCLAIMED
    )
)
"""A document's text, to be cut and embedded by a worker. Its chunks and their places stay those of the text before."""


class Space(NamedTuple):
    """Whose vectors are written: the embedder's, and beside them those of another model while it is being changed."""

    database: Database
    embedder: Embedder
    beside: shadow.Beside | None

    async def check(self, connection: AsyncConnection) -> None:
        """Raise SpaceChanged unless these are what the database wants. To be called with `sources` locked."""
        other = await spaces.locked(connection, self.database, self.embedder)
        if (other and other.where) != (self.beside and self.beside.where):
            raise SpaceChanged((self.embedder.model, self.embedder.dimensions))


async def unless_overtaken(database: Database, tenant_id: str, attempt: Callable[[], Awaitable[tuple[T, int]]]) -> T:
    """What an attempt to write answers, made again where another writer came in between.

    An attempt also tells how many rows the tenant's statistics could be folded from. Raises Unavailable after TRIES.
    """
    for _ in range(TRIES):
        try:
            answer, unfolded = await attempt()
        except Overtaken:
            continue
        if unfolded > terms.FOLD_AFTER:
            await terms.fold(database, tenant_id)
        return answer
    raise Unavailable("other writers kept changing these documents; try again")


async def write(
    connection: AsyncConnection,
    space: Space,
    tenant_id: str,
    plans: Sequence[Plan],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    seen: Mapping[str, Stored],
    expected: Container[str | None] | None,
) -> tuple[list[Outcome], int]:
    """Write what the plans change: what was done, and how many rows the tenant's statistics could be folded from.

    `seen`: what was stored when the vectors were computed. Raises VersionConflict unless `expected` holds the tag of what
    is stored now, SpaceChanged, and Overtaken where a row that was to stay is gone.
    """
    now: datetime = (await connection.execute(NOW)).scalar_one()
    created = await _create(connection, tenant_id, [plan for plan in plans if plan.draft.id not in seen], now)
    locked, own = await lock(connection, tenant_id, [plan for plan in plans if plan.draft.id not in created])
    await space.check(connection)
    rows = Rows([], [], [], [], [])
    outcomes = []
    for plan in plans:
        before = locked.get(plan.draft.id)
        if expected is not None and (tag(before.version, before.updated_at) if before else None) not in expected:
            stored = f"version {before.version}" if before else "no version"
            raise VersionConflict(f"{stored} of this document is stored now, which the condition does not allow")
        if before and before.matches(plan, own.get(plan.draft.id)):
            outcomes.append(
                Outcome(plan.draft.id, "unchanged", before.version, before.updated_at, reused=len(before.chunk_keys))
            )
        else:
            outcomes.append(revise(rows, tenant_id, plan, before, own.get(plan.draft.id), vectors, now))
    return outcomes, await apply(connection, space, tenant_id, rows, plans)


async def apply(connection: AsyncConnection, space: Space, tenant_id: str, rows: Rows, plans: Sequence[Plan]) -> int:
    """Write the rows. How many rows the tenant's statistics could be folded from."""
    gone = [(row["document_id"], key) for row in rows.removed for key in row["keys"]]
    if gone:
        await terms.forget(connection, tenant_id, gone)
        await cache.leave(connection, tenant_id, gone)
    for statement, values in (
        (REMOVE_CHUNKS, rows.removed),
        (RELABEL_CHUNKS, rows.relabelled),
        (None, rows.added),
        (REPLACE, rows.replaced),
        (QUEUE, rows.queued),
    ):
        if values and statement is None and len(values) >= bulk.WORTHWHILE:
            await bulk.add_chunks(connection, tenant_id, values)
        elif values:
            await connection.execute(ADD_CHUNKS if statement is None else statement, values)
    if space.beside is not None:
        callers = {plan.draft.id for plan in plans if plan.own is not None}
        await shadow.write(
            connection, space.beside, removed=rows.removed, relabelled=rows.relabelled, added=rows.added, own=callers
        )
    added = [(row["id"], row["chunk_key"]) for row in rows.added]
    return await terms.learn(connection, tenant_id, added) if added else 0


async def _create(connection: AsyncConnection, tenant_id: str, plans: list[Plan], now: datetime) -> set[str]:
    """Store the texts of documents that were not there; those that came into being meanwhile are left to `lock`."""
    rows = [
        {"tenant_id": tenant_id, "id": plan.draft.id, "created_at": plan.draft.created_at or now}
        | {"ready_at": None if plan.later else now}
        | plan.text()
        | plan.places()
        for plan in sorted(plans, key=lambda plan: plan.draft.id)
    ]
    if len(rows) >= bulk.WORTHWHILE:
        return await bulk.create(connection, tenant_id, rows)
    return set((await connection.execute(CREATE, rows)).scalars()) if rows else set()

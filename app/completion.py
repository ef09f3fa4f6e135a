"""Completing pending documents: what was put without waiting, or by SQL, is cut, embedded and made searchable."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Text, bindparam, case, func, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app import shadow, spaces
from app.database import Database
from app.difference import Rows, embed_fresh, rechunk, renamed
from app.drafts import Draft
from app.embedding import Embedder
from app.outcomes import Fault, Outcome, fault_of
from app.plans import Plan, plan_each
from app.revision import OF_TENANT, PLACES, UNCLAIMED, Space, apply, unless_overtaken
from app.settings import Settings
from app.stored import LOCKED, Stored, look_up
from app.tables import sources


class Claimed(NamedTuple):
    """A pending document as it was when a worker took it in hand."""

    draft: Draft
    version: int


LOCKED_PENDING = LOCKED.add_columns(func.sha256(func.convert_to(sources.c.content, "UTF8")).label("digest"))
"""The rows of `stored.LOCKED` with the hash of the text as it is now, which SQL may have changed without counting the version."""

_COUNTED = sources.c.content_sha256.is_(None)
COMPLETE = (
    update(sources)
    .where(sources.c.tenant_id == OF_TENANT, sources.c.id == bindparam("document_id", type_=Text))
    .values(
        {name: bindparam(f"new_{name}", type_=sources.c[name].type) for name in PLACES}
        | {
            "version": case((_COUNTED, sources.c.version), else_=sources.c.version + 1),
            "updated_at": case((_COUNTED, sources.c.updated_at), else_=func.now()),
            "ready_at": func.now(),
        }
        | UNCLAIMED
    )
    .returning(sources.c.version, sources.c.updated_at)
)
"""Where the chunks stand in a text that was pending. A put counted its version; SQL, which leaves the hash, may not have."""


async def complete(
    database: Database, embedder: Embedder, settings: Settings, tenant_id: str, claimed: Sequence[Claimed]
) -> list[Outcome | Fault | None]:
    """Cut and embed pending documents and make them searchable in place of what they were; say why some are not.

    Version and updated_at stay, unless SQL changed the text without counting the version. None: the document was
    replaced or deleted meanwhile, and nothing was written for it. Raises what the database fails with.
    """

    async def completed_in(space: Embedder) -> list[Outcome | Fault | None]:
        look = partial(spaces.look, database, settings, embedder, space)
        return await _complete(database, space, settings, tenant_id, claimed, look)

    return await spaces.following(database, settings, embedder, completed_in)


async def _complete(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    claimed: Sequence[Claimed],
    look: spaces.Look,
) -> list[Outcome | Fault | None]:
    wanted = {each.draft.id: each.version for each in claimed}
    cutter = await shadow.cutter(database, embedder, settings)
    planned = await asyncio.to_thread(plan_each, cutter, settings, [each.draft for each in claimed])
    answers: dict[str, Outcome | Fault] = {item.id: item for item in planned if isinstance(item, Fault)}

    async def attempt() -> tuple[list[Outcome], int]:
        stored = await look_up(database, tenant_id, list(wanted))
        plans = [item for item in planned if isinstance(item, Plan)]
        # What is gone already is not paid for.
        plans = [plan for plan in plans if _awaits(stored.get(plan.draft.id), wanted[plan.draft.id])]
        vectors, faults = await embed_fresh(database, embedder, settings, tenant_id, plans, stored, None)
        await look(faults.values())
        answers.update({plans[index].draft.id: fault_of(plans[index].draft, error) for index, error in faults.items()})
        plans = [plan for index, plan in enumerate(plans) if index not in faults]
        if not plans:
            return [], 0
        beside = await shadow.vectors(database, embedder, settings, tenant_id, list(vectors))
        async with database.write(tenant_id) as connection:
            space = Space(database, embedder, beside)
            outcomes, unfolded = await _finish(connection, space, tenant_id, plans, vectors, wanted)
        return outcomes, unfolded

    answers |= {outcome.id: outcome for outcome in await unless_overtaken(database, tenant_id, attempt)}
    return [answers.get(document_id) for document_id in wanted]


def _awaits(stored: Stored | None, version: int) -> bool:
    return stored is not None and stored.version == version and stored.state == "pending"


async def _finish(
    connection: AsyncConnection,
    space: Space,
    tenant_id: str,
    plans: Sequence[Plan],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    wanted: Mapping[str, int],
) -> tuple[list[Outcome], int]:
    """Write what was pending under the versions `wanted` and still is; the labels are those of now."""
    values = {"tenant_id": tenant_id, "ids": [plan.draft.id for plan in plans]}
    locked = {row.id: row for row in await connection.execute(LOCKED_PENDING, values)} if plans else {}
    await space.check(connection)
    rows = Rows([], [], [], [], [])
    outcomes = []
    for plan in plans:
        row = locked.get(plan.draft.id)
        before = Stored(*row[:-1]) if row is not None else None
        if row is None or before is None or not _awaits(before, wanted[before.id]) or row.digest != plan.sha256:
            continue
        labels = {name: getattr(before, name) for name in ("doc_type", "metadata", "created_at")}
        fresh, kept, stale = rechunk(rows, tenant_id, plan, before, None, vectors, labels)
        values = renamed(tenant_id, before.id, plan.places())
        version, updated_at = (await connection.execute(COMPLETE, values)).one()
        outcomes.append(Outcome(before.id, "updated", version, updated_at, fresh, kept, stale))
    return outcomes, await apply(connection, space, tenant_id, rows, plans)

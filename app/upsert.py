"""Putting documents: a draft becomes a `sources` row and `documents` rows, within one tenant.

A put cuts the text into chunks and writes only what changed: a chunk whose text stayed keeps its row and its vector, a
chunk that is gone loses its row. Vectors are computed before a connection is taken; then, in one transaction, the
difference is taken and written (`revision`).
"""

import asyncio
from collections.abc import Container, Sequence
from functools import partial

from app import cache, pending, shadow, spaces
from app.database import Database
from app.difference import embed_fresh
from app.drafts import Draft, check
from app.embedding import Embedder
from app.errors import BadInput, SpaceChanged
from app.meter import Meter
from app.model import Model
from app.outcomes import Fault, Outcome, fault_of, together
from app.plans import Plan, check_count, plan_all, plan_each
from app.revision import Space, unless_overtaken, write
from app.settings import Settings
from app.stored import look_up


async def put(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    drafts: Sequence[Draft],
    *,
    expected: Container[str | None] | None = None,
    token_limit: int | None = None,
    meter: Meter | None = None,
    later: bool = False,
) -> list[Outcome]:
    """Store these documents, all or none, and say for each what changed. Their order is kept.

    `expected` (one draft): VersionConflict unless it holds the tag of what is stored, None standing for nothing.
    `token_limit`: TooLarge when the texts to embed have more tokens in all. `meter` counts what embedding takes, and may
    limit it: BudgetSpent. BadInput and EmbeddingFailed name the items: `documents[3].content`.
    `later`: store the texts only; a worker cuts and embeds them, and until then searches find what they find now.
    Documents that bring their vectors are stored whole all the same.
    """
    await _expect(database, embedder, settings, drafts)
    other = spaces.beside(database)
    if other is not None and drafts and all(shadow.names(draft, other) for draft in drafts):
        try:
            return await _bring(database, tenant_id, drafts, other.model)
        except SpaceChanged:  # it is the one that is searched by now, or is gone
            await spaces.refresh(database)

    async def stored_in(space: Embedder) -> list[Outcome]:
        return await _put(database, space, settings, tenant_id, drafts, expected, token_limit, meter, later=later)

    return await spaces.following(database, settings, embedder, stored_in)


async def _expect(database: Database, embedder: Embedder, settings: Settings, drafts: Sequence[Draft]) -> None:
    brought = [(draft.embedding_model, len(draft.embedding)) for draft in drafts if draft.embedding is not None]
    await spaces.expect(database, settings, embedder, brought)


async def _bring(database: Database, tenant_id: str, drafts: Sequence[Draft], model: Model) -> list[Outcome]:
    """Vectors of the model that is not searched, for documents that are stored with vectors of their own."""
    check_count(drafts)
    brought = []
    for index, draft in enumerate(drafts):
        try:
            vector = check(draft, model.dimensions)
        except BadInput as fault:
            raise (fault.under(f"documents[{index}]") if len(drafts) > 1 else fault) from None
        if vector is not None:
            brought.append(shadow.Brought(draft.id, cache.digest(draft.content), vector))
    stored = await shadow.bring(database, tenant_id, model, brought)
    return [Outcome(each.id, "unchanged", *stored[each.id], reused=1) for each in brought]


async def _put(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    drafts: Sequence[Draft],
    expected: Container[str | None] | None,
    token_limit: int | None,
    meter: Meter | None,
    *,
    later: bool,
) -> list[Outcome]:
    cutter = await shadow.cutter(database, embedder, settings)
    plans = await asyncio.to_thread(plan_all, cutter, settings, drafts, token_limit, later=later)

    async def attempt() -> tuple[list[Outcome], int]:
        stored = await look_up(database, tenant_id, [plan.draft.id for plan in plans])
        vectors, faults = await embed_fresh(database, embedder, settings, tenant_id, plans, stored, meter)
        if faults:
            raise together(faults, len(plans))
        beside = await shadow.vectors(database, embedder, settings, tenant_id, list(vectors))
        async with database.write(tenant_id) as connection:
            space = Space(database, embedder, beside)
            outcomes, unfolded = await write(connection, space, tenant_id, plans, vectors, stored, expected)
            if any(outcome.state == "pending" for outcome in outcomes):
                await pending.ring(database, connection)
        return outcomes, unfolded

    return await unless_overtaken(database, tenant_id, attempt)


async def put_each(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    drafts: Sequence[Draft],
    *,
    meter: Meter | None = None,
) -> list[Outcome | Fault]:
    """Store each of these documents that can be stored, whole; say for each what changed or why it was left out.

    The answers are in the order of the drafts. Raises only where nothing was stored: BadInput for more than MAX_BATCH
    drafts, and what the database fails with.
    """
    check_count(drafts)
    await _expect(database, embedder, settings, drafts)

    async def stored_in(space: Embedder) -> list[Outcome | Fault]:
        look = partial(spaces.look, database, settings, embedder, space)
        return await _put_each(database, space, settings, tenant_id, drafts, meter, look)

    return await spaces.following(database, settings, embedder, stored_in)


async def _put_each(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    drafts: Sequence[Draft],
    meter: Meter | None,
    look: spaces.Look,
) -> list[Outcome | Fault]:
    cutter = await shadow.cutter(database, embedder, settings)
    planned = await asyncio.to_thread(plan_each, cutter, settings, drafts)
    answers: list[Outcome | Fault | None] = [item if isinstance(item, Fault) else None for item in planned]
    plans = {index: item for index, item in enumerate(planned) if isinstance(item, Plan)}
    if not plans:
        return [answer for answer in answers if answer is not None]

    async def attempt() -> tuple[list[Outcome], int]:
        stored = await look_up(database, tenant_id, [plan.draft.id for plan in plans.values()])
        every = list(plans.values())
        vectors, faults = await embed_fresh(database, embedder, settings, tenant_id, every, stored, meter)
        await look(faults.values())
        left_out = dict(zip(plans, map(faults.get, range(len(every))), strict=True))
        for index, error in left_out.items():
            if error is not None:
                answers[index] = fault_of(plans.pop(index).draft, error)
        if not plans:
            return [], 0
        beside = await shadow.vectors(database, embedder, settings, tenant_id, list(vectors))
        async with database.write(tenant_id) as connection:
            every, space = list(plans.values()), Space(database, embedder, beside)
            outcomes, unfolded = await write(connection, space, tenant_id, every, vectors, stored, None)
        return outcomes, unfolded

    outcomes = await unless_overtaken(database, tenant_id, attempt)
    for index, outcome in zip(plans, outcomes, strict=True):
        answers[index] = outcome
    return [answer for answer in answers if answer is not None]

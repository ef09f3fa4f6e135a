"""What a plan changes of what is stored: the chunks to embed, and the rows to add, relabel and remove."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from app import cache
from app.database import Database
from app.drafts import Draft
from app.embedding import Embedder
from app.errors import EmbeddingFailed, PgrecallError
from app.meter import Meter
from app.outcomes import Outcome
from app.plans import Plan, cut, uncut
from app.settings import Settings
from app.stored import Overtaken, Stored, look_up, own_vectors


class Difference(NamedTuple):
    """What a put of a draft would do. `fresh`: texts of the chunks that have no row to keep, where chunks were asked for."""

    id: str
    status: Literal["created", "updated", "unchanged"]
    fresh: list[str]
    reused: int = 0


async def compare(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    drafts: Sequence[Draft],
    *,
    chunks: bool = False,
) -> list[Difference]:
    """How drafts, of different ids and within the limits, differ from what is stored; nothing is written.

    Without `chunks` no text is cut: what did not change is recognised by its hash alone.
    """
    stored, own = await asyncio.gather(
        look_up(database, tenant_id, [draft.id for draft in drafts]),
        own_vectors(database, tenant_id, [draft.id for draft in drafts if draft.embedding is not None]),
    )

    def differences() -> list[Difference]:
        made = []
        for draft in drafts:
            before = stored.get(draft.id)
            plan = uncut(embedder, settings, draft)
            if before is not None and before.matches(plan, own.get(draft.id)):
                made.append(Difference(draft.id, "unchanged", [], len(before.chunk_keys)))
                continue
            pieces = cut(embedder, settings, draft, None).chunks if chunks and plan.own is None else []
            kept = before.reusable(plan) if before else set()
            fresh = [chunk.content for chunk in pieces if chunk.key not in kept]
            made.append(Difference(draft.id, "updated" if before else "created", fresh, len(pieces) - len(fresh)))
        return made

    return await asyncio.to_thread(differences)


class Rows(NamedTuple):
    """Values for the statements of a write, a list each."""

    removed: list[dict[str, Any]]
    relabelled: list[dict[str, Any]]
    added: list[dict[str, Any]]
    replaced: list[dict[str, Any]]
    queued: list[dict[str, Any]]


async def embed_fresh(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    plans: Sequence[Plan],
    stored: Mapping[str, Stored],
    meter: Meter | None,
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[int, PgrecallError]]:
    """A vector for each text that has no row to keep, by text; and the fault of each plan that lacks one, by position."""
    needed: list[list[str]] = []
    for plan in plans:
        before = stored.get(plan.draft.id)
        settled = plan.later or plan.own is not None or (before is not None and before.matches(plan, None))
        kept = before.reusable(plan) if before else set()
        needed.append([] if settled else [chunk.content for chunk in plan.chunks if chunk.key not in kept])
    texts = [text for some in needed for text in some]
    attempt = await cache.embed_each(database, embedder, settings, tenant_id, texts, meter=meter)
    at_fault = {texts[position]: fault for position, fault in attempt.faults.items()}
    faults: dict[int, PgrecallError] = {}
    if at_fault:
        for index, some in enumerate(needed):
            mine = [at_fault[text] for text in some if text in at_fault]
            # What is the document's own fault is what its owner can mend.
            mine.sort(key=lambda fault: not (isinstance(fault, EmbeddingFailed) and fault.index is not None))
            if mine:
                faults[index] = mine[0]
    return dict(zip(texts, attempt.vectors, strict=True)), faults


def revise(
    rows: Rows,
    tenant_id: str,
    plan: Plan,
    before: Stored | None,
    embedding: npt.NDArray[np.float32] | None,
    vectors: Mapping[str, npt.NDArray[np.float32]],
    now: datetime,
) -> Outcome:
    """Add to `rows` what turns the stored document into the planned one. `before` None: its source has just been made."""
    draft = plan.draft
    labels = {
        "doc_type": draft.doc_type,
        "metadata": draft.metadata,
        "created_at": draft.created_at or (before.created_at if before else now),
    }
    if plan.later:
        if before is None:
            return Outcome(draft.id, "created", 1, now, state="pending")
        rows.queued.append(renamed(tenant_id, draft.id, plan.text() | labels))
        return Outcome(draft.id, "updated", before.version + 1, now, state="pending")
    fresh, kept, stale = rechunk(rows, tenant_id, plan, before, embedding, vectors, labels)
    if before is None:
        return Outcome(draft.id, "created", 1, now, embedded=fresh)
    rows.replaced.append(renamed(tenant_id, draft.id, plan.text() | plan.places() | labels))
    return Outcome(draft.id, "updated", before.version + 1, now, fresh, kept, stale)


def rechunk(
    rows: Rows,
    tenant_id: str,
    plan: Plan,
    before: Stored | None,
    embedding: npt.NDArray[np.float32] | None,
    vectors: Mapping[str, npt.NDArray[np.float32]],
    labels: dict[str, Any],
) -> tuple[int, int, int]:
    """Add to `rows` what turns the stored chunks into the planned ones. How many are new, kept and gone."""
    kept = before.reusable(plan, embedding) & {chunk.key for chunk in plan.chunks} if before else set()
    fresh = [chunk for chunk in plan.chunks if chunk.key not in kept]
    for chunk in fresh:
        vector = vectors.get(chunk.content) if plan.own is None else plan.own
        if vector is None:
            raise Overtaken  # a row this write meant to keep is gone
        row = {"tenant_id": tenant_id, "id": plan.draft.id, "chunk_key": chunk.key, "content": chunk.content}
        rows.added.append(row | {"embedding": vector} | labels)
    stale = sorted(set(before.chunk_keys) - kept) if before else []
    if stale:
        rows.removed.append({"tenant_id": tenant_id, "document_id": plan.draft.id, "keys": stale})
    if kept:
        rows.relabelled.append(renamed(tenant_id, plan.draft.id, labels))
    return len(fresh), len(kept), len(stale)


def renamed(tenant_id: str, document_id: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an UPDATE, whose parameters may not be called as its columns are."""
    return {"of_tenant": tenant_id, "document_id": document_id} | {f"new_{name}": v for name, v in values.items()}

"""Putting documents: a draft becomes a `sources` row and `documents` rows, within one tenant.

A put cuts the text into chunks and writes only what changed: a chunk whose text stayed keeps its row and its vector, a
chunk that is gone loses its row. Vectors are computed before a connection is taken; then, in one transaction, the
`sources` row is locked (two writers of a document queue there) and the difference is taken against what is stored *now*.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, Text, bindparam, case, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert_into
from sqlalchemy.ext.asyncio import AsyncConnection

from app import bulk, cache, chunking, pending, shadow, spaces, terms
from app.batching import named
from app.chunking import Chunk
from app.database import Database
from app.drafts import Draft, check, check_model
from app.embedding import Embedder
from app.errors import BadInput, EmbeddingFailed, PgrecallError, SpaceChanged, TooLarge, Unavailable, VersionConflict
from app.meter import Meter
from app.model import Model
from app.settings import Settings
from app.shadow import Cutter
from app.statements import rendered
from app.tables import documents, sources, tenant_documents, tenant_sources
from app.tags import tag

MAX_BATCH = 1_000
TRIES = 5


class Outcome(NamedTuple):
    """What a put did. `embedded` chunks are new rows, `reused` kept theirs, `removed` are gone.

    `state` pending: the text is stored, and a worker will do the rest.
    """

    id: str
    status: Literal["created", "updated", "unchanged"]
    version: int
    updated_at: datetime
    embedded: int = 0
    reused: int = 0
    removed: int = 0
    state: Literal["ready", "pending"] = "ready"


class Claimed(NamedTuple):
    """A pending document as it was when a worker took it in hand."""

    draft: Draft
    version: int


class Fault(NamedTuple):
    """Why a document was not stored. `field` is the part of it that `reason` is about, empty for none.

    `lasting`: the same document will fail the same way again, as one that is over a limit, or has a text the model
    refuses. Otherwise something came in the way, which `error` says: a server that is away, a budget that is spent.
    """

    id: str
    field: str
    reason: str
    lasting: bool
    error: PgrecallError

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}" if self.field else self.reason


class _Overtaken(Exception):
    """Another writer changed what this write was going to build on."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """A draft, checked and cut."""

    draft: Draft
    sha256: bytes
    chunks: list[Chunk]
    chunker: str
    model: str
    own: npt.NDArray[np.float32] | None
    later: bool = False
    """Stored now, cut and embedded by a worker."""

    @property
    def origin(self) -> str:
        return "pgrecall" if self.own is None else "caller"

    def text(self) -> dict[str, Any]:
        """What the caller gave, but for created_at."""
        draft = self.draft
        return {
            "title": draft.title,
            "content": draft.content,
            "doc_type": draft.doc_type,
            "metadata": draft.metadata,
        }

    def places(self) -> dict[str, Any]:
        """What is known once the text has been cut and embedded."""
        return {
            "content_sha256": None if self.later else self.sha256,
            "chunk_keys": [chunk.key for chunk in self.chunks],
            "start_offsets": [chunk.start for chunk in self.chunks],
            "state": "pending" if self.later else "ready",
            "chunker": None if self.later else self.chunker,
            "embedding_origin": self.origin,
            "embedding_model": None if self.later else self.model,
        }


Look = Callable[[], Awaitable[None]]
"""`spaces.look`, when an embedder has failed."""


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
    _check_count(drafts)
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
    plans = await asyncio.to_thread(_plan, cutter, settings, drafts, token_limit, later=later)
    for _ in range(TRIES):
        stored = await _stored(database, tenant_id, [plan.draft.id for plan in plans])
        vectors, faults = await _vectors(database, embedder, settings, tenant_id, plans, stored, meter)
        if faults:
            raise _together(faults, len(plans))
        beside = await shadow.vectors(database, embedder, settings, tenant_id, list(vectors))
        try:
            async with database.write(tenant_id) as connection:
                space = _Space(database, embedder, beside)
                outcomes, unfolded = await _write(connection, space, tenant_id, plans, vectors, stored, expected)
                if any(outcome.state == "pending" for outcome in outcomes):
                    await pending.ring(database, connection)
        except _Overtaken:
            continue
        if unfolded > terms.FOLD_AFTER:
            await terms.fold(database, tenant_id)
        return outcomes
    raise Unavailable("other writers kept changing these documents; try again")


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
    _check_count(drafts)
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
    look: Look,
) -> list[Outcome | Fault]:
    cutter = await shadow.cutter(database, embedder, settings)
    planned = await asyncio.to_thread(_plan_each, cutter, settings, drafts)
    answers: list[Outcome | Fault | None] = [item if isinstance(item, Fault) else None for item in planned]
    plans = {index: item for index, item in enumerate(planned) if isinstance(item, _Plan)}
    if not plans:
        return [answer for answer in answers if answer is not None]
    for _ in range(TRIES):
        stored = await _stored(database, tenant_id, [plan.draft.id for plan in plans.values()])
        every = list(plans.values())
        vectors, faults = await _vectors(database, embedder, settings, tenant_id, every, stored, meter)
        await _look(faults, look)
        left_out = dict(zip(plans, map(faults.get, range(len(every))), strict=True))
        for index, error in left_out.items():
            if error is not None:
                answers[index] = _fault(plans.pop(index).draft, error)
        beside = await shadow.vectors(database, embedder, settings, tenant_id, list(vectors)) if plans else None
        try:
            outcomes: list[Outcome] = []
            unfolded = 0
            if plans:
                async with database.write(tenant_id) as connection:
                    every, space = list(plans.values()), _Space(database, embedder, beside)
                    outcomes, unfolded = await _write(connection, space, tenant_id, every, vectors, stored, None)
        except _Overtaken:
            continue
        if unfolded > terms.FOLD_AFTER:
            await terms.fold(database, tenant_id)
        for index, outcome in zip(plans, outcomes, strict=True):
            answers[index] = outcome
        return [answer for answer in answers if answer is not None]
    raise Unavailable("other writers kept changing these documents; try again")


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
    database: Database, embedder: Embedder, settings: Settings, tenant_id: str, claimed: Sequence[Claimed], look: Look
) -> list[Outcome | Fault | None]:
    wanted = {each.draft.id: each.version for each in claimed}
    cutter = await shadow.cutter(database, embedder, settings)
    planned = await asyncio.to_thread(_plan_each, cutter, settings, [each.draft for each in claimed])
    answers: dict[str, Outcome | Fault] = {item.id: item for item in planned if isinstance(item, Fault)}
    for _ in range(TRIES):
        stored = await _stored(database, tenant_id, list(wanted))
        plans = [item for item in planned if isinstance(item, _Plan)]
        # What is gone already is not paid for.
        plans = [plan for plan in plans if _awaits(stored.get(plan.draft.id), wanted[plan.draft.id])]
        vectors, faults = await _vectors(database, embedder, settings, tenant_id, plans, stored, None)
        await _look(faults, look)
        answers |= {plans[index].draft.id: _fault(plans[index].draft, error) for index, error in faults.items()}
        plans = [plan for index, plan in enumerate(plans) if index not in faults]
        beside = await shadow.vectors(database, embedder, settings, tenant_id, list(vectors)) if plans else None
        try:
            outcomes: list[Outcome] = []
            unfolded = 0
            if plans:
                async with database.write(tenant_id) as connection:
                    space = _Space(database, embedder, beside)
                    outcomes, unfolded = await _finish(connection, space, tenant_id, plans, vectors, wanted)
        except _Overtaken:
            continue
        if unfolded > terms.FOLD_AFTER:
            await terms.fold(database, tenant_id)
        answers |= {outcome.id: outcome for outcome in outcomes}
        return [answers.get(document_id) for document_id in wanted]
    raise Unavailable("other writers kept changing these documents; try again")


async def _look(faults: Mapping[int, PgrecallError], look: Look) -> None:
    """Before anything is written or given up. Raises SpaceChanged where another embedder is the one to use."""
    if any(isinstance(fault, EmbeddingFailed) for fault in faults.values()):
        await look()


def _awaits(stored: "_Stored | None", version: int) -> bool:
    return stored is not None and stored.version == version and stored.state == "pending"


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
        _stored(database, tenant_id, [draft.id for draft in drafts]),
        _own(database, tenant_id, [draft.id for draft in drafts if draft.embedding is not None]),
    )

    def differences() -> list[Difference]:
        made = []
        for draft in drafts:
            before = stored.get(draft.id)
            plan = _uncut(embedder, settings, draft)
            if before is not None and before.matches(plan, own.get(draft.id)):
                made.append(Difference(draft.id, "unchanged", [], len(before.chunk_keys)))
                continue
            cut = _cut(embedder, settings, draft, None).chunks if chunks and plan.own is None else []
            kept = before.reusable(plan) if before else set()
            fresh = [chunk.content for chunk in cut if chunk.key not in kept]
            made.append(Difference(draft.id, "updated" if before else "created", fresh, len(cut) - len(fresh)))
        return made

    return await asyncio.to_thread(differences)


def _check_count(drafts: Sequence[Draft]) -> None:
    if not 1 <= len(drafts) <= MAX_BATCH:
        raise BadInput("documents", f"{len(drafts)} items; allowed: 1 to {MAX_BATCH:,}")


def _plan(
    embedder: Embedder | Cutter,
    settings: Settings,
    drafts: Sequence[Draft],
    token_limit: int | None,
    *,
    later: bool = False,
) -> list[_Plan]:
    _check_count(drafts)
    own = []
    seen: dict[str, int] = {}
    for index, draft in enumerate(drafts):
        try:
            check_model(draft.embedding_model, draft.embedding, embedder.model)
            own.append(check(draft, embedder.dimensions))
        except BadInput as fault:
            raise (fault.under(f"documents[{index}]") if len(drafts) > 1 else fault) from None
        if draft.id in seen:
            raise BadInput(f"documents[{index}].id", f"{draft.id!r} is also the id of documents[{seen[draft.id]}]")
        seen[draft.id] = index
    if token_limit is not None and not later:
        _check_tokens(embedder, [draft.content for draft in drafts if draft.embedding is None], token_limit)
    return [_cut(embedder, settings, draft, vector, later=later) for draft, vector in zip(drafts, own, strict=True)]


def _plan_each(embedder: Embedder | Cutter, settings: Settings, drafts: Sequence[Draft]) -> list[_Plan | Fault]:
    planned: list[_Plan | Fault] = []
    seen: dict[str, int] = {}
    for index, draft in enumerate(drafts):
        try:
            check_model(draft.embedding_model, draft.embedding, embedder.model)
            own = check(draft, embedder.dimensions)
            if draft.id in seen:
                raise BadInput("id", f"{draft.id!r} is also the id of documents[{seen[draft.id]}]")  # noqa: TRY301
        except BadInput as error:
            planned.append(_fault(draft, error))
        else:
            seen[draft.id] = index
            planned.append(_cut(embedder, settings, draft, own))
    return planned


def _cut(
    embedder: Embedder | Cutter,
    settings: Settings,
    draft: Draft,
    own: npt.NDArray[np.float32] | None,
    *,
    later: bool = False,
) -> _Plan:
    max_tokens = min(settings.chunk_max_tokens, embedder.max_tokens)
    if own is not None:
        chunks = [Chunk(chunking.key(draft.content), 0, draft.content)]
        return _Plan(draft, cache.digest(draft.content), chunks, "whole", embedder.model, own)
    overlap = settings.chunk_overlap_tokens
    if later:
        return _uncut(embedder, settings, draft, later=True)
    chunks = chunking.chunk(draft.content, embedder.count_tokens, max_tokens=max_tokens, overlap_tokens=overlap)
    return _Plan(draft, cache.digest(draft.content), chunks, _chunker(embedder, settings), embedder.model, None)


def _uncut(embedder: Embedder | Cutter, settings: Settings, draft: Draft, *, later: bool = False) -> _Plan:
    own = None if draft.embedding is None else np.asarray(draft.embedding, np.float32)
    chunker = _chunker(embedder, settings) if own is None else "whole"
    return _Plan(draft, cache.digest(draft.content), [], chunker, embedder.model, own, later)


def _chunker(embedder: Embedder | Cutter, settings: Settings) -> str:
    rules = f"{chunking.VERSION}/{min(settings.chunk_max_tokens, embedder.max_tokens)}/{settings.chunk_overlap_tokens}"
    return rules + (embedder.fits if isinstance(embedder, Cutter) else "")


def _fault(draft: Draft, error: PgrecallError) -> Fault:
    if isinstance(error, BadInput):
        return Fault(draft.id, error.field, error.fault, lasting=True, error=error)
    lasting = isinstance(error, EmbeddingFailed) and error.index is not None
    return Fault(draft.id, "content" if lasting else "", str(error), lasting=lasting, error=error)


def _together(faults: Mapping[int, PgrecallError], count: int) -> PgrecallError:
    """One error for a call of `count` documents that all or none were to be stored by."""
    refused = {
        index: str(fault)
        for index, fault in sorted(faults.items())
        if isinstance(fault, EmbeddingFailed) and fault.index is not None
    }
    if refused:
        return EmbeddingFailed(named(refused, count, "documents[{}].content"), faults=refused)
    return next(iter(faults.values()))


def _check_tokens(embedder: Embedder | Cutter, texts: list[str], limit: int) -> None:
    # No tokenizer makes more tokens than bytes, so a small request is let through without counting.
    if sum(len(text.encode()) for text in texts) <= limit:
        return
    tokens = sum(embedder.count_tokens(texts))
    if tokens > limit:
        raise TooLarge(
            "",
            f"the texts have {tokens:,} tokens; allowed in one request: {limit:,} (PGRECALL_REQUEST_TOKENS). Send fewer",
        )


class _Stored(NamedTuple):
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

    def reusable(self, plan: _Plan, embedding: npt.NDArray[np.float32] | None = None) -> set[str]:
        """Chunks whose rows can stay: same text, and embedded here or brought again as it is stored.

        The keys are those of the rows that are there, whether or not a newer text is pending beside them.
        """
        # Not by embedding_model: `documents` is wholly in the active space, the names follow a change of the model later.
        same_origin = self.embedding_origin == plan.origin
        same_vector = plan.own is None or (embedding is not None and np.array_equal(plan.own, embedding))
        return set(self.chunk_keys) if same_origin and same_vector else set()

    def matches(self, plan: _Plan, embedding: npt.NDArray[np.float32] | None) -> bool:
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


_ids = bindparam("ids", type_=ARRAY(Text))
_tenant = bindparam("tenant_id", type_=Text)
_of_tenant = bindparam("of_tenant", type_=Text)  # an UPDATE's parameters may not be called as its columns are
STORED = select(*(tenant_sources.c[name] for name in _Stored._fields)).where(
    tenant_sources.c.tenant_id == _tenant, tenant_sources.c.id == func.any(_ids)
)
"""What is stored under these ids, without their texts."""

_STORED = rendered(STORED)

LOCKED = (
    select(*(sources.c[name] for name in _Stored._fields))
    .where(sources.c.tenant_id == _tenant, sources.c.id == func.any(_ids))
    .order_by(sources.c.id)
    .with_for_update()
)
"""The same, locked in the order of the ids so that two batches never wait for each other in a circle."""

LOCKED_PENDING = LOCKED.add_columns(func.sha256(func.convert_to(sources.c.content, "UTF8")).label("digest"))
"""The same with the hash of the text as it is now, which SQL may have changed without counting the version."""

OWN_VECTORS = select(tenant_documents.c.id, tenant_documents.c.embedding).where(
    tenant_documents.c.tenant_id == _tenant, tenant_documents.c.id == func.any(_ids)
)
"""The vectors of documents that brought their own (one chunk each)."""

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

_PLACES = [
    "content_sha256",
    "chunk_keys",
    "start_offsets",
    "state",
    "chunker",
    "embedding_origin",
    "embedding_model",
]
_REPLACED = ["title", "content", "doc_type", "metadata", "created_at", *_PLACES]
_UNCLAIMED: dict[str, Any] = {"attempts": 0, "not_before": None, "claimed_by": None, "error": None}
REPLACE = (
    update(sources)
    .where(sources.c.tenant_id == _of_tenant, sources.c.id == bindparam("document_id", type_=Text))
    .values(
        {name: bindparam(f"new_{name}", type_=sources.c[name].type) for name in _REPLACED}
        | {"version": sources.c.version + 1, "updated_at": func.now(), "ready_at": func.now()}
        | _UNCLAIMED
    )
)
"""A document's text and where its chunks stand in it."""

QUEUE = (
    update(sources)
    .where(sources.c.tenant_id == _of_tenant, sources.c.id == bindparam("document_id", type_=Text))
    .values(
        {
            name: bindparam(f"new_{name}", type_=sources.c[name].type)
            for name in ("title", "content", "doc_type", "metadata", "created_at")
        }
        | {"version": sources.c.version + 1, "updated_at": func.now(), "ready_at": None}
        | {"state": "pending", "content_sha256": None}
        | _UNCLAIMED
    )
)
"""A document's text, to be cut and embedded by a worker. Its chunks and their places stay those of the text before."""

_COUNTED = sources.c.content_sha256.is_(None)
COMPLETE = (
    update(sources)
    .where(sources.c.tenant_id == _of_tenant, sources.c.id == bindparam("document_id", type_=Text))
    .values(
        {name: bindparam(f"new_{name}", type_=sources.c[name].type) for name in _PLACES}
        | {
            "version": case((_COUNTED, sources.c.version), else_=sources.c.version + 1),
            "updated_at": case((_COUNTED, sources.c.updated_at), else_=func.now()),
            "ready_at": func.now(),
        }
        | _UNCLAIMED
    )
    .returning(sources.c.version, sources.c.updated_at)
)
"""Where the chunks stand in a text that was pending. A put counted its version; SQL, which leaves the hash, may not have."""


async def _stored(database: Database, tenant_id: str, ids: list[str]) -> dict[str, _Stored]:
    statement = _STORED.with_values("stored", {"tenant_id": tenant_id, "ids": ids})
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    return {row["id"]: _Stored(**row) for row in rows}


_OWN_VECTORS = rendered(OWN_VECTORS)


async def _own(database: Database, tenant_id: str, ids: list[str]) -> dict[str, npt.NDArray[np.float32]]:
    if not ids:
        return {}
    statement = _OWN_VECTORS.with_values("own vectors", {"tenant_id": tenant_id, "ids": ids})
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    return {row["id"]: row["embedding"].to_numpy() for row in rows}


async def _vectors(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    plans: Sequence[_Plan],
    stored: Mapping[str, _Stored],
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


class _Space(NamedTuple):
    """Whose vectors are written: the embedder's, and beside them those of another model while it is being changed."""

    database: Database
    embedder: Embedder
    beside: shadow.Beside | None

    async def check(self, connection: AsyncConnection) -> None:
        """Raise SpaceChanged unless these are what the database wants. To be called with `sources` locked."""
        other = await spaces.locked(connection, self.database, self.embedder)
        if (other and other.where) != (self.beside and self.beside.where):
            raise SpaceChanged((self.embedder.model, self.embedder.dimensions))


async def _write(
    connection: AsyncConnection,
    space: _Space,
    tenant_id: str,
    plans: Sequence[_Plan],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    seen: Mapping[str, _Stored],
    expected: Container[str | None] | None,
) -> tuple[list[Outcome], int]:
    now: datetime = (await connection.execute(NOW)).scalar_one()
    created = await _create(connection, tenant_id, [plan for plan in plans if plan.draft.id not in seen], now)
    locked, own = await _lock(connection, tenant_id, [plan for plan in plans if plan.draft.id not in created])
    await space.check(connection)
    rows = _Rows([], [], [], [], [])
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
            outcomes.append(_difference(rows, tenant_id, plan, before, own.get(plan.draft.id), vectors, now))
    return outcomes, await _apply(connection, space, tenant_id, rows, plans)


async def _finish(
    connection: AsyncConnection,
    space: _Space,
    tenant_id: str,
    plans: Sequence[_Plan],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    wanted: Mapping[str, int],
) -> tuple[list[Outcome], int]:
    """Write what was pending under the versions `wanted` and still is; the labels are those of now."""
    values = {"tenant_id": tenant_id, "ids": [plan.draft.id for plan in plans]}
    locked = {row.id: row for row in await connection.execute(LOCKED_PENDING, values)} if plans else {}
    await space.check(connection)
    rows = _Rows([], [], [], [], [])
    outcomes = []
    for plan in plans:
        row = locked.get(plan.draft.id)
        before = _Stored(*row[:-1]) if row is not None else None
        if row is None or before is None or not _awaits(before, wanted[before.id]) or row.digest != plan.sha256:
            continue
        labels = {name: getattr(before, name) for name in ("doc_type", "metadata", "created_at")}
        fresh, kept, stale = _chunks(rows, tenant_id, plan, before, None, vectors, labels)
        values = _renamed(tenant_id, before.id, plan.places())
        version, updated_at = (await connection.execute(COMPLETE, values)).one()
        outcomes.append(Outcome(before.id, "updated", version, updated_at, fresh, kept, stale))
    return outcomes, await _apply(connection, space, tenant_id, rows, plans)


async def _apply(
    connection: AsyncConnection, space: _Space, tenant_id: str, rows: "_Rows", plans: Sequence[_Plan]
) -> int:
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


class _Rows(NamedTuple):
    """Values for the statements of a write, a list each."""

    removed: list[dict[str, Any]]
    relabelled: list[dict[str, Any]]
    added: list[dict[str, Any]]
    replaced: list[dict[str, Any]]
    queued: list[dict[str, Any]]


def _difference(
    rows: _Rows,
    tenant_id: str,
    plan: _Plan,
    before: _Stored | None,
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
        rows.queued.append(_renamed(tenant_id, draft.id, plan.text() | labels))
        return Outcome(draft.id, "updated", before.version + 1, now, state="pending")
    fresh, kept, stale = _chunks(rows, tenant_id, plan, before, embedding, vectors, labels)
    if before is None:
        return Outcome(draft.id, "created", 1, now, embedded=fresh)
    rows.replaced.append(_renamed(tenant_id, draft.id, plan.text() | plan.places() | labels))
    return Outcome(draft.id, "updated", before.version + 1, now, fresh, kept, stale)


def _chunks(
    rows: _Rows,
    tenant_id: str,
    plan: _Plan,
    before: _Stored | None,
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
            raise _Overtaken  # a row this write meant to keep is gone
        row = {"tenant_id": tenant_id, "id": plan.draft.id, "chunk_key": chunk.key, "content": chunk.content}
        rows.added.append(row | {"embedding": vector} | labels)
    stale = sorted(set(before.chunk_keys) - kept) if before else []
    if stale:
        rows.removed.append({"tenant_id": tenant_id, "document_id": plan.draft.id, "keys": stale})
    if kept:
        rows.relabelled.append(_renamed(tenant_id, plan.draft.id, labels))
    return len(fresh), len(kept), len(stale)


def _renamed(tenant_id: str, document_id: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an UPDATE, whose parameters may not be called as its columns are."""
    return {"of_tenant": tenant_id, "document_id": document_id} | {f"new_{name}": v for name, v in values.items()}


async def _create(connection: AsyncConnection, tenant_id: str, plans: list[_Plan], now: datetime) -> set[str]:
    """Store the texts of documents that were not there; those that came into being meanwhile are left to `_lock`."""
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


async def _lock(
    connection: AsyncConnection, tenant_id: str, plans: list[_Plan]
) -> tuple[dict[str, _Stored], dict[str, npt.NDArray[np.float32]]]:
    """The rows as they are now, with other writers kept out, and the vectors of those that brought their own."""
    if not plans:
        return {}, {}
    values = {"tenant_id": tenant_id, "ids": [plan.draft.id for plan in plans]}
    locked = {row.id: _Stored(*row) for row in await connection.execute(LOCKED, values)}
    if len(locked) < len(plans):
        raise _Overtaken  # deleted in between
    callers = [row.id for row in locked.values() if row.embedding_origin == "caller"]
    if not callers:
        return locked, {}
    rows = await connection.execute(OWN_VECTORS, values | {"ids": callers})
    return locked, {row.id: row.embedding.to_numpy() for row in rows}

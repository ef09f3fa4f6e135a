"""The second set of vectors while the embedding model is being changed: kept in step by every write, searched by none.

`pgrecall_run_documents` is made by `pgrecall model backfill` and has the columns of `documents`. Until the switch it holds
the vectors of the new model, after it those of the former one. A write never waits or fails for its sake: chunks that get
no second vector are left to the backfill, and a switch or a rollback is refused while any are missing.
"""

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, Delete, Table, Text, Update, bindparam, delete, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app import cache, spaces
from app.database import Database
from app.drafts import Draft
from app.embedding import Embedder
from app.errors import BadInput, PgrecallError, SpaceChanged
from app.model import KEPT, Model, Recorded, active
from app.settings import Settings
from app.tables import Vector, documents, shadow, sources

log = logging.getLogger(__name__)

PAUSE = 30.0
"""Seconds for which writes do without the other model after its server has failed."""

Vectors = Mapping[str, npt.NDArray[np.float32]]
_document = bindparam("document_id", type_=Text)


def removing(table: Table) -> Delete:
    """Chunks of one document that are no longer in its text."""
    return delete(table).where(
        table.c.tenant_id == bindparam("tenant_id", type_=Text),
        table.c.id == _document,
        table.c.chunk_key == func.any(bindparam("keys", type_=ARRAY(Text))),
    )


def relabelling(table: Table) -> Update:
    """Type, metadata and date of the chunks that stay, where they differ."""
    new = {name: bindparam(f"new_{name}", type_=table.c[name].type) for name in ("doc_type", "metadata", "created_at")}
    return (
        update(table)
        .where(
            table.c.tenant_id == bindparam("of_tenant", type_=Text),
            table.c.id == _document,
            tuple_(*(table.c[name] for name in new)).is_distinct_from(tuple_(*new.values())),
        )
        .values(new)
    )


REMOVE_CHUNKS, RELABEL_CHUNKS = removing(shadow), relabelling(shadow)
_added = insert(shadow)
ADD_CHUNKS = _added.on_conflict_do_update(
    index_elements=["tenant_id", "id", "chunk_key"],
    set_={name: _added.excluded[name] for name in ("doc_type", "metadata", "created_at", "content", "embedding")},
)
"""Chunks with their vectors of the other model."""


class Beside(NamedTuple):
    """Vectors of the other model by text, as far as there are any."""

    where: Recorded
    vectors: Vectors

    @property
    def model(self) -> Model:
        """Its space."""
        return self.where.model


class Cutter:
    """Stands for an embedder where texts are cut: what it counts as few enough, the other model reads whole too.

    `fits` is part of the name of the rules, so that a document cut for one model alone is told apart.
    """

    def __init__(self, embedder: Embedder, other: Embedder, max_tokens: int) -> None:
        self.model, self.dimensions, self.max_tokens = embedder.model, embedder.dimensions, embedder.max_tokens
        self.fits = f"/{other.max_tokens} {other.model}"
        self._counts = (embedder.count_tokens, other.count_tokens)
        self._share = max_tokens / other.max_tokens

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, or the share of the other model's limit that it takes, whichever is more."""
        ours, theirs = (count(texts) for count in self._counts)
        return [max(one, math.ceil(other * self._share)) for one, other in zip(ours, theirs, strict=True)]


_failed: WeakKeyDictionary[Database, tuple[Recorded, float]] = WeakKeyDictionary()


async def cutter(database: Database, embedder: Embedder, settings: Settings) -> Embedder | Cutter:
    """What texts are measured by when they are cut: the embedder, unless another model is beside it and may read less."""
    other = spaces.beside(database)
    if other is None:
        return embedder
    try:
        using = await spaces.of(database, settings, embedder, other.model)
    except PgrecallError:
        return embedder  # `vectors` says why
    most = min(settings.chunk_max_tokens, embedder.max_tokens)
    # No tokenizer makes four times as many tokens of a text as another; two servers' are estimated alike.
    alike = type(using) is type(embedder) and using.max_tokens >= most
    return embedder if alike or using.max_tokens >= 4 * most else Cutter(embedder, using, most)


async def vectors(
    database: Database, embedder: Embedder, settings: Settings, tenant_id: str, texts: Sequence[str]
) -> Beside | None:
    """These texts in the other space, None where there is no other one. Raises nothing but what cancels the write."""
    other = spaces.beside(database)
    if other is None:
        return None
    failed, when = _failed.get(database, (None, float("-inf")))
    if not texts or (failed == other.where and time.monotonic() - when < PAUSE):
        return Beside(other.where, {})
    try:
        using = await spaces.of(database, settings, embedder, other.model)
        sizes = using.count_tokens(list(texts))
        fitting = [text for text, size in zip(texts, sizes, strict=True) if size <= using.max_tokens]
        found, faults = await cache.embed_each(database, using, settings, tenant_id, fitting)
    except PgrecallError as error:
        found, fitting, faults = np.empty((0, 0), np.float32), [], {}
        in_the_way: PgrecallError | None = error
    else:
        in_the_way = next((fault for fault in faults.values() if getattr(fault, "index", None) is None), None)
    if in_the_way is not None:
        _failed[database] = other.where, time.monotonic()
        log.warning(
            "%s gave no vectors; what is written within %.0f s is left to `pgrecall model backfill`: %s",
            other.name,
            PAUSE,
            in_the_way,
        )
    vectors = zip(fitting, found, strict=True)
    return Beside(other.where, {text: vector for row, (text, vector) in enumerate(vectors) if row not in faults})


class Brought(NamedTuple):
    """A vector of the other model that the caller of a document brings, and the digest of the text it is of."""

    id: str
    sha256: bytes
    vector: npt.NDArray[np.float32]


def names(draft: Draft, other: Recorded) -> bool:
    """Whether a draft brings a vector of the other model. Where both have one name, the length tells."""
    return (
        draft.embedding_model == other.name and draft.embedding is not None and len(draft.embedding) == other.dimensions
    )


LOCK = (
    select(sources.c.id, sources.c.content_sha256, sources.c.embedding_origin, sources.c.version, sources.c.updated_at)
    .where(
        sources.c.tenant_id == bindparam("tenant_id", type_=Text),
        sources.c.id == func.any(bindparam("ids", type_=ARRAY(Text))),
        sources.c.state == "ready",
    )
    .order_by(sources.c.id)
    .with_for_update()
)
"""The documents that vectors are brought for, as they are now."""

_stored = select(*documents.columns).where(
    documents.c.tenant_id == bindparam("tenant_id", type_=Text), documents.c.id == _document
)


async def bring(
    database: Database, tenant_id: str, model: Model, brought: Sequence[Brought]
) -> dict[str, tuple[int, datetime]]:
    """Store vectors of the other model for documents that are stored with these texts and vectors of their own.

    All or none; version and updated_at of each, which stay. Raises BadInput for a document that is not, SpaceChanged
    where the model is not beside the one that is searched any more.
    """
    copied = _stored.with_only_columns(
        *(c for c in documents.columns if c.name != "embedding"),
        bindparam("vector", type_=Vector(model.dimensions)),
    )
    added = insert(shadow).from_select(
        [*(c.name for c in documents.columns if c.name != "embedding"), "embedding"], copied
    )
    statement = added.on_conflict_do_update(
        index_elements=["tenant_id", "id", "chunk_key"], set_={"embedding": added.excluded.embedding}
    )
    async with database.write(tenant_id) as connection:
        found = await connection.execute(LOCK, {"tenant_id": tenant_id, "ids": [each.id for each in brought]})
        locked = {row.id: row for row in found}
        kept = [Recorded(*row) for row in await connection.execute(KEPT)]
        if model not in {each.model for each in kept if each.state != "active"}:
            raise SpaceChanged(active(kept).model)
        for each in brought:
            row = locked.get(each.id)
            if row is None or row.content_sha256 != each.sha256 or row.embedding_origin != "caller":
                raise BadInput(
                    "embedding_model",
                    f"is {model.name}, which is not searched: allowed where the document (here {each.id!r}) is stored with "
                    f"this text and a vector of {active(kept).name}",
                )
        values = [{"tenant_id": tenant_id, "document_id": each.id, "vector": each.vector} for each in brought]
        await connection.execute(statement, values)
    return {each.id: (locked[each.id].version, locked[each.id].updated_at) for each in brought}


async def write(
    connection: AsyncConnection,
    beside: Beside,
    *,
    removed: Sequence[dict[str, Any]],
    relabelled: Sequence[dict[str, Any]],
    added: Sequence[dict[str, Any]],
    own: Collection[str],
) -> None:
    """Do to the second set what is done to `documents`. `own`: documents whose vectors their callers bring."""
    fresh = [
        row | {"embedding": beside.vectors[row["content"]]}
        for row in added
        if row["id"] not in own and row["content"] in beside.vectors
    ]
    for statement, values in ((REMOVE_CHUNKS, removed), (RELABEL_CHUNKS, relabelled), (ADD_CHUNKS, fresh)):
        if values:
            await connection.execute(statement, list(values))

"""The second set of vectors while the embedding model is being changed: kept in step by every write, searched by none.

`pgrecall_run_documents` is made by `pgrecall model backfill` and has the columns of `documents`. Until the switch it holds
the vectors of the new model, after it those of the former one. A write never waits or fails for its sake: chunks that get
no second vector are left to the backfill, and a switch or a rollback is refused while any are missing.
"""

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, Delete, Table, Text, Update, bindparam, delete, func, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from app import cache, spaces
from app.database import Database
from app.embedding import Embedder
from app.errors import PgrecallError
from app.model import Model
from app.settings import Settings
from app.tables import shadow

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

    model: Model
    vectors: Vectors


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


_failed: WeakKeyDictionary[Database, float] = WeakKeyDictionary()


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
    if not texts or time.monotonic() - _failed.get(database, float("-inf")) < PAUSE:
        return Beside(other.model, {})
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
        _failed[database] = time.monotonic()
        log.warning(
            "%s gave no vectors; what is written within %.0f s is left to `pgrecall model backfill`: %s",
            other.name,
            PAUSE,
            in_the_way,
        )
    vectors = zip(fitting, found, strict=True)
    return Beside(other.model, {text: vector for row, (text, vector) in enumerate(vectors) if row not in faults})


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

"""Vectors already paid for: the same text of the same tenant is embedded once, across calls and processes."""

import asyncio
import hashlib
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app import claims, pruning
from app.batching import Attempt, Vectors
from app.database import Database
from app.embedding import Embedder
from app.errors import EmbeddingFailed, PgrecallError
from app.meter import Meter
from app.settings import Settings
from app.tables import embedding_cache as cached

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two looks at what another process computes."""

Vector = npt.NDArray[np.float32]
_Share = asyncio.Future[Vector | EmbeddingFailed | None]

_under_way: WeakKeyDictionary[Database, dict[tuple[claims.Space, bytes], _Share]] = WeakKeyDictionary()
"""What calls of this process are computing. A result of None says nothing of the text: that call gave up for its own reasons."""

LEAVE = text(
    """
with texts as (
    select distinct on (digest) sha256(convert_to(d.content, 'UTF8')) as digest, d.id
      from unnest(cast(:ids as text[]), cast(:keys as text[])) as gone (id, chunk_key)
      join documents d on d.tenant_id = :tenant_id and d.id = gone.id and d.chunk_key = gone.chunk_key
), found as (
    select c.model, c.dimensions, c.content_sha256, t.id
      from texts t
     cross join embedding_models m
      join embedding_cache c on c.tenant_id = :tenant_id and c.model = m.name and c.dimensions = m.dimensions
       and c.input_type = 'document' and c.content_sha256 = t.digest
       for update of c skip locked
)
update embedding_cache c set left_by = found.id from found
 where c.tenant_id = :tenant_id and c.model = found.model and c.dimensions = found.dimensions
   and c.input_type = 'document' and c.content_sha256 = found.content_sha256
"""
)
"""Which document the texts of chunks that are about to be removed were in, so that its deletion takes their vectors along. Two
writers that leave the same texts do not wait for each other: either's document will do."""

ERASE = text(
    """
with found as (
    select model, dimensions, input_type, content_sha256 from embedding_cache
     where tenant_id = :tenant_id
       and (left_by = any (:ids) or content_sha256 = any (array(
            select sha256(convert_to(content, 'UTF8')) from documents where tenant_id = :tenant_id and id = any (:ids))))
     order by created_at, content_sha256, model, dimensions, input_type
       for update
)
delete from embedding_cache c using found
 where c.tenant_id = :tenant_id and c.model = found.model and c.dimensions = found.dimensions
   and c.input_type = found.input_type and c.content_sha256 = found.content_sha256
returning c.content_sha256
"""
).columns(cached.c.content_sha256)
"""Vectors of the texts that documents, which are about to be removed, have or had; in an order, for two not to wait in a
circle. A document beside them that has such a text keeps its rows."""


def digest(text: str) -> bytes:
    """SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode()).digest()


async def embed(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    texts: Sequence[str],
    *,
    meter: Meter | None = None,
) -> Vectors:
    """Document vectors of `texts`, shape (len(texts), dimensions), as `embed_each`, if every text has one.

    Raises EmbeddingFailed with `faults` for texts at fault, else BudgetSpent or what else came in the way. What was
    computed is kept all the same.
    """
    return (await embed_each(database, embedder, settings, tenant_id, texts, meter=meter)).complete()


async def embed_each(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    tenant_id: str,
    texts: Sequence[str],
    *,
    meter: Meter | None = None,
) -> Attempt:
    """Document vectors of `texts`, asking the model only for what nobody has asked it for; and why some have none.

    What another call is computing, in this process or another, is waited for. No connection is held while the model
    works. What was computed is kept before this returns, so a write that fails afterwards does not pay again.
    """
    meter = meter or Meter()
    by_digest = {digest(text): text for text in texts}
    meter.deduplicated += len(texts) - len(by_digest)
    space = claims.Space(tenant_id, embedder.model, embedder.dimensions)
    call = _Call(database, embedder, settings, space, by_digest, meter)
    rest = list(by_digest)
    while rest:
        rest = await call.see_to(rest)
    return _attempt([digest(text) for text in texts], call.vectors, call.faults, embedder.dimensions)


@dataclass
class _Call:
    """One call of `embed_each`: its texts by digest, and what has come of them so far."""

    database: Database
    embedder: Embedder
    settings: Settings
    space: claims.Space
    texts: Mapping[bytes, str]
    meter: Meter
    vectors: dict[bytes, Vector] = field(default_factory=dict)
    faults: dict[bytes, PgrecallError] = field(default_factory=dict)
    failure: PgrecallError | None = None
    """What came in the way of texts that are not at fault themselves: nothing more is begun."""

    async def see_to(self, digests: list[bytes]) -> list[bytes]:
        """Find or compute vectors; those that other calls of this process compute are theirs. What is still to be done."""
        shares = _under_way.setdefault(self.database, {})
        others = {d: shares[self.space, d] for d in digests if (self.space, d) in shares}
        mine = [d for d in digests if d not in others]
        loop = asyncio.get_running_loop()
        shares |= {(self.space, d): loop.create_future() for d in mine}
        try:
            if self.settings.cache_rows:
                await self._found_or_computed(mine)
            else:
                await self._computed(mine)
        finally:
            for d in mine:
                self._share(d)
                del shares[self.space, d]
        if others:
            await asyncio.wait(others.values())
        return [d for d, share in others.items() if not self._take(d, share.result())]

    def _share(self, d: bytes) -> None:
        share = _under_way[self.database][self.space, d]
        if not share.done():
            fault = self.faults.get(d)
            share.set_result(self.vectors.get(d, fault if isinstance(fault, EmbeddingFailed) else None))

    def _take(self, d: bytes, result: Vector | EmbeddingFailed | None) -> bool:
        match result:
            case None:
                return False
            case EmbeddingFailed():
                self.faults[d] = result
            case _:
                self.vectors[d] = result
                self.meter.deduplicated += 1
        return True

    async def _found_or_computed(self, digests: list[bytes]) -> None:
        """See to all of these, waiting for other processes where they are at work."""
        holder = uuid.uuid4()
        rest, pause, first = set(digests), FIRST_PAUSE, True
        while rest:
            known, claimed = await claims.claim(self.database, self.space, holder, sorted(rest))
            for d, vector in known.items():
                self.vectors[d] = vector
                self._share(d)
            if first:
                self.meter.cache_hits += len(known)
            else:
                self.meter.deduplicated += len(known)
            mine = [d for d in claimed if d not in known]
            if claimed:
                keeper = claims.Keeper(self.database, self.space, holder, claimed)
                async with keeper:
                    await self._computed(mine, keeper)
                await pruning.added(self.database, self.settings, self.space.tenant_id, keeper.kept)
                pause = FIRST_PAUSE
            rest.difference_update(known, claimed)
            if rest and self.failure is not None:
                self.faults |= dict.fromkeys(rest, self.failure)
                return
            if rest:
                await asyncio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - only to come at different moments
                pause = min(2 * pause, LONGEST_PAUSE)
            first = False

    async def _computed(self, digests: list[bytes], keeper: claims.Keeper | None = None) -> None:
        by_text = {self.texts[d]: d for d in digests}

        def done(texts: Sequence[str], vectors: Vectors) -> None:
            for content, vector in zip(texts, vectors, strict=True):
                d = by_text[content]
                self.vectors[d] = vector
                self._share(d)
                if keeper is not None:
                    keeper.add(d, vector)

        attempt = await self.embedder.embed_each(list(by_text), "document", self.meter, done)
        for position, fault in attempt.faults.items():
            self.faults[digests[position]] = fault
            if not (isinstance(fault, EmbeddingFailed) and fault.index is not None):
                self.failure = fault


def _attempt(
    digests: list[bytes], known: Mapping[bytes, Vector], faults: Mapping[bytes, PgrecallError], dimensions: int
) -> Attempt:
    """What is known and what is at fault, by the positions of this call's texts."""
    vectors = np.full((len(digests), dimensions), np.nan, np.float32)
    placed: dict[int, PgrecallError] = {}
    for position, d in enumerate(digests):
        fault = faults.get(d)
        if fault is None:
            vectors[position] = known[d]
        elif isinstance(fault, EmbeddingFailed) and fault.index is not None:
            placed[position] = EmbeddingFailed(str(fault), position)
        else:
            placed[position] = fault
    return Attempt(vectors, placed)


async def leave(connection: AsyncConnection, tenant_id: str, chunks: Sequence[tuple[str, str]]) -> None:
    """Note the document of chunks, (document, chunk_key) each, that are about to be removed."""
    ids, keys = zip(*chunks, strict=True)
    await connection.execute(LEAVE, {"tenant_id": tenant_id, "ids": list(ids), "keys": list(keys)})


async def erase(connection: AsyncConnection, tenant_id: str, ids: Sequence[str]) -> list[bytes]:
    """Remove the vectors of what these documents, about to be removed, say or said. The digest of each removed entry."""
    return list((await connection.execute(ERASE, {"tenant_id": tenant_id, "ids": list(ids)})).scalars())

"""Who computes a text's vector, among all processes, and the cache its vector goes into.

A claim is a row with a time limit, so no connection and no lock is held while the model works. Its holder moves the
limit on; when the holder is killed, the limit passes and another call takes the text over. A call that wants several
texts claims what is free, sees to that first, and only then waits for what others hold: no two wait for each other.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from sqlalchemy import ARRAY, LargeBinary, bindparam, func, select, text

from app import bulk, packing
from app.database import Database
from app.errors import PgrecallError
from app.statements import rendered
from app.tables import embedding_cache as cached

LEASE = 20.0
"""Seconds a claim holds, unless it is renewed; so long a text waits whose holder was killed."""

RENEWALS = 4
"""Renewals within a lease: a stall of three quarters of it loses nothing."""

LINGER, ENOUGH = 1.0, 64
"""Seconds, and vectors, after which those that have come are kept: a local model's few at a time would cost a transaction each."""

Vector = npt.NDArray[np.float32]

KNOWN = (
    select(cached.c.content_sha256, cached.c.embedding)
    .where(cached.c.tenant_id == bindparam("tenant_id"))
    .where(cached.c.model == bindparam("model"))
    .where(cached.c.dimensions == bindparam("dimensions"))
    .where(cached.c.input_type == "document")
    .where(cached.c.content_sha256 == func.any(bindparam("digests", type_=ARRAY(LargeBinary))))
)
"""Vectors of texts by their digest."""

CLAIM = """
insert into embedding_claims (tenant_id, model, dimensions, input_type, content_sha256, holder, expires_at)
select :tenant_id, :model, :dimensions, 'document', wanted.digest, :holder,
       clock_timestamp() + make_interval(secs => :lease)
  from unnest(cast(:digests as bytea[])) as wanted (digest)
 order by wanted.digest
    on conflict on constraint embedding_claims_pkey
    do update set holder = excluded.holder, expires_at = excluded.expires_at
 where embedding_claims.expires_at < clock_timestamp()
returning content_sha256
"""
"""Claim the texts that no call holds which is alive; those that are claimed now come back."""

KEEP = """
insert into embedding_cache (tenant_id, model, dimensions, input_type, content_sha256, embedding)
select :tenant_id, :model, :dimensions, 'document', kept.digest, kept.embedding
  from unnest(cast(:digests as bytea[]), cast(:vectors as vector[])) as kept (digest, embedding)
 order by kept.digest
    on conflict do nothing
"""
"""Vectors that have been computed."""

_MINE = """
{change}
 where tenant_id = :tenant_id and model = :model and dimensions = :dimensions and input_type = 'document'
   and content_sha256 = any (array(
       select content_sha256 from embedding_claims
        where tenant_id = :tenant_id and model = :model and dimensions = :dimensions and input_type = 'document'
          and content_sha256 = any (cast(:digests as bytea[])) and holder = :holder
        order by content_sha256 for update))
"""
# The array is made once, and locks in the order of the key, as CLAIM does: two calls with the same texts must not wait for
# each other in a circle. A join would lock all of them again for each.

RENEW = _MINE.format(
    change="update embedding_claims set expires_at = clock_timestamp() + make_interval(secs => :lease)"
)
"""More time for claims of one call."""

RELEASE = _MINE.format(change="delete from embedding_claims")
"""The end of claims of one call."""


_KNOWN = rendered(KNOWN)


class Space(NamedTuple):
    """Whose texts are embedded, and by which model."""

    tenant_id: str
    model: str
    dimensions: int


class Found(NamedTuple):
    """What is known of the texts asked for, and which of the others this call is to compute."""

    known: dict[bytes, Vector]
    claimed: list[bytes]


async def claim(database: Database, space: Space, holder: uuid.UUID, digests: Sequence[bytes]) -> Found:
    """Look these texts up and claim those of the others that can be claimed."""
    values = {**space._asdict(), "digests": list(digests)}
    (rows,) = await database.fetch(space.tenant_id, [_KNOWN.with_values("known vectors", values)], primary=True)
    known = {row["content_sha256"]: row["embedding"].to_numpy() for row in rows}
    values["digests"] = missing = [digest for digest in digests if digest not in known]
    if not missing:
        return Found(known, [])
    async with database.write(space.tenant_id) as connection:
        claimed = (await connection.execute(text(CLAIM), values | {"holder": holder, "lease": LEASE})).scalars().all()
        # A claim can be had because its holder has kept the vector and gone: that is seen only now.
        late = await connection.execute(KNOWN, values)
        known |= {row.content_sha256: row.embedding.to_numpy() for row in late}
    return Found(known, list(claimed))


class Keeper:
    """Keeps vectors as they come, renews the claims on what is still to come, and gives back the rest at the end."""

    def __init__(self, database: Database, space: Space, holder: uuid.UUID, claimed: Iterable[bytes]) -> None:
        self.kept = 0
        self._database = database
        self._space = space
        self._holder = holder
        self._held = set(claimed)
        self._fresh: dict[bytes, Vector] = {}
        self._over = False
        self._wake = asyncio.Event()

    def add(self, digest: bytes, vector: Vector) -> None:
        """A vector that has been computed."""
        self._fresh[digest] = vector
        if len(self._fresh) >= ENOUGH:
            self._wake.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A caller that goes away leaves what was paid for behind.
        self._over = True
        self._wake.set()
        await self._task
        with contextlib.suppress(PgrecallError) if error is not None else contextlib.nullcontext():
            await self._keep(release=self._held)

    async def _work(self) -> None:
        renewed = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LINGER, LEASE / RENEWALS)):
                    await self._wake.wait()
            if self._over:
                return
            self._wake.clear()
            # What cannot be done now is tried again, and told at the end.
            with contextlib.suppress(PgrecallError):
                if self._fresh:
                    await self._keep(release=self._fresh)
                if time.monotonic() - renewed > LEASE / RENEWALS:
                    renewed = time.monotonic()
                    await self._renew()

    async def _keep(self, release: Iterable[bytes]) -> None:
        digests, vectors, released = list(self._fresh), list(self._fresh.values()), list(release)
        if not digests and not released:
            return
        async with self._database.write(self._space.tenant_id) as connection:
            if digests:
                packed = packing.vectors(vectors, await bulk.vector_type(connection))
                values = {**self._space._asdict(), "digests": packing.blobs(digests), "vectors": packed}
                await connection.execute(text(KEEP), values)
            await connection.execute(text(RELEASE), self._values(released))
        self.kept += len(digests)
        self._held.difference_update(released)
        for digest in digests:
            del self._fresh[digest]

    async def _renew(self) -> None:
        if self._held:
            async with self._database.write(self._space.tenant_id) as connection:
                await connection.execute(text(RENEW), self._values(list(self._held)) | {"lease": LEASE})

    def _values(self, digests: list[bytes]) -> dict[str, object]:
        return {**self._space._asdict(), "holder": self._holder, "digests": digests}

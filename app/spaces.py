"""The embedders of the spaces a database holds, opened when they are needed; which of them this process works with.

A process need not be started anew when the model is changed. It believes what it saw last; every search says in which
space it was answered and every write looks while it holds its locks (`locked`), and either raises SpaceChanged where that
is another one. `following` then does it again with the other embedder. A failure of the model's server is a reason to look
as well: it may be the one that a rollback was to get away from, or the model may be computed somewhere else by now.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakKeyDictionary

from msgspec.structs import replace
from sqlalchemy.ext.asyncio import AsyncConnection

from app import model
from app.database import Database
from app.embedding import Embedder, LocalEmbedder, open_embedder
from app.errors import DatabaseUnavailable, EmbeddingFailed, PgrecallError, SetupError, SpaceChanged
from app.model import Model, Recorded
from app.settings import Settings

log = logging.getLogger(__name__)

TRIES = 4
"""How often something is done again because the space changed: a replica may be behind the primary."""

T = TypeVar("T")

Look = Callable[[Collection[PgrecallError]], Awaitable[None]]
"""`look`, with all but the faults."""


@dataclass
class _Seen:
    """What this process knows of a database's spaces."""

    models: dict[Model, Recorded] = field(default_factory=dict)
    active: Model | None = None
    opened: dict[Model, tuple[Recorded, Embedder]] = field(default_factory=dict)
    replaced: list[Embedder] = field(default_factory=list)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


_seen: WeakKeyDictionary[Database, _Seen] = WeakKeyDictionary()


def _of(database: Database) -> _Seen:
    return _seen.setdefault(database, _Seen())


def learn(database: Database, models: Sequence[Recorded]) -> None:
    """Remember what the database was seen to hold."""
    seen = _of(database)
    seen.models = {each.model: each for each in models}
    _turn_to(seen, model.active(models).model)


def _turn_to(seen: _Seen, found: Model) -> None:
    if seen.active not in (None, found):
        log.warning("the embedding model is now %s with %d dimensions", *found)
    seen.active = found


async def current(database: Database, settings: Settings, configured: Embedder) -> Embedder:
    """The embedder of the space that was searched when this process last looked; at first the configured one."""
    seen = _of(database)
    return configured if seen.active is None else await of(database, settings, configured, seen.active)


def beside(database: Database) -> Recorded | None:
    """The other model whose vectors were kept in step when this process last looked."""
    seen = _of(database)
    # A search may have seen a switch since the rows were read: then it is the one that was active.
    others = (each for each in seen.models.values() if each.state != "dropped" and each.model != seen.active)
    return next(others, None)


async def of(database: Database, settings: Settings, configured: Embedder, wanted: Model) -> Embedder:
    """The embedder of a recorded model, opened at its first use. Raises SetupError where it cannot be."""
    if wanted == (configured.model, configured.dimensions):
        return configured
    seen = _of(database)
    async with seen.turn:
        if wanted not in seen.models:
            seen.models = {each.model: each for each in await model.every(database)}
        if wanted not in seen.models:
            raise SetupError(f"the model {wanted.name} with {wanted.dimensions} dimensions is not recorded")
        # A change that was given up and begun anew may have another server for the same model; what state it is in is
        # nothing to its embedder.
        row = seen.models[wanted].where
        known, embedder = seen.opened.get(wanted, (None, None))
        if embedder is None or known != row:
            if embedder is not None:
                # Requests that are under way still use it, so it is closed when this process ends.
                seen.replaced.append(embedder)
                del seen.opened[wanted]
            embedder = await asyncio.to_thread(opened, settings, row)
            seen.opened[wanted] = row, embedder
        return embedder


def opened(settings: Settings, recorded: Recorded) -> Embedder:
    """An embedder for a recorded model. Its row says where it runs, the environment has the key."""
    if recorded.provider == "local":
        return LocalEmbedder()
    # A key goes to the server it is for.
    elsewhere = recorded.base_url != settings.openai_base_url
    return open_embedder(
        replace(
            settings,
            embedder="openai",
            embedding_model=recorded.name,
            embedding_dimensions=recorded.dimensions,
            openai_base_url=recorded.base_url,
            openai_api_key=settings.other_api_key if elsewhere else settings.openai_api_key,
        ),
        recorded=elsewhere,
    )


async def locked(connection: AsyncConnection, database: Database, embedder: Embedder) -> Recorded | None:
    """The other model whose vectors are to be kept in step, None where there is none.

    To be called when the transaction holds a lock on rows of `sources`: a change of the model waits for it, so that what
    is found here holds until the transaction ends. Raises SpaceChanged unless the embedder's space is the one searched.
    """
    models = [Recorded(*row) for row in await connection.execute(model.KEPT)]
    seen = _of(database)
    if {each.model: each for each in models} != {m: each for m, each in seen.models.items() if each.state != "dropped"}:
        seen.models = {m: each for m, each in seen.models.items() if each.state == "dropped"}
        seen.models |= {each.model: each for each in models}
    found = model.active(models).model
    _turn_to(seen, found)
    if found != (embedder.model, embedder.dimensions):
        raise SpaceChanged(found)
    return next((each for each in models if each.state != "active"), None)


async def expect(
    database: Database, settings: Settings, configured: Embedder, brought: Sequence[tuple[str | None, int]]
) -> None:
    """Look again where vectors that callers bring, (model if they say, length) each, are not as was last seen."""
    if not brought:
        return
    embedder = await current(database, settings, configured)
    if any(name not in (None, embedder.model) or length != embedder.dimensions for name, length in brought):
        await refresh(database)


async def refresh(database: Database) -> None:
    """Look again."""
    learn(database, await model.every(database))


async def look(
    database: Database, settings: Settings, configured: Embedder, embedder: Embedder, faults: Collection[PgrecallError]
) -> None:
    """Look again if this embedder failed, before anything is written or given up for these faults.

    Raises SpaceChanged where another embedder is to be used in its place.
    """
    if not any(isinstance(fault, EmbeddingFailed) for fault in faults):
        return
    await refresh(database)
    found = await current(database, settings, configured)
    if found is not embedder:
        raise SpaceChanged((found.model, found.dimensions))


async def following(
    database: Database, settings: Settings, configured: Embedder, run: Callable[[Embedder], Awaitable[T]]
) -> T:
    """What `run` gives with the embedder of the space that is searched; again where that changed under it.

    Raises the EmbeddingFailed of an embedder that is still the one to use.
    """
    embedder = await current(database, settings, configured)
    for _ in range(TRIES):
        try:
            return await run(embedder)
        except EmbeddingFailed as failure:
            try:
                await look(database, settings, configured, embedder, [failure])
            except SpaceChanged:
                embedder = await current(database, settings, configured)
            except PgrecallError:
                raise failure from None
            else:
                raise
        except SpaceChanged as changed:
            # The rows as well: the model may have got another server since they were read. Where the primary is away,
            # a replica may still answer by what is known.
            with suppress(DatabaseUnavailable):
                await refresh(database)
            if changed.model is not None:
                _turn_to(_of(database), Model(*changed.model))
            embedder = await current(database, settings, configured)
    return await run(embedder)


async def close(database: Database) -> None:
    """Close the embedders that were opened here."""
    seen = _of(database)
    for embedder in (*seen.replaced, *(embedder for _, embedder in seen.opened.values())):
        await embedder.aclose()
    _seen.pop(database, None)

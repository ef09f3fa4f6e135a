"""A job: documents of one tenant that a worker has in hand, made ready, or put off, or given up with the reason.

Failures are told apart. Where the database or the model's server is away, documents are put back as they were; that never
counts against them. A text over the limits, or one that the server refuses while it takes others, is given up at once; what
fails otherwise is tried again later, PGRECALL_WORKER_ATTEMPTS times in all.
"""

import dataclasses
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ARRAY, Text, bindparam, func, select

from app import completion, pending, spaces
from app.completion import Claimed
from app.database import Database
from app.drafts import MAX_TEXT_BYTES, Draft
from app.embedding import Embedder
from app.errors import BeingErased, EmbeddingFailed, PgrecallError, SetupError, Unavailable
from app.outcomes import Fault, Outcome
from app.pending import Claim
from app.settings import Settings
from app.statements import rendered
from app.tables import tenant_sources

log = logging.getLogger(__name__)

AWAY = (Unavailable, SetupError)
"""What no document is to blame for."""

AGAIN, LATEST = 5.0, 3600.0
"""Seconds until a document that failed is tried again: the first time, and at most."""

PROBE = "pgrecall"
"""A text that no model's server refuses."""

LOAD = select(
    *(tenant_sources.c[name] for name in ("id", "content", "title", "doc_type", "metadata", "created_at", "version"))
).where(
    tenant_sources.c.tenant_id == bindparam("tenant_id", type_=Text),
    tenant_sources.c.id == func.any(bindparam("ids", type_=ARRAY(Text))),
)
"""The documents to be worked on, whole."""

_LOAD = rendered(LOAD)


@dataclass
class Counts:
    """What was done. `deferred`: failures after which a document waits to be tried again."""

    ready: int = 0
    chunks: int = 0
    parked: int = 0
    deferred: int = 0
    overtaken: int = 0

    def add(self, other: "Counts") -> None:
        """Count what another counted."""
        for each in dataclasses.fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True)
class Tools:
    """What a job is done with. `worker` is the name under which the documents were claimed."""

    database: Database
    embedder: Embedder
    settings: Settings
    worker: str


async def work(
    tools: Tools, counts: Counts, tenant_id: str, claims: Sequence[Claim], *, seconds: float
) -> Exception | None:
    """Complete these documents, or say of each why not; what is away, where something is.

    Documents that wait for it are put off by `seconds`. Raises Unavailable and TimedOut where nothing could be written, BeingErased for a tenant that goes.
    """
    claims = await _worth_trying(tools, counts, tenant_id, claims)
    if not claims:
        return None
    try:
        documents = await _loaded(tools, tenant_id, claims)
        answers = await completion.complete(tools.database, tools.embedder, tools.settings, tenant_id, documents)
    except BeingErased:
        raise  # no reason for other tenants to wait
    except AWAY as error:
        await _put_off(tools, counts, tenant_id, claims, seconds, error)
        return error
    except Exception as error:  # noqa: BLE001  whatever it is, one document's must not stop the others'
        return await _apart(tools, counts, tenant_id, claims, seconds, error)
    return await _told(tools, counts, tenant_id, claims, answers, seconds)


async def _apart(
    tools: Tools, counts: Counts, tenant_id: str, claims: Sequence[Claim], seconds: float, error: Exception
) -> Exception | None:
    """Find out which of several documents are to blame by trying each alone; deal with one that was alone."""
    if len(claims) == 1:
        await _failed(tools, counts, tenant_id, claims[0], error)
        return None
    for index, each in enumerate(claims):
        away = await work(tools, counts, tenant_id, [each], seconds=seconds)
        if away is not None:
            await _put_off(tools, counts, tenant_id, claims[index + 1 :], seconds, away)
            return away
    return None


async def _told(
    tools: Tools,
    counts: Counts,
    tenant_id: str,
    claims: Sequence[Claim],
    answers: Sequence[Outcome | Fault | None],
    seconds: float,
) -> Exception | None:
    """Count what is ready, and deal with the rest."""
    ready = [answer for answer in answers if isinstance(answer, Outcome)]
    faults = {answer.id: answer for answer in answers if isinstance(answer, Fault)}
    counts.ready += len(ready)
    counts.chunks += sum(outcome.embedded for outcome in ready)
    done = faults.keys() | {outcome.id for outcome in ready}
    overtaken = [each.id for each in claims if each.id not in done]
    if overtaken:
        # Where SQL changed the text and nothing else, the document is still in this worker's name.
        await pending.give_back(tools.database, tenant_id, tools.worker, overtaken)
        counts.overtaken += len(overtaken)
    await _park(tools, counts, tenant_id, {fault.id: str(fault) for fault in faults.values() if fault.lasting})
    passing = [each for each in claims if each.id in faults and not faults[each.id].lasting]
    if not passing:
        return None
    error = faults[passing[0].id].error
    if isinstance(error, EmbeddingFailed) and not await _works(tools):
        await _put_off(tools, counts, tenant_id, passing, seconds, error)
        return error
    if len(claims) > 1 and len(passing) == 1:
        return await work(tools, counts, tenant_id, passing, seconds=seconds)
    return await _apart(tools, counts, tenant_id, passing, seconds, error)


async def _worth_trying(tools: Tools, counts: Counts, tenant_id: str, claims: Sequence[Claim]) -> list[Claim]:
    """The claims but for what is too long to be looked at and what workers ended over too often; those are given up."""
    ended = {
        each.id: f"a worker ended while it had this document in hand, or it failed, {each.attempts} times in all"
        for each in claims
        if each.attempts >= tools.settings.worker_attempts
    }
    await _park(tools, counts, tenant_id, ended, counted=False)
    long = {
        each.id: f"content: is {each.size:,} bytes; allowed: 1 to {MAX_TEXT_BYTES:,} bytes in UTF-8"
        for each in claims
        if each.size > MAX_TEXT_BYTES and each.id not in ended
    }
    await _park(tools, counts, tenant_id, long)
    return [each for each in claims if each.id not in ended and each.id not in long]


async def _loaded(tools: Tools, tenant_id: str, claims: Sequence[Claim]) -> list[Claimed]:
    """The documents that are still as they were claimed."""
    versions = {each.id: each.version for each in claims}
    statement = _LOAD.with_values("load", {"tenant_id": tenant_id, "ids": list(versions)})
    (rows,) = await tools.database.fetch(tenant_id, [statement], primary=True)
    found = [(row.pop("version"), Draft(**row)) for row in rows]
    return [Claimed(draft, version) for version, draft in found if version == versions[draft.id]]


async def _works(tools: Tools) -> bool:
    """Whether the server of the model that is searched does its work for another text, so that this one may be to blame."""
    try:
        embedder = await spaces.current(tools.database, tools.settings, tools.embedder)
        await embedder.embed([PROBE], "query")
    except EmbeddingFailed:
        return False
    return True


async def _failed(tools: Tools, counts: Counts, tenant_id: str, claim: Claim, error: Exception) -> None:
    """One document failed, and it is its own fault or may be."""
    if isinstance(error, PgrecallError):
        reason = str(error)
    else:
        reason = f"unexpected error {type(error).__name__}; the worker's log has the rest"
        log.error("document %r of tenant %s failed", claim.id, tenant_id, exc_info=error)
    if claim.attempts + 1 >= tools.settings.worker_attempts:
        await _park(tools, counts, tenant_id, {claim.id: reason})
        return
    counts.deferred += 1
    seconds = jittered(min(AGAIN * 2**claim.attempts, LATEST))
    log.warning("document %r of tenant %s failed, next try in %.0f s: %s", claim.id, tenant_id, seconds, reason)
    await pending.defer(
        tools.database, tenant_id, tools.worker, [claim.id], seconds=seconds, error=reason, counted=True
    )


async def _put_off(
    tools: Tools, counts: Counts, tenant_id: str, claims: Sequence[Claim], seconds: float, error: Exception
) -> None:
    """Nothing can be done now, and these documents are not to blame."""
    counts.deferred += len(claims)
    ids = [each.id for each in claims]
    await pending.defer(
        tools.database, tenant_id, tools.worker, ids, seconds=jittered(seconds), error=str(error), counted=False
    )


async def _park(
    tools: Tools, counts: Counts, tenant_id: str, faults: Mapping[str, str], *, counted: bool = True
) -> None:
    if not faults:
        return
    await pending.park(tools.database, tenant_id, tools.worker, faults, counted=counted)
    counts.parked += len(faults)
    for document_id, reason in faults.items():
        log.warning("document %r of tenant %s is given up: %s", document_id, tenant_id, reason)


def jittered(seconds: float) -> float:
    """About so many seconds, so that tries spread."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311  spreads tries, guards nothing

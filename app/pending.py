"""Documents whose text is stored and whose vectors are to come: found, claimed, given back, given up, tried again.

A claim is a lease: `claimed_by` names the worker and `not_before` is when the claim ends unless it is renewed. Who looks
across tenants is the role pgrecall_worker, which sees no texts; every claim names its tenant and is made as pgrecall_app.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import Database
from app.statements import Statement

CHANNEL = "pgrecall_pending"
"""What workers LISTEN to."""

RING_EVERY = 0.1
"""Seconds between two NOTIFYs of one process: PostgreSQL lets transactions that notify commit one at a time."""

RETRY_ROWS = 5_000
"""Documents queued again in one transaction."""

RING = select(func.pg_notify(CHANNEL, ""))
"""Wakes workers when this transaction commits."""

WAITING = """
with recursive tenants as (
    (select tenant_id, coalesce(not_before, '-infinity') as due from sources
      where state = 'pending' order by tenant_id, coalesce(not_before, '-infinity') limit 1)
    union all
    select next.tenant_id, next.due from tenants
     cross join lateral (
        select s.tenant_id, coalesce(s.not_before, '-infinity') as due from sources s
         where s.state = 'pending' and s.tenant_id > tenants.tenant_id
         order by s.tenant_id, coalesce(s.not_before, '-infinity') limit 1
     ) as next
)
select tenant_id, extract(epoch from greatest(due, now()) - now())::float8 as seconds from tenants
"""
"""Each tenant with pending documents and when the first of them is due: one look into the index a tenant, no locks."""

CLAIM = """
with due as (
    select id, coalesce(not_before, '-infinity') as due, octet_length(content)::bigint as size,
           claimed_by is not null and claimed_by <> %(worker)s as lost, attempts
      from sources
     where tenant_id = %(tenant_id)s and state = 'pending' and coalesce(not_before, '-infinity') <= now()
       and octet_length(content) <= %(largest)s
       and (%(suspects)s or (attempts = 0 and (claimed_by is null or claimed_by = %(worker)s)))
     order by coalesce(not_before, '-infinity') limit %(documents)s
       for update skip locked
), ranked as (
    select id, lost, lost or attempts > 0 as suspect,
           sum(size) over same_kind - size as ahead, row_number() over same_kind as place
      from due window same_kind as (partition by lost or attempts > 0 order by due, id)
)
update sources set claimed_by = %(worker)s, not_before = now() + make_interval(secs => %(lease)s),
       attempts = sources.attempts + ranked.lost::integer
  from ranked
 where sources.tenant_id = %(tenant_id)s and sources.id = ranked.id
   and case when suspect then place = 1 else ahead < %(bytes)s end
returning sources.id, sources.version, sources.attempts, ranked.suspect, octet_length(sources.content) as size
"""
"""Due documents of one tenant, the longest due first, now this worker's.

At most `documents`, about `bytes` of text, none of more than `largest`. What a worker had in hand when it ended, or what
failed before, is suspect and comes one at a time; the former is counted as an attempt.
"""

_MINE = """
with mine as materialized (
    select id from sources
     where tenant_id = %(tenant_id)s and id = any(%(ids)s) and claimed_by = %(worker)s and state = 'pending'
     order by id for update {wait}
)
update sources set {change} from mine where sources.tenant_id = %(tenant_id)s and sources.id = mine.id
returning sources.id
"""

RENEW = _MINE.format(wait="skip locked", change="not_before = now() + make_interval(secs => %(lease)s)")
"""The claim goes on. A row that is being written just now needs no renewal."""

GIVE_BACK = _MINE.format(wait="", change="claimed_by = null, not_before = null")
"""As if it had not been claimed."""

DEFER = _MINE.format(
    wait="",
    change="claimed_by = null, not_before = now() + make_interval(secs => %(seconds)s), error = %(error)s, "
    "attempts = least(sources.attempts + %(counted)s::integer, 32767)",
)
"""To be tried again later; `counted`: 1 where the document may be to blame, else 0."""

PARK = """
with faults as materialized (
    select sources.id, told.error from unnest(%(ids)s::text[], %(errors)s::text[]) as told (id, error)
      join sources on sources.tenant_id = %(tenant_id)s and sources.id = told.id
       and claimed_by = %(worker)s and state = 'pending'
     order by sources.id for update of sources
)
update sources set state = 'failed', claimed_by = null, not_before = null, error = faults.error,
       attempts = least(sources.attempts + %(counted)s::integer, 32767)
  from faults where sources.tenant_id = %(tenant_id)s and sources.id = faults.id
returning sources.id
"""
"""Given up, with the reason."""

_RETRY = """
with given_up as materialized (
    select id from sources where tenant_id = %(tenant_id)s and state = 'failed' {which}
     order by id limit %(rows)s for update skip locked
), woken as (select pg_notify('pgrecall_pending', '') from given_up limit 1)
update sources set state = 'pending', attempts = 0, not_before = null, claimed_by = null, error = null
  from given_up left join woken on true where sources.tenant_id = %(tenant_id)s and sources.id = given_up.id
returning sources.id
"""
RETRY_ALL = _RETRY.format(which="")
"""Every document that was given up, queued again as if it had just been put."""

RETRY_SOME = _RETRY.format(which="and id = any(%(ids)s)")
"""Those of these ids."""


STATUS = """
select documents, chunks, pending, failed, oldest_pending_at, ready_last_minute, ready_last_hour
  from ingest_status where tenant_id = %(tenant_id)s
"""
"""How much a tenant has and how much of it waits. Reads every document of the tenant."""


class Status(NamedTuple):
    """How much a tenant has, how much of it waits and since when, and how many documents became ready lately."""

    documents: int = 0
    chunks: int = 0
    pending: int = 0
    failed: int = 0
    oldest_pending_at: datetime | None = None
    ready_last_minute: int = 0
    ready_last_hour: int = 0


class Waiting(NamedTuple):
    """A tenant with pending documents; the first of them is due in so many seconds, 0 for now."""

    tenant_id: str
    seconds: float


class Claim(NamedTuple):
    """A document in this worker's hand. `suspect`: it failed before, or a worker ended over it. `size` in bytes."""

    id: str
    version: int
    attempts: int
    suspect: bool
    size: int


_rung: WeakKeyDictionary[Database, float] = WeakKeyDictionary()


async def ring(database: Database, connection: AsyncConnection) -> None:
    """Wake workers when the transaction commits, unless this process did so just now: a woken worker looks twice."""
    now = time.monotonic()
    if now - _rung.get(database, float("-inf")) >= RING_EVERY:
        _rung[database] = now
        await connection.execute(RING)


async def status(database: Database, tenant_id: str) -> Status:
    """How much the tenant has; zeros for one that has nothing."""
    statement = Statement("status", STATUS, {"tenant_id": tenant_id})
    (rows,) = await database.fetch(tenant_id, [statement], primary=True)
    return Status(**rows[0]) if rows else Status()


async def waiting(database: Database) -> list[Waiting]:
    """Tenants with pending documents, by name."""
    return [Waiting(**row) for row in await database.fetch_across(Statement("waiting", WAITING, {}))]


async def claim(
    database: Database,
    tenant_id: str,
    worker: str,
    *,
    lease: float,
    documents: int,
    size: int,
    largest: int,
    suspects: bool,
) -> list[Claim]:
    """Claim due documents of a tenant for `lease` seconds: see CLAIM."""
    values = {"tenant_id": tenant_id, "worker": worker, "lease": lease, "documents": documents}
    values |= {"bytes": size, "largest": largest, "suspects": suspects}
    (rows,) = await database.fetch(tenant_id, [Statement("claim", CLAIM, values)], primary=True)
    return [Claim(**row) for row in rows]


async def renew(database: Database, tenant_id: str, worker: str, ids: Sequence[str], lease: float) -> None:
    """Hold claims for `lease` seconds from now."""
    await _change(database, "renew", RENEW, tenant_id, worker, ids, {"lease": lease})


async def give_back(database: Database, tenant_id: str, worker: str, ids: Sequence[str]) -> int:
    """Let others have what this worker claimed. How many documents that were."""
    return await _change(database, "give back", GIVE_BACK, tenant_id, worker, ids, {})


async def defer(
    database: Database, tenant_id: str, worker: str, ids: Sequence[str], *, seconds: float, error: str, counted: bool
) -> None:
    """Let these documents be tried again in `seconds`; `error` says why."""
    values = {"seconds": seconds, "error": error, "counted": int(counted)}
    await _change(database, "defer", DEFER, tenant_id, worker, ids, values)


async def park(
    database: Database, tenant_id: str, worker: str, faults: Mapping[str, str], *, counted: bool = True
) -> None:
    """Give documents up; `faults` is the reason of each id."""
    values = {"errors": list(faults.values()), "counted": int(counted)}
    await _change(database, "park", PARK, tenant_id, worker, list(faults), values)


async def retry(database: Database, tenant_id: str, ids: Sequence[str] | None = None) -> int:
    """Queue documents that were given up again, every one of the tenant unless `ids` are given. How many they were."""
    values = {"tenant_id": tenant_id, "rows": RETRY_ROWS} | ({} if ids is None else {"ids": list(ids)})
    statement = Statement("retry", RETRY_ALL if ids is None else RETRY_SOME, values)
    retried = 0
    while True:
        (rows,) = await database.fetch(tenant_id, [statement], primary=True)
        retried += len(rows)
        if len(rows) < RETRY_ROWS:
            return retried


async def _change(
    database: Database,
    name: str,
    sql: str,
    tenant_id: str,
    worker: str,
    ids: Sequence[str],
    values: Mapping[str, object],
) -> int:
    values = {"tenant_id": tenant_id, "worker": worker, "ids": list(ids), **values}
    (rows,) = await database.fetch(tenant_id, [Statement(name, sql, values)], primary=True)
    return len(rows)

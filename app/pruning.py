"""Keeping the cache of vectors within its bounds: rarely, a little at a time, and in nobody's way."""

import logging
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sqlalchemy import text

from app.database import Database
from app.errors import PgrecallError
from app.settings import Settings
from app.statements import Statement

log = logging.getLogger(__name__)

SHARE = 10
"""A tenant's cache is looked at again when a process has added this part of its bound, so it may be over it by that."""

EVERY = 3600.0
"""Seconds after which it is looked at anyway, at the next write."""

AT_ONCE = 2_000
"""Rows that one transaction removes."""

LOCK = "select pg_try_advisory_xact_lock(hashtextextended('pgrecall prune ' || cast(:tenant_id as text), 0))"
"""One at a time prunes a tenant's cache; whoever comes second goes on with something else."""

SURPLUS = """
with gone as materialized (
    select model, dimensions, input_type, content_sha256 from embedding_cache
     where tenant_id = :tenant_id order by created_at desc offset :kept limit :at_once
), free as (
    select c.model, c.dimensions, c.input_type, c.content_sha256 from embedding_cache c
      join gone using (model, dimensions, input_type, content_sha256)
     where c.tenant_id = :tenant_id for update of c skip locked
)
delete from embedding_cache c using free f
 where c.tenant_id = :tenant_id and c.model = f.model and c.dimensions = f.dimensions and c.input_type = f.input_type
   and c.content_sha256 = f.content_sha256
"""
"""What there is beyond the newest `kept` entries of a tenant."""

OLD = """
with gone as materialized (
    select model, dimensions, input_type, content_sha256 from embedding_cache
     where tenant_id = :tenant_id and created_at < now() - make_interval(secs => :seconds)
     order by created_at limit :at_once
), free as (
    select c.model, c.dimensions, c.input_type, c.content_sha256 from embedding_cache c
      join gone using (model, dimensions, input_type, content_sha256)
     where c.tenant_id = :tenant_id for update of c skip locked
)
delete from embedding_cache c using free f
 where c.tenant_id = :tenant_id and c.model = f.model and c.dimensions = f.dimensions and c.input_type = f.input_type
   and c.content_sha256 = f.content_sha256
"""
"""What was computed longer ago than `seconds`."""

ABANDONED = """
with free as (
    select model, dimensions, input_type, content_sha256 from embedding_claims
     where tenant_id = :tenant_id and expires_at < now() - interval '1 hour' limit :at_once for update skip locked
)
delete from embedding_claims c using free f
 where c.tenant_id = :tenant_id and c.model = f.model and c.dimensions = f.dimensions and c.input_type = f.input_type
   and c.content_sha256 = f.content_sha256
"""
"""Claims of processes that died, on texts nobody has asked for since."""


TENANTS = """
with recursive tenants (tenant_id) as (
    select min(tenant_id) from sources
    union all
    select (select min(s.tenant_id) from sources s where s.tenant_id > tenants.tenant_id) from tenants
     where tenants.tenant_id is not null
)
select tenant_id from tenants where tenant_id is not null
"""
"""Tenants that have documents: one look into the index for each."""


@dataclass
class _Seen:
    at: float
    added: int = 0


_seen: WeakKeyDictionary[Database, dict[str, _Seen]] = WeakKeyDictionary()
MOST_TENANTS = 10_000


async def added(database: Database, settings: Settings, tenant_id: str, count: int) -> None:
    """Note that this process has added `count` vectors to a tenant's cache; prune it where that is due.

    A process does not know of others, so it looks at the first chance too. What the database fails with is logged.
    """
    tenants = _seen.setdefault(database, {})
    seen = tenants.get(tenant_id)
    if seen is not None:
        seen.added += count
        if seen.added * SHARE <= settings.cache_rows and time.monotonic() - seen.at < EVERY:
            return
    if len(tenants) >= MOST_TENANTS:
        tenants.clear()
    tenants[tenant_id] = _Seen(time.monotonic())
    try:
        await prune(database, settings, tenant_id)
    except PgrecallError as error:
        log.warning("the cache of tenant %s was not pruned, a later write will try: %s", tenant_id, error)


async def prune(database: Database, settings: Settings, tenant_id: str) -> int:
    """Bring a tenant's cache within PGRECALL_CACHE_ROWS and PGRECALL_CACHE_DAYS, in short transactions. Rows removed."""
    values = {
        "tenant_id": tenant_id,
        "kept": settings.cache_rows,
        "seconds": settings.cache_days * 86_400,
        "at_once": AT_ONCE,
    }
    removed = 0
    for statement in (OLD, SURPLUS, ABANDONED):
        more = True
        while more:
            async with database.write(tenant_id) as connection:
                if not (await connection.execute(text(LOCK), values)).scalar_one():
                    return removed
                gone = (await connection.execute(text(statement), values)).rowcount
            more = gone == AT_ONCE
            removed += gone
    return removed


async def everywhere(database: Database, settings: Settings, only: frozenset[str] = frozenset()) -> int:
    """Prune the cache of every tenant that has documents, or of `only` these: nobody may write to a tenant for months.

    Rows removed. What fails at one tenant is logged and does not keep the others from it.
    """
    removed = 0
    for row in await database.fetch_across(Statement("tenants", TENANTS, {})):
        if not only or row["tenant_id"] in only:
            try:
                removed += await prune(database, settings, row["tenant_id"])
            except PgrecallError as error:
                log.warning("the cache of tenant %s was not pruned: %s", row["tenant_id"], error)
    return removed

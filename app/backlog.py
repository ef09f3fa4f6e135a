"""What `pgrecall worker`, `queue` and `retry` do. `arguments` reads the command line; everything here gets it typed."""

import asyncio
from argparse import Namespace
from typing import Any

from psycopg.rows import dict_row

from app import embedding, pending, schema, tenants, terminal, worker
from app.database import Database, across
from app.jobs import Counts
from app.settings import Settings

LISTED = """
select tenant_id, id, state, attempts, not_before, claimed_by, updated_at, error from sources
 where state = any (%(states)s) and (%(tenant_id)s::text is null or tenant_id = %(tenant_id)s)
 order by tenant_id, state, id limit %(rows)s
"""
"""Documents that are not ready. Read as pgrecall_worker, which sees no texts."""


def work(arguments: Namespace, config: Settings) -> int:
    """Embed pending documents until interrupted, or until nothing is due. 1: documents were given up or put off."""
    only = frozenset(tenants.check(each, "--tenant") for each in arguments.tenant or ())
    with schema.provided(config) as ready:
        counts = asyncio.run(_work(worker.patient(ready), only, once=arguments.once))
    if arguments.json:
        terminal.json(counts)
    return 1 if arguments.once and counts.parked + counts.deferred else 0


async def _work(config: Settings, only: frozenset[str], *, once: bool) -> Counts:
    embedder = embedding.open_embedder(config)
    database = Database(config, config.database_url or "")
    try:
        if once:
            await schema.check(database, embedder)
        else:
            await worker.when_ready(database, embedder)
        return await worker.serve(database, embedder, config, only=only, once=once)
    finally:
        await database.close()
        await embedder.aclose()


def queue(arguments: Namespace, config: Settings) -> int:
    """Documents that are pending or were given up, with the reason."""
    tenant_id = None if arguments.tenant is None else tenants.check(arguments.tenant, "--tenant")
    states = [arguments.state] if arguments.state else ["pending", "failed"]
    with schema.provided(config) as ready:
        found = _listed(ready, {"states": states, "tenant_id": tenant_id, "rows": arguments.limit})
    if arguments.json:
        terminal.json({"documents": found})
        return 0
    terminal.table(
        f"documents that are not ready (the first {arguments.limit:,})",
        [(name, "left") for name in ("tenant", "document", "state", "failures", "put", "not before", "reason")],
        [
            (
                each["tenant_id"],
                each["id"],
                "in hand" if each["claimed_by"] else each["state"],
                each["attempts"],
                f"{each['updated_at']:%Y-%m-%d %H:%M:%S}",
                f"{each['not_before']:%H:%M:%S}" if each["not_before"] else "",
                each["error"] or "",
            )
            for each in found
        ],
    )
    return 0


def _listed(config: Settings, values: dict[str, Any]) -> list[dict[str, Any]]:
    with across(config.database_url or "") as connection:
        return connection.cursor(row_factory=dict_row).execute(LISTED, values).fetchall()


def retry(arguments: Namespace, config: Settings) -> int:
    """Queue documents that were given up again. 1: some of those named were not given up, or do not exist."""
    tenant_id = tenants.check(arguments.tenant, "--tenant")
    with schema.provided(config) as ready:
        retried, others = asyncio.run(_retry(ready, tenant_id, None if arguments.all else arguments.id))
    if arguments.json:
        terminal.json({"retried": retried, "not_given_up": others})
    else:
        terminal.say(f"{retried} documents of {tenant_id} are pending again; a worker takes them up")
        if others:
            terminal.say(f"not given up, or not there at all: {', '.join(others)}")
    return 1 if others else 0


async def _retry(config: Settings, tenant_id: str, ids: list[str] | None) -> tuple[int, list[str]]:
    """How many were queued, and which of the ids were not."""
    database = Database(config, config.database_url or "")
    try:
        if ids is None:
            return await pending.retry(database, tenant_id), []
        named = list(dict.fromkeys(ids))
        others = [each for each in named if not await pending.retry(database, tenant_id, [each])]
        return len(named) - len(others), others
    finally:
        await database.close()

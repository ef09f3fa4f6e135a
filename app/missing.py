"""Documents whose file is gone: which ones they are, and deleting them.

A load that is to make a folder and a tenant agree has a name (`pgrecall ingest --as NAME`), which every document it
stores carries in its metadata under `ingested_as`. Only documents of that name can be deleted, only if the run did not
read their id, and only if nobody wrote them since the run began. A document that the API has put in the meantime carries
the name no more, because a put replaces the metadata, and so it stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ARRAY, DateTime, Integer, Text, bindparam, func, select

from app import documents
from app.database import Database
from app.errors import BadInput
from app.loading import Seen
from app.statements import Statement, rendered
from app.tables import sources, tenant_sources

MARK = "ingested_as"
"""The metadata key that names the load a document came with."""

PAGE = 5_000
BATCH = 500
FEW = 10
"""So many documents may always go; of more, at most half of the load's, unless that is asked for."""

BEGUN = Statement("begun", "select now() as begun", {})
"""The database's clock."""

_tenant = bindparam("tenant_id", type_=Text)
_name = bindparam("name", type_=Text)

OF_NAME = (
    select(tenant_sources.c.id)
    .where(
        tenant_sources.c.tenant_id == _tenant,
        tenant_sources.c.id > bindparam("after", type_=Text),
        tenant_sources.c.metadata[MARK].astext == _name,
    )
    .order_by(tenant_sources.c.id)
    .limit(bindparam("page", type_=Integer))
)
"""Ids of the documents that came with a load, a page of them."""

DELETABLE = (
    select(sources.c.id)
    .where(
        sources.c.tenant_id == _tenant,
        sources.c.id == func.any(bindparam("ids", type_=ARRAY(Text))),
        sources.c.metadata[MARK].astext == _name,
        sources.c.updated_at < bindparam("begun", type_=DateTime(timezone=True)),
    )
    .order_by(sources.c.id)
    .with_for_update()
)
"""Those of these documents that still came with the load and were not written since, with writers kept out."""

_OF_NAME = rendered(OF_NAME)


@dataclass(frozen=True)
class Missing:
    """Documents that came with the load and were not read, and of how many."""

    ids: Sequence[str]
    of: int


async def begun(database: Database) -> datetime:
    """The moment a run begins, by the database's clock."""
    moment: datetime = (await database.fetch_public(BEGUN))[0]["begun"]
    return moment


async def find(database: Database, tenant_id: str, name: str, seen: Seen) -> Missing:
    """The documents of this name that were not read."""
    ids: list[str] = []
    of, after = 0, ""
    while True:
        values = {"tenant_id": tenant_id, "name": name, "after": after, "page": PAGE}
        (rows,) = await database.fetch(tenant_id, [_OF_NAME.with_values("of name", values)], primary=True)
        of += len(rows)
        ids += [row["id"] for row in rows if row["id"] not in seen]
        if len(rows) < PAGE:
            return Missing(ids, of)
        after = rows[-1]["id"]


def check(missing: Missing, *, read: int, skipped: int) -> None:
    """Raise BadInput where deleting them may well be a mistake: `read` documents were read, `skipped` could not be."""
    if not missing.ids:
        return
    option = "--delete-missing"
    gone = f"{len(missing.ids):,} of {missing.of:,} documents"
    if skipped:
        fault = f"{gone} were not found, but {skipped:,} files or records could not be read or stored"
    elif not read:
        fault = f"{gone} were not found, because no document was: is this the right folder?"
    elif len(missing.ids) > FEW and len(missing.ids) * 2 > missing.of:
        fault = f"{gone} were not found, which is more than half"
    else:
        return
    raise BadInput(option, f"{fault}; nothing was deleted. If they are to go, run this again with --force")


async def remove(database: Database, tenant_id: str, name: str, ids: Sequence[str], begun: datetime) -> int:
    """Delete those of these documents that still came with the load and were not written since `begun`. How many."""
    removed = 0
    for start in range(0, len(ids), BATCH):
        batch = list(ids[start : start + BATCH])
        async with database.write(tenant_id) as connection:
            values = {"tenant_id": tenant_id, "name": name, "ids": batch, "begun": begun}
            found = list((await connection.execute(DELETABLE, values)).scalars())
            if found:
                await documents.take(connection, tenant_id, found)
        removed += len(found)
    return removed

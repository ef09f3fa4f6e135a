"""Which tables hold tenants' rows: those of `tables.bearing()`, and those that operations make at run time.

A change of the embedding model prepares rows in tables of its own, `pgrecall_run_…`. Whatever such a table has a column
`tenant_id` for is found in the catalogue, so that an erasure misses none of them.
"""

from typing import NamedTuple

from sqlalchemy import TableClause, Text, bindparam, column, table, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app.statements import rendered
from app.tables import RUN_PREFIX, bearing

MADE_AT_RUN_TIME = text(
    """
select n.nspname as schema, c.relname as name,
       exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = 'id' and not a.attisdropped) as by_id
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
  join pg_attribute t on t.attrelid = c.oid and t.attname = 'tenant_id' and not t.attisdropped
 where c.relnamespace = (select relnamespace from pg_class where oid = to_regclass('sources'))
   and c.relkind in ('r', 'p') and not c.relispartition and starts_with(c.relname, :prefix)
 order by c.relname
"""
).bindparams(bindparam("prefix", RUN_PREFIX, type_=Text))
"""Tables with tenants' rows that no migration made, and whether their rows belong to documents."""

SYNCHRONOUS = rendered(MADE_AT_RUN_TIME)
"""The same for a connection of the driver's own."""


class Held(NamedTuple):
    """A table with tenants' rows. `by_id`: each of them belongs to a document."""

    table: TableClause
    by_id: bool


async def made_at_run_time(connection: AsyncConnection) -> list[Held]:
    """The tables that operations have made and not dropped yet."""
    return [
        Held(table(row.name, column("tenant_id", Text), column("id", Text), schema=row.schema), row.by_id)
        for row in await connection.execute(MADE_AT_RUN_TIME)
    ]


async def every(connection: AsyncConnection) -> list[Held]:
    """All of them, those first that refer to others."""
    return [*await made_at_run_time(connection), *(Held(each, "id" in each.c) for each in bearing())]

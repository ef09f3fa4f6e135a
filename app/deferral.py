"""A large load into an empty part of the vector index: the index is dropped, the rows go in, it is built over them.

Tenants share BUCKETS indexes, each tenant's rows being in one. So only one index has to go, and only where it holds nothing:
nobody's searches get slower, and no row is in it that would have to be put back. While it is missing searches of the
tenants in that bucket measure every row: they stay exact. What is missing is known to the catalogue alone, so nothing has
to be remembered for a load that was interrupted: the next `pgrecall ingest`, or `pgrecall index` with the kind it shows
as active, builds it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

from app import indexes
from app.database import Database, connect, translated
from app.errors import BadInput, SetupError
from app.indexes import Told
from app.statements import Statement
from app.tables import BUCKETS

OPTION = "--defer-index"
WORTHWHILE = 4_000_000
"""Bytes to be read from which on a load can pay; some thousand rows."""
MAX_MEMORY_KB = 1_000_000
"""Most memory that is taken for a build, which is several times slower once its graph does not fit."""

IN_BUCKET = """
with recursive tenants (tenant_id) as (
    (select tenant_id from documents order by tenant_id limit 1)
    union all
    select (select d.tenant_id from documents d where d.tenant_id > t.tenant_id order by d.tenant_id limit 1)
      from tenants t where t.tenant_id is not null
)
select tenant_id from tenants
 where tenant_id is not null
   and hashtextextended(tenant_id, 0) & %(mask)s = hashtextextended(%(tenant_id)s, 0) & %(mask)s
 limit 2
"""
"""Tenants with chunks that share an index with this one; found without reading every chunk."""

INDEX = """
select v.kind, format('documents_embedding_%%s_%%s_idx', v.kind,
                      to_char(hashtextextended(%(tenant_id)s, 0) & %(mask)s, 'FM00')) as name,
       (select count(*) from vector_indexes) as kinds, m.dimensions
  from vector_indexes v, embedding_models m where v.state = 'active' and m.state = 'active'
"""
"""The index that holds a tenant's vectors, and how many kinds there are."""

MISSING = Statement(
    "missing indexes",
    """
select v.kind, %(buckets)s - count(x.indexrelid) filter (where x.indisvalid) as missing
  from vector_indexes v
  left join (pg_index x join pg_class c on c.oid = x.indexrelid)
    on x.indrelid = to_regclass('documents') and c.relname ~ ('^documents_embedding_' || v.kind || '_[0-9]{2}_idx$')
 where v.state = 'active' group by v.kind
""",
    {"buckets": BUCKETS},
)
"""How many of the indexes that are searched are not there, or not valid."""

RESERVE = """
select set_config('maintenance_work_mem',
                  greatest(least(greatest(reltuples, 0) * (4 * %(dimensions)s + 600) / 1024, %(most)s),
                           pg_size_bytes(current_setting('maintenance_work_mem')) / 1024)::bigint || 'kB', false)
  from pg_class where oid = to_regclass('documents')
"""
"""Memory for the graph: each row's vector and its neighbours, by the last estimate of how many rows there are."""


class Deferred:
    """A load under way. `build` ends it."""

    def __init__(self, connection: psycopg.Connection[Any], url: str) -> None:
        self._connection = connection
        self._url = url

    def build(self, told: Told) -> None:
        """Build what is missing. May be interrupted and run again."""
        with translated():
            _build(self._connection, self._url, told)


def _build(connection: psycopg.Connection[Any], url: str, told: Told) -> None:
    row = connection.execute(indexes.ACTIVE).fetchone()
    if row is not None:
        connection.execute("analyze documents")
        connection.execute(RESERVE, {"dimensions": row[1], "most": MAX_MEMORY_KB})
    indexes.complete(connection, url, told)


@contextmanager
def deferred(url: str, tenant_id: str, size: int | None) -> Iterator[Deferred]:
    """The tenant's index dropped for the length of the block, other operations on indexes kept out.

    `url` is the tables' owner's, `size` the bytes that are to be read. Raises BadInput where the option does not pay or
    others would suffer, SetupError where the login may not do it.
    """
    if size is not None and size < WORTHWHILE:
        raise BadInput(
            OPTION, f"these are {size / 1e6:.1f} MB, for which it does not pay; allowed from {WORTHWHILE / 1e6:g} MB"
        )
    with connect(url) as connection, indexes.alone(connection):
        try:
            _drop(connection, tenant_id)
        except psycopg.errors.InsufficientPrivilege:
            raise SetupError(
                f"{OPTION}: only the tables' owner may drop and build indexes: set PGRECALL_MIGRATION_URL to the owner's URL"
            ) from None
        yield Deferred(connection, url)


def _drop(connection: psycopg.Connection[Any], tenant_id: str) -> None:
    values = {"tenant_id": tenant_id, "mask": BUCKETS - 1}
    found = connection.execute(INDEX, values).fetchone()
    if found is None:
        raise SetupError("no vector index is in use: run `pgrecall migrate`")
    _, name, kinds, _ = found
    if kinds > 1:
        raise BadInput(OPTION, "the vector index is being changed; allowed when `pgrecall index` shows one kind only")
    there = connection.execute("select to_regclass(%s) is not null", (name,)).fetchone()
    tenants = {row[0] for row in connection.execute(IN_BUCKET, values)}
    if tenants - {tenant_id}:
        raise BadInput(
            OPTION,
            f"other tenants with documents share the index {name}, and their searches would be slow meanwhile; allowed "
            "where it is empty. Load without this option",
        )
    if tenants and there == (True,):
        raise BadInput(
            OPTION,
            f"tenant {tenant_id} has documents already, which are searched by the index {name}; allowed where it is empty",
        )
    connection.execute(sql.SQL("drop index concurrently if exists {}").format(sql.Identifier(name)))


async def missing(database: Database) -> int:
    """How many of the indexes that are searched are not there."""
    rows = await database.fetch_public(MISSING)
    return sum(row["missing"] for row in rows)


def finish(url: str, told: Told) -> bool:
    """Build what a load that was interrupted has left missing. False where this login may not, or somebody is at it."""
    try:
        with connect(url) as connection, indexes.alone(connection):
            _build(connection, url, told)
    except (SetupError, psycopg.errors.InsufficientPrivilege):
        return False
    return True

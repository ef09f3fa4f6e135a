"""Changing the precision of the vector index while it serves: built beside the old one, switched to, the old one dropped.

Each kind is BUCKETS partial HNSW indexes, built one after the other with CREATE INDEX CONCURRENTLY. What is valid stays
when a build is interrupted, and the next run goes on there; what is not valid is made anew. Services learn of the switch
within `layout.FRESH` seconds, so the old indexes stay that long.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from app import layout
from app.database import connect
from app.errors import BadInput, SetupError
from app.tables import INDEXED_AS_VECTOR, Kind, embedding_indexes, metadata_for

OPERATION_LOCK = 0x7067726563696478
"""Advisory lock of whoever changes the indexes."""

OVERSAMPLING: dict[Kind, float] = {"full": 4.0, "half": 4.0, "binary": 20.0}
"""Candidates for each hit where nothing else is asked for (docs/search.md has the measurement)."""

LISTED = """
select v.kind, v.state, v.oversampling, v.created_at, coalesce(i.indexes, 0) as indexes, coalesce(i.valid, 0) as valid,
       coalesce(i.bytes, 0) as bytes, coalesce(i.scans, 0) as scans
  from vector_indexes v
  left join lateral (
        select count(*) as indexes, count(*) filter (where x.indisvalid) as valid,
               sum(pg_relation_size(x.indexrelid))::bigint as bytes, sum(s.idx_scan)::bigint as scans
          from pg_index x
          join pg_class c on c.oid = x.indexrelid
          left join pg_stat_user_indexes s on s.indexrelid = x.indexrelid
         where x.indrelid = to_regclass('documents') and c.relname ~ ('^documents_embedding_' || v.kind || '_[0-9]{2}_idx$')
       ) i on true
 order by v.state, v.kind
"""
"""The kinds of vector index with their size, how many of their buckets are valid, and scans since statistics began."""

ACTIVE = """
select v.kind, m.dimensions from vector_indexes v, embedding_models m where v.state = 'active' and m.state = 'active'
"""
"""The kind of index that is searched, and the length of the vectors."""

VALID = """
select c.relname as name, x.indisvalid as valid from pg_index x join pg_class c on c.oid = x.indexrelid
 where x.indrelid = to_regclass('documents') and c.relname = any (%(names)s)
"""
"""Which of the indexes of a kind there are, and whether they are valid."""

BUILDING = """
select greatest(coalesce(tuples_done::float8 / nullif(tuples_total, 0), 0),
                coalesce(blocks_done::float8 / nullif(blocks_total, 0), 0)) as share
  from pg_stat_progress_create_index where pid = %(pid)s
"""
"""How far the index under construction is, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One kind of vector index. `scans` counts since the server's statistics began."""

    kind: Kind
    state: str
    oversampling: float
    created_at: Any
    indexes: int
    valid: int
    bytes: int
    scans: int


Told = Callable[[str, float], None]
"""Told what is done now and which share of all of it is done, 0 to 1."""


def listed(url: str) -> list[Kept]:
    """The kinds of vector index of a database."""
    with connect(url) as connection:
        return [Kept(**row) for row in connection.cursor(row_factory=dict_row).execute(LISTED).fetchall()]


def change(
    url: str,
    kind: Kind,
    *,
    oversampling: float | None,
    told: Told,
    patience: float = layout.FRESH + 5,
    keep: bool = False,
) -> list[Kept]:
    """Build the indexes of `kind`, have searches use them, drop the ones they used before unless `keep`.

    `url` is the tables' owner's. Safe to interrupt and to run again. Raises BadInput for a kind this database's
    vectors cannot have, SetupError while another change is under way.
    """
    chosen = OVERSAMPLING[kind] if oversampling is None else oversampling
    if not 1 <= chosen <= 100:
        raise BadInput("--oversampling", f"{chosen:g} is not allowed; allowed: 1 to 100")
    with connect(url) as connection, alone(connection):
        changing = "select name from embedding_models where state in ('filling', 'retired')"
        if connection.execute(changing).fetchone() is not None:
            raise SetupError("the embedding model is being changed: `pgrecall model` says what is left to do")
        row = connection.execute("select dimensions from embedding_models where state = 'active'").fetchone()
        dimensions = int(row[0]) if row else 0
        if kind == "full" and dimensions > INDEXED_AS_VECTOR:
            raise BadInput(
                "kind", f"full needs at most {INDEXED_AS_VECTOR:,} dimensions; here {dimensions:,}: half or binary"
            )
        connection.execute("set lock_timeout = 0")  # concurrent work makes nobody wait
        connection.execute(
            "insert into vector_indexes (kind, state, oversampling) values (%s, 'building', %s) on conflict (kind) do nothing",
            (kind, chosen),
        )
        _build(connection, url, kind, dimensions, told)
        with connection.transaction():
            connection.execute(
                "update vector_indexes set state = 'retired' where state = 'active' and kind <> %s", (kind,)
            )
            connection.execute(
                "update vector_indexes set state = 'active', oversampling = %s where kind = %s", (chosen, kind)
            )
        if not keep:
            _drop_retired(connection, told, patience)
    return listed(url)


def complete(connection: psycopg.Connection[Any], url: str, told: Told) -> None:
    """Build what is missing of the kind that is searched; `connection` is the owner's, and `alone`."""
    row = connection.execute(ACTIVE).fetchone()
    if row is not None:
        kind, dimensions = row
        connection.execute("set lock_timeout = 0")
        _build(connection, url, kind, dimensions, told)


def _build(connection: psycopg.Connection[Any], url: str, kind: Kind, dimensions: int, told: Told) -> None:
    table = metadata_for(dimensions, kind).tables["documents"]
    names = embedding_indexes(kind)
    definitions = {
        str(index.name): str(CreateIndex(index).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
        for index in table.indexes
        if index.name in names
    }
    there: dict[str, bool] = dict(connection.execute(VALID, {"names": names}).fetchall())
    for done, name in enumerate(names):
        told(f"building {name}", done / len(names))
        if there.get(name):
            continue
        if name in there:
            connection.execute(sql.SQL("drop index concurrently {}").format(sql.Identifier(name)))
        with watched(connection, url, partial(_tell, told, name, done, len(names))):
            connection.execute(definitions[name].replace("CREATE INDEX", "create index concurrently", 1).encode())
        comment = (
            f"HNSW ({kind}) over cosine distance for the tenants where hashtextextended(tenant_id, 0) & 15 = {done}."
        )
        connection.execute(sql.SQL("comment on index {} is {}").format(sql.Identifier(name), sql.Literal(comment)))
    told("built", 1.0)


def _tell(told: Told, name: str, done: int, count: int, share: float) -> None:
    told(f"building {name}", (done + share) / count)


def _drop_retired(connection: psycopg.Connection[Any], told: Told, patience: float) -> None:
    retired: list[Kind] = [
        row[0] for row in connection.execute("select kind from vector_indexes where state = 'retired'")
    ]
    if not retired:
        return
    begun = time.monotonic()
    while (waited := time.monotonic() - begun) < patience:
        told("waiting until every service has seen the switch", waited / patience)
        time.sleep(min(0.5, patience))
    for kind in retired:
        for name in embedding_indexes(kind):
            told(f"dropping {name}", 1.0)
            connection.execute(sql.SQL("drop index concurrently if exists {}").format(sql.Identifier(name)))
        connection.execute("delete from vector_indexes where kind = %s and state = 'retired'", (kind,))


@contextmanager
def alone(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Keep other operations of this kind out. Raises SetupError while one is at work."""
    row = connection.execute("select pg_try_advisory_lock(%s)", (OPERATION_LOCK,)).fetchone()
    if not row or not row[0]:
        raise SetupError("another `pgrecall index` or `pgrecall model` is at work on this database: wait for it")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("select pg_advisory_unlock(%s)", (OPERATION_LOCK,))


@contextmanager
def watched(connection: psycopg.Connection[Any], url: str, tell: Callable[[float], None]) -> Iterator[None]:
    """Tell how far the statement on `connection` is, twice a second, through a connection of its own."""
    finished = threading.Event()
    pid = connection.info.backend_pid

    def watch() -> None:
        with connect(url) as other:
            while not finished.wait(0.5):
                row = other.execute(BUILDING, {"pid": pid}).fetchone()
                if row:
                    tell(float(row[0]))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()

"""A second `documents` and the exchange of the two: all DDL of a change of the embedding model, as the tables' owner.

`pgrecall_run_documents` is `documents` again, with vectors of another length: columns, constraints, policies, rights and
comments, and each index under a name with the prefix. The exchange gives the two each other's names in one transaction.
What PostgreSQL bound to the table rather than to its name is bound anew: the views that read it (dropped and made again,
because a view cannot change a column's length), SQL functions, and the foreign key of `document_terms`.

Nobody may be made to wait for long. Writers are kept out by a lock on `sources`, which each of them holds from its first
statement on; then the tables and views are locked against readers, all within PATIENCE, which is shorter than
deadlock_timeout, or not at all: then the readers go first and it is tried again.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import psycopg
from psycopg import sql
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex

from app.errors import SetupError
from app.tables import Kind, embedding_indexes, metadata_for

SHADOW = "pgrecall_run_documents"
PREFIX = "pgrecall_run_"
TERMS_KEY = "document_terms_documents_fkey"

PATIENCE = 0.5
"""Seconds within which every lock against readers is had, or all are given up. PostgreSQL's deadlock_timeout is 1."""

ATTEMPTS = 4
"""How often that is tried, a little later each time, while writers wait; then they go on and it begins anew."""

ROUNDS = 10
"""How often it begins anew before it is given up."""

POLICIES = """
select policyname, permissive, roles::text[] as roles, cmd, qual, with_check from pg_policies
 where schemaname = current_schema and tablename = 'documents'
"""
"""The policies of `documents`."""

RIGHTS = """
select coalesce(r.rolname, 'public') as role, a.privilege_type as privilege, a.is_grantable as grantable
  from pg_class c cross join aclexplode(c.relacl) a left join pg_roles r on r.oid = a.grantee
 where c.oid = %(oid)s and a.grantee <> c.relowner
"""
"""What others than the owner may do with a table or view."""

COMMENTS = """
select nullif(d.objsubid, 0) as place, a.attname as name, d.description as comment
  from pg_description d left join pg_attribute a on a.attrelid = d.objoid and a.attnum = d.objsubid and d.objsubid > 0
 where d.objoid = %(oid)s and d.classoid = 'pg_class'::regclass
"""
"""The comments on a table or view and its columns."""

INDEXES = """
select c.relname as name, pg_get_indexdef(c.oid) as definition, obj_description(c.oid, 'pg_class') as comment,
       x.indisprimary as key, x.indisvalid as valid
  from pg_index x join pg_class c on c.oid = x.indexrelid where x.indrelid = to_regclass(%(name)s) order by c.relname
"""
"""The indexes of a table."""

VIEWS = """
with recursive bound (oid, depth) as (
    select 'documents'::regclass::oid, 0
    union
    select r.ev_class, b.depth + 1
      from bound b
      join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = b.oid and d.classid = 'pg_rewrite'::regclass
      join pg_rewrite r on r.oid = d.objid and r.ev_class <> b.oid
)
select c.oid, c.relname as name, c.oid::regclass::text as shown, c.relkind::text as kind, pg_get_viewdef(c.oid) as definition,
       coalesce(array_to_string(c.reloptions, ', '), '') as options, pg_has_role(c.relowner, 'usage') as ours
  from (select oid, max(depth) as depth from bound where depth > 0 group by oid) b join pg_class c on c.oid = b.oid
 order by b.depth, c.relname
"""
"""The views that read `documents`, those that others read first."""

FUNCTIONS = """
select p.oid::regprocedure::text as shown, pg_get_functiondef(p.oid) as definition, pg_has_role(p.proowner, 'usage') as ours
  from pg_depend d join pg_proc p on p.oid = d.objid
 where d.classid = 'pg_proc'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = 'documents'::regclass
   and d.deptype = 'n'
 group by p.oid
"""
"""SQL functions that PostgreSQL has bound to `documents`."""

BOUND_OTHERWISE = """
select pg_describe_object(d.classid, d.objid, d.objsubid) as thing
  from pg_depend d
 where d.deptype = 'n' and d.classid not in ('pg_rewrite'::regclass, 'pg_policy'::regclass)
   and ((d.refclassid = 'pg_class'::regclass and d.refobjid = 'documents'::regclass
         and d.classid <> 'pg_proc'::regclass
         and not (d.classid = 'pg_constraint'::regclass and (select conname from pg_constraint where oid = d.objid)
                  in ('document_terms_documents_fkey', 'documents_sources_fkey')))
     or (d.refclassid = 'pg_type'::regclass
         and d.refobjid in (select unnest(array[t.oid, t.typarray]) from pg_type t where t.typrelid = 'documents'::regclass)))
 group by d.classid, d.objid, d.objsubid
 union all
select 'publication ' || p.pubname from pg_publication_rel r join pg_publication p on p.oid = r.prpubid
 where r.prrelid = 'documents'::regclass
"""
"""What else is bound to `documents`: foreign keys of other tables, functions and columns of its row type, publications."""

COLUMNS = """
select a.attname, case when a.attname = 'embedding' then '' else format_type(a.atttypid, a.atttypmod) end, a.attnotnull
  from pg_attribute a where a.attrelid = %(name)s::regclass and a.attnum > 0 and not a.attisdropped order by a.attname
"""
"""The columns of a table; they are the same in both, but for the vectors' length."""

_OF_VECTORS = re.compile(r"documents_embedding_[a-z]+_\d\d_idx$")

Connection = psycopg.Connection[Any]


class View(NamedTuple):
    """A view that reads `documents`, and what is needed to make it again."""

    oid: int
    name: str
    shown: str
    kind: str
    definition: str
    options: str
    ours: bool


class Needed(NamedTuple):
    """An index that the second table is to have."""

    name: str
    definition: str
    comment: str


def kind(connection: Connection, name: str) -> Kind | None:
    """The precision of a table's HNSW indexes, None where it has none."""
    names = " ".join(index["name"] for index in _indexes(connection, name))
    return next((each for each in get_args(Kind) if f"documents_embedding_{each}_" in names), None)


def create(connection: Connection, dimensions: int) -> None:
    """Make the second table, empty and without indexes but its key. Within a transaction of the caller's."""
    name = sql.Identifier(SHADOW)
    (oid,) = _row(connection, "select 'documents'::regclass::oid")
    (storage,) = _row(
        connection, "select attstorage::text from pg_attribute where attrelid = %s and attname = 'embedding'", (oid,)
    )
    stored = {"p": "plain", "e": "external", "x": "extended", "m": "main"}[storage]
    for statement in (
        "create table {} (like documents including defaults including constraints including comments including storage)",
        f"alter table {{}} alter column embedding type vector({dimensions}) using null",
        f"alter table {{}} alter column embedding set storage {stored}",
        f"alter table {{}} add constraint {PREFIX}documents_pkey primary key (tenant_id, id, chunk_key)",
        "alter table {} add constraint documents_sources_fkey foreign key (tenant_id, id) references sources on delete cascade",
        "alter table {} enable row level security",
    ):
        connection.execute(sql.SQL(statement).format(name))
    options = connection.execute("select unnest(reloptions) from pg_class where oid = %s", (oid,)).fetchall()
    for (option,) in options:
        connection.execute(sql.SQL(f"alter table {{}} set ({option})").format(name))
    for policy, permissive, roles, command, qual, check in connection.execute(POLICIES).fetchall():
        parts = [
            sql.SQL("create policy {} on {} as {} for {} to {}").format(
                sql.Identifier(policy),
                name,
                sql.SQL(permissive),
                sql.SQL(command),
                sql.SQL(", ").join(_role(role) for role in roles),
            )
        ]
        if qual is not None:
            parts.append(sql.SQL("using ({})").format(sql.SQL(qual)))
        if check is not None:
            parts.append(sql.SQL("with check ({})").format(sql.SQL(check)))
        connection.execute(sql.SQL(" ").join(parts))
    _grant(connection, _rights(connection, oid), name)
    _comment(connection, "table", name, _comments(connection, oid))
    for index in _indexes(connection, "documents"):
        if index["key"]:
            describe(connection, f"{PREFIX}documents_pkey", index["comment"])


def needed(connection: Connection, kind: Kind, dimensions: int) -> list[Needed]:
    """Every index that the second table has to have besides its key; first the HNSW ones, which take longest."""
    vectors = metadata_for(dimensions, kind).tables["documents"]
    names = embedding_indexes(kind)
    made = []
    for index in sorted(vectors.indexes, key=lambda index: str(index.name)):
        if index.name in names:
            text = str(CreateIndex(index).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
            bucket = names.index(str(index.name))
            comment = f"HNSW ({kind}) over cosine distance for the tenants where hashtextextended(tenant_id, 0) & 15 = {bucket}."
            made.append(Needed(f"{PREFIX}{index.name}", _on_shadow(text), comment))
    others = (i for i in _indexes(connection, "documents") if not i["key"] and not _OF_VECTORS.match(i["name"]))
    return made + [
        Needed(f"{PREFIX}{other['name']}", _on_shadow(other["definition"]), other["comment"] or "") for other in others
    ]


def _on_shadow(definition: str) -> str:
    """The definition of an index of `documents`, for the second table."""
    return re.sub(
        r"^CREATE (UNIQUE )?INDEX (\S+) ON (\S+\.)?documents ",
        lambda found: f"CREATE {found[1] or ''}INDEX {PREFIX}{found[2]} ON {found[3] or ''}{SHADOW} ",
        definition,
    )


def unfinished(connection: Connection, kind: Kind, dimensions: int) -> list[str]:
    """Indexes the second table lacks or has invalid."""
    there = {index["name"] for index in _indexes(connection, SHADOW) if index["valid"]}
    return [index.name for index in needed(connection, kind, dimensions) if index.name not in there]


def obstacles(connection: Connection) -> list[str]:
    """What is bound to `documents` and cannot be bound to another table here; a change of the model is refused while any is."""
    found = [row[0] for row in connection.execute(BOUND_OTHERWISE).fetchall()]
    found += [f"the view {view.shown}, of another owner" for view in _views(connection) if not view.ours]
    found += [f"the materialized view {view.shown}" for view in _views(connection) if view.kind != "v"]
    found += [f"the function {row[0]}, of another owner" for row in connection.execute(FUNCTIONS) if not row[2]]
    return found


class Busy(SetupError):
    """The locks are not to be had."""


def patiently(work: Callable[[], None]) -> None:
    """Do the work, again where locks are not to be had. Raises Busy after ROUNDS."""
    for number in range(ROUNDS):
        try:
            with _in_our_words():
                work()
        except Busy:
            if number == ROUNDS - 1:
                raise
            time.sleep(0.5 * (number + 1))
        else:
            return


def exchange(connection: Connection, check: Callable[[], None], record: Callable[[], None]) -> None:
    """Give the two tables each other's names. `check` and `record` run in the same transaction, writers being kept out.

    Raises Busy where the locks are not to be had, and what `check` raises; nothing is changed then.
    """
    with connection.transaction():
        # Autovacuum gives way to a lock that waits for longer than deadlock_timeout.
        connection.execute("set local lock_timeout = '10s'")
        connection.execute(
            sql.SQL("lock table documents, {}, document_terms in share update exclusive mode").format(
                sql.Identifier(SHADOW)
            )
        )
        connection.execute("lock table sources in exclusive mode")
        check()
        views = _views(connection)
        functions = [row[1] for row in connection.execute(FUNCTIONS)]
        dressed = {view.oid: (_rights(connection, view.oid), _comments(connection, view.oid)) for view in views}
        against_readers(connection, [*(view.name for view in views), "documents", SHADOW, "document_terms"])
        for view in reversed(views):
            connection.execute(sql.SQL("drop view {}").format(sql.Identifier(view.name)))
        connection.execute(sql.SQL("alter table document_terms drop constraint {}").format(sql.Identifier(TERMS_KEY)))
        _rename(connection)
        connection.execute(
            sql.SQL(
                "alter table document_terms add constraint {} foreign key (tenant_id, id, chunk_key) "
                "references documents (tenant_id, id, chunk_key) on delete cascade not valid"
            ).format(sql.Identifier(TERMS_KEY))
        )
        for definition in functions:
            connection.execute(definition.encode())
        for view in views:
            name = sql.Identifier(view.name)
            options = sql.SQL(f"with ({view.options})" if view.options else "")
            connection.execute(
                sql.SQL("create view {} {} as {}").format(name, options, sql.SQL(view.definition.rstrip(";")))
            )
            rights, comments = dressed[view.oid]
            _grant(connection, rights, name)
            _comment(connection, "view", name, comments)
        record()


def validate(connection: Connection) -> None:
    """Have the new foreign key checked for the rows that were there; keeps neither readers nor writers waiting."""
    row = connection.execute("select convalidated from pg_constraint where conname = %s", (TERMS_KEY,)).fetchone()
    if row is not None and not row[0]:
        connection.execute(
            sql.SQL("alter table document_terms validate constraint {}").format(sql.Identifier(TERMS_KEY))
        )


def against_readers(connection: Connection, names: list[str]) -> None:
    """Lock these against everybody, all or none at a time, within a transaction of the caller's. Raises Busy."""
    listed = sql.SQL(", ").join(map(sql.Identifier, names))
    for attempt in range(ATTEMPTS):
        try:
            with connection.transaction():
                connection.execute(f"set local statement_timeout = {int(1000 * PATIENCE)}")
                connection.execute(sql.SQL("lock table {} in access exclusive mode").format(listed))
        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            time.sleep(0.05 * (attempt + 1))
        else:
            connection.execute("set local statement_timeout = 0")
            return
    raise Busy(
        f"other work holds {', '.join(names)}: a query that has been running for long, or a transaction left open. Nothing "
        "is changed; look at pg_stat_activity and run it again"
    )


def _rename(connection: Connection) -> None:
    ours, theirs = _indexes(connection, "documents"), _indexes(connection, SHADOW)
    passing = sql.Identifier(f"{PREFIX}swap")
    rename = sql.SQL("alter table {} rename to {}")
    connection.execute(rename.format(sql.Identifier("documents"), passing))
    connection.execute(rename.format(sql.Identifier(SHADOW), sql.Identifier("documents")))
    connection.execute(rename.format(passing, sql.Identifier(SHADOW)))
    pairs = [(index["name"], f"{PREFIX}swap_{number}") for number, index in enumerate(ours)]
    pairs += [(index["name"], index["name"].removeprefix(PREFIX)) for index in theirs]
    pairs += [(f"{PREFIX}swap_{number}", f"{PREFIX}{index['name']}") for number, index in enumerate(ours)]
    for old, new in pairs:
        connection.execute(sql.SQL("alter index {} rename to {}").format(sql.Identifier(old), sql.Identifier(new)))


@contextmanager
def _in_our_words() -> Iterator[None]:
    """Errors of locks in our own words."""
    try:
        yield
    except psycopg.errors.LockNotAvailable:
        raise Busy(
            "a transaction that writes is holding its locks for long; nothing is changed, look at pg_stat_activity and run "
            "it again"
        ) from None


def columns(connection: Connection, name: str) -> list[tuple[str, str, bool]]:
    """Name and type of each column, the vectors' length left out, and whether it may be null."""
    return connection.execute(COLUMNS, {"name": name}).fetchall()


def _row(connection: Connection, statement: str, values: Any = None) -> tuple[Any, ...]:
    found: tuple[Any, ...] | None = connection.execute(statement.encode(), values).fetchone()
    if found is None:
        raise SetupError("the table documents is missing: run `pgrecall migrate`")
    return found


def _indexes(connection: Connection, name: str) -> list[dict[str, Any]]:
    rows = connection.execute(INDEXES, {"name": name}).fetchall()
    return [dict(zip(("name", "definition", "comment", "key", "valid"), row, strict=True)) for row in rows]


def _views(connection: Connection) -> list[View]:
    return [View(*row) for row in connection.execute(VIEWS).fetchall()]


def _rights(connection: Connection, oid: int) -> list[tuple[str, str, bool]]:
    return connection.execute(RIGHTS, {"oid": oid}).fetchall()


def _comments(connection: Connection, oid: int) -> list[tuple[int | None, str | None, str]]:
    return connection.execute(COMMENTS, {"oid": oid}).fetchall()


def _grant(connection: Connection, rights: list[tuple[str, str, bool]], name: sql.Identifier) -> None:
    for role, privilege, grantable in rights:
        option = " with grant option" if grantable else ""
        connection.execute(sql.SQL(f"grant {privilege} on {{}} to {{}}{option}").format(name, _role(role)))


def _comment(
    connection: Connection,
    kind: str,
    name: sql.Identifier,
    comments: list[tuple[int | None, str | None, str]],
) -> None:
    for _, column, text in comments:
        on = (
            sql.SQL("column {}.{}").format(name, sql.Identifier(column))
            if column
            else sql.SQL(f"{kind} {{}}").format(name)
        )
        connection.execute(sql.SQL("comment on {} is {}").format(on, sql.Literal(text)))


def describe(connection: Connection, index: str, comment: str | None) -> None:
    """Put the comment on an index."""
    if comment:
        connection.execute(sql.SQL("comment on index {} is {}").format(sql.Identifier(index), sql.Literal(comment)))


def _role(name: str) -> sql.Composable:
    return sql.SQL("public") if name == "public" else sql.Identifier(name)

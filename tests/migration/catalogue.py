"""What the catalogue says of a schema: everything a migration can make, in an order and in words that two databases share."""

import psycopg
from psycopg import sql

OURS = "n.oid = 'public'::regnamespace"
NOT_FROM_AN_EXTENSION = "not exists (select from pg_depend d where d.objid = {} and d.deptype = 'e')"

QUERIES = {
    "relations": f"""
        select c.relname, c.relkind::text, pg_get_userbyid(c.relowner), c.relpersistence::text, c.reloptions::text,
               c.relrowsecurity, c.relforcerowsecurity, c.relreplident::text
          from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where {OURS} and {NOT_FROM_AN_EXTENSION.format("c.oid")}""",
    "columns": f"""
        select c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attstorage::text,
               a.attgenerated::text, a.attidentity::text, a.attstattarget, l.collname,
               pg_get_expr(e.adbin, e.adrelid) as default
          from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
          left join pg_attrdef e on e.adrelid = a.attrelid and e.adnum = a.attnum
          left join pg_collation l on l.oid = a.attcollation
         where {OURS} and c.relkind in ('r', 'p', 'v', 'm') and a.attnum > 0 and not a.attisdropped""",
    "constraints": f"""
        select c.conrelid::regclass::text, c.conname, c.convalidated, c.condeferrable, pg_get_constraintdef(c.oid)
          from pg_constraint c join pg_namespace n on n.oid = c.connamespace where {OURS}""",
    "indexes": f"""
        select c.relname, x.indisvalid, x.indisready, x.indisreplident, pg_get_indexdef(c.oid)
          from pg_index x join pg_class c on c.oid = x.indexrelid join pg_namespace n on n.oid = c.relnamespace
         where {OURS}""",
    "views": f"""
        select c.relname, pg_get_viewdef(c.oid) from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where {OURS} and c.relkind in ('v', 'm')""",
    "functions": f"""
        select p.oid::regprocedure::text, pg_get_functiondef(p.oid), pg_get_userbyid(p.proowner)
          from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where {OURS} and p.prokind in ('f', 'p') and {NOT_FROM_AN_EXTENSION.format("p.oid")}""",
    "triggers": f"""
        select pg_get_triggerdef(t.oid) from pg_trigger t join pg_class c on c.oid = t.tgrelid
          join pg_namespace n on n.oid = c.relnamespace where {OURS} and not t.tgisinternal""",
    "types": f"""
        select t.typname, t.typtype::text, format_type(t.typbasetype, t.typtypmod)
          from pg_type t join pg_namespace n on n.oid = t.typnamespace
         where {OURS} and t.typtype in ('d', 'e', 'r') and {NOT_FROM_AN_EXTENSION.format("t.oid")}""",
    "policies": """
        select tablename, policyname, permissive, roles::text, cmd, qual, with_check from pg_policies
         where schemaname = 'public'""",
    "grants": f"""
        select c.relname, coalesce(r.rolname, 'public'), a.privilege_type, a.is_grantable
          from pg_class c join pg_namespace n on n.oid = c.relnamespace
         cross join aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
          left join pg_roles r on r.oid = a.grantee
         where {OURS} and c.relkind in ('r', 'p', 'v', 'm') and {NOT_FROM_AN_EXTENSION.format("c.oid")}""",
    "column grants": f"""
        select c.relname, t.attname, coalesce(r.rolname, 'public'), a.privilege_type, a.is_grantable
          from pg_attribute t join pg_class c on c.oid = t.attrelid join pg_namespace n on n.oid = c.relnamespace
         cross join aclexplode(t.attacl) a left join pg_roles r on r.oid = a.grantee
         where {OURS} and not t.attisdropped""",
    "function grants": f"""
        select p.oid::regprocedure::text, coalesce(r.rolname, 'public'), a.privilege_type, a.is_grantable
          from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         cross join aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
          left join pg_roles r on r.oid = a.grantee
         where {OURS} and {NOT_FROM_AN_EXTENSION.format("p.oid")}""",
    "comments": """
        select i.type, i.identity, d.description
          from pg_description d
         cross join lateral pg_identify_object(d.classoid, d.objoid, d.objsubid) i
         where d.classoid in ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass, 'pg_constraint'::regclass,
                              'pg_policy'::regclass)
           and (i.schema = 'public' or i.identity like '%public.%')
           and not exists (select from pg_depend x where x.objid = d.objoid and x.deptype = 'e')""",
}
"""What there is of each kind; a row is a fact, the order of columns is none."""

ALEMBICS = "pgrecall_revision"
"""Alembic's own table, which a downgrade to nothing leaves there, empty."""


def snapshot(url):
    """Every fact by its kind. Two databases with the same schema answer the same on the same server."""
    with psycopg.connect(url, autocommit=True) as connection:
        return {kind: sorted(map(str, connection.execute(query).fetchall())) for kind, query in QUERIES.items()}


def difference(one, other):
    """What two snapshots do not share, for a message that names it."""
    return {
        kind: {"gone": sorted(set(one[kind]) - set(other[kind])), "new": sorted(set(other[kind]) - set(one[kind]))}
        for kind in QUERIES
        if one[kind] != other[kind]
    }


def tables(connection):
    """Names of the tables with the columns of each: name to type, as far as a row may give them a value."""
    found = {}
    for table, column, kind in connection.execute(
        """select c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
             from pg_attribute a join pg_class c on c.oid = a.attrelid
            where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped
              and a.attgenerated = '' and a.attidentity <> 'a' and c.relname <> %s
            order by c.relname, a.attnum""",
        (ALEMBICS,),
    ):
        found.setdefault(table, {})[column] = kind
    return found


def rows(connection, table, columns):
    """The rows of a table, in these columns, each as text."""
    statement = sql.SQL("select {}::text from {} t order by 1").format(
        sql.SQL("row({})").format(sql.SQL(", ").join(map(sql.Identifier, columns))), sql.Identifier(table)
    )
    return [row for (row,) in connection.execute(statement)]

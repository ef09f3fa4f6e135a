"""Reads what keeps tenants apart from a database's catalogue, in one statement, as `isolation` holds it.

PostgreSQL's own words differ between versions and with where pgvector is; `_same_words` takes that out of them.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from app import roles
from app.errors import SetupError, Unsafe
from app.isolation import HERE, MIGRATOR_LOCK, Function, Policy, Relation, Rules, expected
from app.statements import Statement
from app.tables import RUN_PREFIX, bearing

CONFIG = {
    "intervalstyle": "postgres",
    "datestyle": "ISO, MDY",
    "timezone": "UTC",
    "extra_float_digits": "1",
    "quote_all_identifiers": "off",
    "lock_timeout": "1s",
}
"""Settings that PostgreSQL's words depend on, and how long it may wait to find them."""

PREFLIGHT = """
with tables as materialized (
    select relnamespace, relowner from pg_class where oid = to_regclass('sources')
), migration as materialized (
    -- Any login may take an advisory lock: only one that could migrate is believed.
    select exists (select from pg_locks l join pg_database d on d.oid = l.database and d.datname = current_database()
                     join pg_stat_activity a on a.pid = l.pid
                     join tables t on pg_has_role(a.usesysid, t.relowner, 'member')
                    where l.locktype = 'advisory' and l.classid = %(lock_high)s::oid and l.objid = %(lock_low)s::oid
                      and l.objsubid = 1 and l.granted) or not %(words)s as runs
), ours as materialized (
    select oid, rolname::text as name, rolsuper or rolbypassrls as bypasses from pg_roles where rolname = any (%(roles)s::text[])
), here as materialized (
    select c.oid, c.relname::text as name, c.relkind in ('v', 'm') as view, c.relowner, c.relrowsecurity, c.reloptions, c.relacl
      from pg_class c
     where c.relnamespace = (select relnamespace from tables) and c.relkind in ('r', 'p', 'v', 'm')
       and (c.relname = any (%(relations)s::text[]) or starts_with(c.relname::text, %(prefix)s))
), reached as materialized (
    select r.oid from pg_roles r where exists (select from ours o where pg_has_role(o.oid, r.oid, 'usage'))
), programs as materialized (
    select p.oid, p.proname || '(' || oidvectortypes(p.proargtypes) || ')' as name, p.prosecdef, p.proacl, p.proowner,
           concat_ws(' ', l.lanname, case p.provolatile when 'i' then 'immutable' when 's' then 'stable' else 'volatile' end,
                     case when p.proisstrict then 'strict' end, case when p.proleakproof then 'leakproof' end,
                     case p.proparallel when 's' then 'parallel safe' when 'r' then 'parallel restricted' end) as nature,
           concat_ws(E'\n', pg_get_function_arguments(p.oid), pg_get_function_result(p.oid)) as signature,
           case when p.prosqlbody is null then encode(sha256(convert_to(p.prosrc, 'UTF8')), 'hex') end as text,
           case when p.prosqlbody is not null and not m.runs then pg_get_function_sqlbody(p.oid) end as parsed,
           -- The migrations set it to this schema, then pgvector's where that is another: the same words wherever they are.
           (select array_agg(case when each = 'search_path=' || concat_ws(', ', quote_ident(s.nspname), quote_ident(v.nspname), 'pg_temp')
                                  then 'search_path=public, pg_temp' else each end order by n)
              from unnest(p.proconfig) with ordinality as several (each, n)
              join pg_namespace s on s.oid = p.pronamespace
              left join pg_namespace v
                on v.oid = (select extnamespace from pg_extension where extname = 'vector') and v.oid <> s.oid) as proconfig
      from migration m, pg_proc p join pg_language l on l.oid = p.prolang
     where p.pronamespace = (select relnamespace from tables) and p.proname = any (%(functions)s::text[])
), granted as materialized (
    select h.name, a.grantee, a.privilege_type, null::text as place
      from here h cross join lateral aclexplode(h.relacl) a where a.grantee <> h.relowner
     union all
    select h.name, a.grantee, a.privilege_type, t.attname
      from here h join pg_attribute t on t.attrelid = h.oid and t.attacl is not null and not t.attisdropped
     cross join lateral aclexplode(t.attacl) a where a.grantee <> h.relowner
     union all
    select p.name, a.grantee, a.privilege_type, null
      from programs p cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
     where a.grantee <> p.proowner
)
select (select runs from migration) as migrating, current_user as login,
       exists (select from pg_roles w, here g
                where w.rolname = %(worker)s and pg_has_role(current_user, w.oid, 'usage')
                  and not (select rolsuper from pg_roles where rolname = current_user)) as inherits,
       coalesce((select pg_has_role(current_user, oid, 'member') from ours where name = %(app)s), false) as member,
       (select array_agg(name order by name) from ours where bypasses and name <> %(backup)s) as bypasses,
       (select array_agg(distinct o.name) from ours o, here h
         where o.name in (%(app)s, %(worker)s) and pg_has_role(o.oid, h.relowner, 'usage')) as owns,
       (select array_agg(array[o.name, other.name]) from ours o, ours other
         where o.name in (%(app)s, %(worker)s) and o.oid <> other.oid and pg_has_role(o.oid, other.oid, 'usage')) as more,
       (select quote_ident(n.nspname) from pg_extension e join pg_namespace n on n.oid = e.extnamespace, ours r
         where e.extname = 'vector' and r.name = %(app)s and not has_schema_privilege(r.oid, n.oid, 'usage')) as hidden,
       (select quote_ident(n.nspname) from pg_extension e join pg_namespace n on n.oid = e.extnamespace
         where e.extname = 'vector') as pgvector,
       (select quote_ident(n.nspname) from tables t join pg_namespace n on n.oid = t.relnamespace) as schema,
       (select pg_get_userbyid(relowner) from tables) as owner,
       (select jsonb_agg(jsonb_build_object(
               'name', h.name, 'view', h.view, 'secured', h.relrowsecurity,
               'options', (select jsonb_agg(o order by o) from unnest(h.reloptions) o where o ~ '^(security|check)_'),
               'definition', case when h.view and not m.runs then pg_get_viewdef(h.oid) end))
          from here h, migration m) as relations,
       (select jsonb_agg(jsonb_build_object(
               'table', h.name, 'name', p.polname, 'permissive', p.polpermissive, 'command', p.polcmd,
               'roles', (select jsonb_agg(coalesce(r.rolname, 'public') order by r.rolname)
                           from unnest(p.polroles) as given left join pg_roles r on r.oid = given),
               'using', case when not m.runs then pg_get_expr(p.polqual, p.polrelid) end,
               'check', case when not m.runs then pg_get_expr(p.polwithcheck, p.polrelid) end))
          from migration m, here h join pg_policy p on p.polrelid = h.oid
         where p.polroles && array(select oid from reached union all select 0::oid)) as policies,
       (select jsonb_agg(jsonb_build_object(
               'name', p.name, 'definer', p.prosecdef, 'config', p.proconfig, 'nature', p.nature, 'signature', p.signature,
               'text', p.text, 'parsed', p.parsed, 'owner', case when p.proowner <> t.relowner then pg_get_userbyid(p.proowner) end))
          from programs p, tables t) as functions,
       (select jsonb_agg(jsonb_build_array(g.name, coalesce(o.name, 'public'), g.privilege_type, g.place)
                         order by g.name, o.name, g.privilege_type, g.place)
          from granted g left join ours o on o.oid = g.grantee where g.grantee = 0 or o.oid is not null) as rights
"""
"""Everything the service looks at before it serves, in one statement. Reads catalogues only.

PostgreSQL locks a relation to put its view or policy, or a function that names it, into words. A migration holds locks of its own, in another order: the
words are left out while one runs, so that neither waits for the other in a circle, and where `words` is false.
"""


def preflight(relations: Iterable[str] = (), functions: Iterable[str] = (), *, words: bool = True) -> Statement:
    """The statement for these relations and functions; for those that the migrations made where none are named.

    `words`: look at what views and policies say, which waits for whoever changes them.
    """
    values = {
        "app": roles.APP,
        "worker": roles.WORKER,
        "backup": roles.BACKUP,
        "roles": list(roles.ROLES),
        "prefix": RUN_PREFIX,
        "words": words,
        "lock_high": MIGRATOR_LOCK >> 32,
        "lock_low": MIGRATOR_LOCK & 0xFFFFFFFF,
        "relations": sorted(relations) or sorted({*expected().relations, *(table.name for table in bearing())}),
        "functions": sorted(functions) or sorted({name.partition("(")[0] for name in expected().functions}),
    }
    return Statement("isolation preflight", PREFLIGHT, values)


def check_roles(row: Mapping[str, Any]) -> None:
    """Raise Unsafe where the login or the roles it takes reach further than one tenant, SetupError where not to pgvector."""
    mend = f"run `pgrecall roles --apply --login {row['login']} --url …` with an administrator's URL"
    if not row["member"]:
        raise Unsafe(f"the login {row['login']} may not become {roles.APP}: {mend}, or serve as another login")
    if row["inherits"]:
        raise Unsafe(f"the login {row['login']} has the rights of {roles.WORKER} without asking for them: {mend}")
    for role in row["bypasses"] or ():
        raise Unsafe(f"{role} bypasses row-level security: ALTER ROLE {role} NOSUPERUSER NOBYPASSRLS")
    for role in row["owns"] or ():
        raise Unsafe(f"{role} has the rights of the tables' owner: REVOKE that role FROM {role}")
    for role, other in row["more"] or ():
        raise Unsafe(f"{role} has the rights of {other}: REVOKE {other} FROM {role}")
    if row["hidden"]:
        raise SetupError(
            f"{roles.APP} may not use the schema {row['hidden']}, where pgvector is: "
            f"GRANT USAGE ON SCHEMA {row['hidden']} TO {', '.join(roles.ROLES)}"
        )


_ANY_LANGUAGE = re.compile(r"'[^']*'::regconfig")
_QUALIFIER = re.compile(r"(?<![\w\".'])\w+\.(?=[\w\"])")
"""A relation's name before its column, which PostgreSQL 15 writes more often than 16."""

_NAMED = re.compile(r"\b((?:DELETE FROM|UPDATE) (?:ONLY )?\S+) AS (?=\w)")
"""The name a changed table has in a statement, which PostgreSQL 17 writes AS before and 18 does not."""

_COMMANDS = {"*": "ALL", "r": "SELECT", "a": "INSERT", "w": "UPDATE", "d": "DELETE"}


def read(row: Mapping[str, Any], revision: str) -> Rules:
    """What a database has, from a row of PREFLIGHT. Of no revision where words were left out."""
    place, schema = row["pgvector"] or "public", row["schema"] or "public"
    rights: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name, role, privilege, column in row["rights"] or ():
        columns = rights.setdefault(_same_words(name, place), {}).setdefault(role, {}).setdefault(privilege, [])
        columns += [column] if column else []
    granted = {
        name: {role: [_privilege(*each) for each in sorted(held.items())] for role, held in sorted(by_role.items())}
        for name, by_role in rights.items()
    }
    relations = {
        each["name"]: Relation(
            view=each["view"],
            secured=each["secured"],
            options=each["options"] or [],
            definition=_unqualified(_same_words(each["definition"], place)) if each["definition"] else None,
            rights=granted.get(each["name"], {}),
        )
        for each in sorted(row["relations"] or (), key=lambda each: each["name"])
    }
    policies = {}
    for each in sorted(row["policies"] or (), key=lambda each: (each["table"], each["name"])):
        words = {part: each[part] and _same_words(each[part], place) for part in ("using", "check")}
        policy = Policy(**(each | words | {"command": _COMMANDS[each["command"]]}))
        policies[f"{policy.name} on {policy.table}"] = policy
    functions = {
        name: Function(
            nature=each["nature"],
            body=_body(each, place),
            owner=each["owner"],
            definer=each["definer"],
            config=[re.sub(rf"(?<=, ){re.escape(schema)}(?=,)", HERE, value) for value in each["config"] or ()],
            rights=granted.get(name, {}),
        )
        for name, each in sorted((_same_words(each["name"], place), each) for each in row["functions"] or ())
    }
    return Rules("" if row["migrating"] else revision, relations, policies, functions, schema, row["owner"] or "")


def _body(each: Mapping[str, Any], place: str) -> str | None:
    """Digest of a function's arguments, result and text; None where its text was not put into words."""
    text = each["text"]
    if text is None:  # written in SQL's own syntax, of which PostgreSQL keeps no text
        if each["parsed"] is None:
            return None
        text = _ANY_LANGUAGE.sub("'{language}'::regconfig", _QUALIFIER.sub("", _same_words(each["parsed"], place)))
    signature = _same_words(each["signature"], place)
    text = _NAMED.sub(r"\1 ", text)
    return hashlib.sha256(f"{signature}\n{text}".encode()).hexdigest()[:16]


def _privilege(name: str, columns: list[str]) -> str:
    return f"{name} ({', '.join(columns)})" if columns else name


def _same_words(text: str, place: str) -> str:
    """PostgreSQL's words in one line, without the schema that pgvector is in."""
    text = " ".join(text.split()).rstrip("; ")
    text = re.sub(rf"(?<![\w\".]){re.escape(place)}\.(?=[\w\"<=>#+*-])", "", text)
    return re.sub(r"OPERATOR\(([^()\s]+)\)", r"\1", text)


_BRACKET = re.compile(r"'(?:[^']|'')*'|\( SELECT\b|[()]")
_ONE_RELATION = re.compile(
    r"SELECT .* FROM (\w+|\(\))(?: (?!WHERE\b|GROUP\b|ORDER\b|LIMIT\b)(\w+))?(?: (?:WHERE|GROUP|ORDER|LIMIT) .*)?"
)


def _unqualified(text: str) -> str:
    """A view of one relation without that relation's name before its columns, which PostgreSQL 15 writes and 16 does not.

    What stands in selects within it is left as it is: there both versions write the name.
    """
    parts = _outside(text)
    found = _ONE_RELATION.fullmatch("".join(part if outside else "()" for part, outside in parts))
    if not found:
        return text
    name = re.compile(rf"(?<![\w\".]){found[2] or found[1]}\.(?=[\w\"])")
    return "".join(name.sub("", part) if outside else part for part, outside in parts)


def _outside(text: str) -> list[tuple[str, bool]]:
    """The text in parts, and whether each stands outside of selects within it, which are a part each."""
    parts: list[tuple[str, bool]] = []
    open_brackets: list[bool] = []
    begun = 0
    for found in _BRACKET.finditer(text):
        if found[0][0] == "(":
            if len(found[0]) > 1 and not any(open_brackets):
                parts.append((text[begun : found.start()], True))
                begun = found.start()
            open_brackets.append(len(found[0]) > 1)
        elif found[0] == ")" and open_brackets and open_brackets.pop() and not any(open_brackets):
            parts.append((text[begun : found.end()], False))
            begun = found.end()
    return [*parts, (text[begun:], True)]

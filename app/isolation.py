"""What keeps tenants apart in the database, as the migrations made it, and how a database differs from that.

`isolation.json` holds what a migrated database has: row-level security, policies, views, rights, who functions run as.
`make isolation` writes it, a test compares it with the migrations. PostgreSQL's own words differ between versions and
with where pgvector is; `_same_words` takes that out of them. A difference comes with the statement that mends it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from app import roles
from app.errors import SetupError, Unsafe
from app.statements import Statement
from app.tables import RUN_PREFIX, bearing

FILE = Path(__file__).with_name("isolation.json")

CONFIG = {
    "intervalstyle": "postgres",
    "datestyle": "ISO, MDY",
    "timezone": "UTC",
    "extra_float_digits": "1",
    "quote_all_identifiers": "off",
    "lock_timeout": "1s",
}
"""Settings that PostgreSQL's words depend on, and how long it may wait to find them."""

MIGRATOR_LOCK = 0x7067726563616C6C  # "pgrecall"
"""Advisory lock of whoever migrates."""

HERE = "{schema}"

NAMED = 3
"""Differences that are written out; of the rest only the number is."""


class Relation(msgspec.Struct, frozen=True, omit_defaults=True):
    """A table or view. `rights`: role -> privileges of others than the owner, with their columns where not on all."""

    view: bool = False
    secured: bool = False
    options: list[str] = []
    definition: str | None = None
    rights: dict[str, list[str]] = {}


class Policy(msgspec.Struct, frozen=True, omit_defaults=True):
    """A policy of row-level security."""

    table: str
    name: str
    command: str
    roles: list[str]
    using: str | None = None
    check: str | None = None
    permissive: bool = True

    @property
    def title(self) -> str:
        """What it is called in a message."""
        return f"the policy {self.name} on {self.table}"


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function or procedure: whether it runs with its owner's rights, and under which settings."""

    definer: bool = False
    config: list[str] = []
    rights: dict[str, list[str]] = {}


class Rules(msgspec.Struct, frozen=True):
    """Everything that keeps tenants apart in one database. Policies under `name on table`, functions under `name(types)`."""

    revision: str
    relations: dict[str, Relation]
    policies: dict[str, Policy]
    functions: dict[str, Function]
    schema: str = "public"
    """Where all of it is; stands as HERE in the settings of functions."""


class Fault(NamedTuple):
    """A difference, the statement that mends it, and whether the service itself could read or write what is not its own."""

    what: str
    mend: str
    leaks: bool


@cache
def expected() -> Rules:
    """What the migrations of this release make."""
    return msgspec.json.decode(FILE.read_bytes(), type=Rules)


PREFLIGHT = """
with migration as materialized (
    select exists (select from pg_locks l join pg_database d on d.oid = l.database and d.datname = current_database()
                    where l.locktype = 'advisory' and l.classid = %(lock_high)s::oid and l.objid = %(lock_low)s::oid
                      and l.objsubid = 1 and l.granted) or not %(words)s as runs
), ours as materialized (
    select oid, rolname::text as name, rolsuper or rolbypassrls as bypasses from pg_roles where rolname = any (%(roles)s::text[])
), here as materialized (
    select c.oid, c.relname::text as name, c.relkind in ('v', 'm') as view, c.relowner, c.relrowsecurity, c.reloptions, c.relacl
      from pg_class c
     where c.relnamespace = (select relnamespace from pg_class where oid = to_regclass('sources'))
       and c.relkind in ('r', 'p', 'v', 'm')
       and (c.relname = any (%(relations)s::text[]) or starts_with(c.relname::text, %(prefix)s))
), reached as materialized (
    select r.oid from pg_roles r where exists (select from ours o where pg_has_role(o.oid, r.oid, 'usage'))
), programs as materialized (
    select p.oid, p.proname || '(' || oidvectortypes(p.proargtypes) || ')' as name, p.prosecdef, p.proacl, p.proowner,
           -- The migrations set it to this schema, then pgvector's where that is another: the same words wherever they are.
           (select array_agg(case when each = 'search_path=' || concat_ws(', ', quote_ident(s.nspname), quote_ident(v.nspname), 'pg_temp')
                                  then 'search_path=public, pg_temp' else each end order by n)
              from unnest(p.proconfig) with ordinality as several (each, n)
              join pg_namespace s on s.oid = p.pronamespace
              left join pg_namespace v
                on v.oid = (select extnamespace from pg_extension where extname = 'vector') and v.oid <> s.oid) as proconfig
      from pg_proc p
     where p.pronamespace = (select relnamespace from pg_class where oid = to_regclass('sources'))
       and p.proname = any (%(functions)s::text[])
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
       (select quote_ident(n.nspname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where c.oid = to_regclass('sources')) as schema,
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
       (select jsonb_agg(jsonb_build_object('name', p.name, 'definer', p.prosecdef, 'config', p.proconfig))
          from programs p) as functions,
       (select jsonb_agg(jsonb_build_array(g.name, coalesce(o.name, 'public'), g.privilege_type, g.place)
                         order by g.name, o.name, g.privilege_type, g.place)
          from granted g left join ours o on o.oid = g.grantee where g.grantee = 0 or o.oid is not null) as rights
"""
"""Everything the service looks at before it serves, in one statement. Reads catalogues only.

PostgreSQL locks a relation to put its view or policy into words. A migration holds locks of its own, in another order: the
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
            definer=each["definer"],
            config=[re.sub(rf"(?<=, ){re.escape(schema)}(?=,)", HERE, value) for value in each["config"] or ()],
            rights=granted.get(name, {}),
        )
        for name, each in sorted((_same_words(each["name"], place), each) for each in row["functions"] or ())
    }
    return Rules("" if row["migrating"] else revision, relations, policies, functions, schema)


def _privilege(name: str, columns: list[str]) -> str:
    return f"{name} ({', '.join(columns)})" if columns else name


def _same_words(text: str, place: str) -> str:
    """PostgreSQL's words in one line, without the schema that pgvector is in."""
    text = " ".join(text.split()).rstrip("; ")
    text = re.sub(rf"(?<![\w\".]){re.escape(place)}\.(?=[\w\"<=>#+*-])", "", text)
    return re.sub(r"OPERATOR\(([^()\s]+)\)", r"\1", text)


_ONE_RELATION = re.compile(
    r"SELECT .* FROM (\w+)(?: (?!WHERE\b|GROUP\b|ORDER\b|LIMIT\b)(\w+))?(?: (?:WHERE|GROUP|ORDER|LIMIT) .*)?"
)


def _unqualified(text: str) -> str:
    """A view of one relation without that relation's name before its columns, which PostgreSQL 15 writes and 16 does not."""
    found = _ONE_RELATION.fullmatch(text)
    if not found or text.count(" FROM ") > 1:
        return text
    return re.sub(rf"(?<![\w\".]){found[2] or found[1]}\.(?=[\w\"])", "", text)


def faults(found: Rules) -> list[Fault]:
    """How a database differs from what the migrations made.

    At another revision than this release's newest, whose views, policies and rights this release cannot know, and while
    a migration runs: only what would let the service read or write another tenant's rows.
    """
    rules = expected()
    differences = [*_relations(rules, found), *_policies(rules, found), *_functions(rules, found)]
    return differences if found.revision == rules.revision else [each for each in differences if each.leaks]


def refusal(differences: list[Fault]) -> Unsafe:
    """The error that names the differences, worst first, and what mends them."""
    several = sorted(differences, key=lambda each: not each.leaks)
    named = several[:NAMED]
    more = f"; and {len(several) - NAMED} more" if len(several) > NAMED else ""
    return Unsafe(
        f"what keeps tenants apart is not as the migrations made it: {'; '.join(each.what for each in named)}{more}. "
        f"To mend it, as the tables' owner: {'; '.join(each.mend for each in named)}"
    )


def _relations(rules: Rules, found: Rules) -> Iterator[Fault]:
    confined = {table.name for table in bearing()}
    wanted = dict(rules.relations)
    for name in found.relations:  # tables that an operation made as `documents` is, at run time
        if (like := name.removeprefix(RUN_PREFIX)) != name and like in rules.relations:
            wanted[name] = rules.relations[like]
    for name, relation in wanted.items():
        there = found.relations.get(name)
        kind = "view" if relation.view else "table"
        if there is None:
            made = _view(name, relation) if relation.view else f"restore the table {name}: `pgrecall migrate` makes it"
            yield Fault(f"the {kind} {name} is missing", made, leaks=False)
            continue
        if relation.secured and not there.secured:
            yield Fault(
                f"row-level security is off on {name}",
                f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY",
                name in confined,
            )
        if relation.view and there.definition not in {None, relation.definition}:
            leaks = _condition(relation) != _condition(there)
            yield Fault(f"the view {name} reads: {there.definition}", _view(name, relation), leaks)
        if relation.view and there.options != relation.options:
            had = ", ".join(there.options) or "none"
            yield Fault(f"the view {name} has the options: {had}", _view(name, relation), leaks=True)
        yield from _rights("TABLE", name, relation.rights, there.rights)


def _view(name: str, relation: Relation) -> str:
    options = f" WITH ({', '.join(relation.options)})" if relation.options else ""
    return f"CREATE OR REPLACE VIEW {name}{options} AS {relation.definition}"


def _condition(relation: Relation) -> str:
    """Which rows a view shows: a newer release may add columns to it, and nothing after this."""
    return (relation.definition or "").rpartition(" FROM ")[2]


def _policies(rules: Rules, found: Rules) -> Iterator[Fault]:
    wanted = dict(rules.policies)
    for name in found.relations:
        if (like := name.removeprefix(RUN_PREFIX)) != name:
            wanted |= {
                f"{each.name} on {name}": msgspec.structs.replace(each, table=name)
                for each in rules.policies.values()
                if each.table == like
            }
    for key, policy in wanted.items():
        there = found.policies.get(key)
        if there is None:
            if policy.table in found.relations:
                yield Fault(f"{policy.title} is missing", _policy(policy), leaks=False)
        elif there != policy:
            yield Fault(
                f"{policy.title} is {_told(there)}",
                f"BEGIN; DROP POLICY {policy.name} ON {policy.table}; {_policy(policy)}; COMMIT",
                _opens(there),
            )
    for key, there in found.policies.items():
        if key not in wanted and there.permissive:
            yield Fault(
                f"{there.title}, {_told(there)}, is none of the migrations'",
                f"DROP POLICY {_quoted(there.name)} ON {there.table}",
                _opens(there),
            )


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else f'"{doubled}"'


def _told(policy: Policy) -> str:
    using = f" using {policy.using}" if policy.using else ""
    check = f" with check {policy.check}" if policy.check else ""
    return f"for {policy.command.lower()} to {', '.join(policy.roles)}{using}{check}"


def _policy(policy: Policy) -> str:
    kind = "" if policy.permissive else " AS RESTRICTIVE"
    using = f" USING ({policy.using})" if policy.using else ""
    check = f" WITH CHECK ({policy.check})" if policy.check else ""
    to = ", ".join(policy.roles)
    return f"CREATE POLICY {policy.name} ON {policy.table}{kind} FOR {policy.command} TO {to}{using}{check}"


def _opens(policy: Policy) -> bool:
    """Whether the service's own role comes by it to rows of another tenant than the one it named."""
    one_tenant = expected().policies["app_sources on sources"].using
    if not policy.permissive or not {roles.APP, "public"} & set(policy.roles):
        return False
    return any(part not in {None, one_tenant} for part in (policy.using, policy.check))


PAST_POLICIES = ("TRUNCATE", "REFERENCES", "TRIGGER")
"""Privileges that row-level security does not bound."""


def _rights(kind: str, name: str, wanted: dict[str, list[str]], there: dict[str, list[str]]) -> Iterator[Fault]:
    for role in sorted({*wanted, *there}):
        lacking = [each for each in wanted.get(role, ()) if each not in there.get(role, ())]
        beyond = [each for each in there.get(role, ()) if each not in wanted.get(role, ())]
        if beyond:
            listed = ", ".join(beyond)
            leaks = role in {roles.APP, roles.WORKER, "public"} and any(each in beyond for each in PAST_POLICIES)
            yield Fault(f"{role} has {listed} on {name}", f"REVOKE {listed} ON {kind} {name} FROM {role}", leaks)
        if lacking:
            listed = ", ".join(lacking)
            yield Fault(f"{role} lacks {listed} on {name}", f"GRANT {listed} ON {kind} {name} TO {role}", leaks=False)


def _functions(rules: Rules, found: Rules) -> Iterator[Fault]:
    for name, function in rules.functions.items():
        there = found.functions.get(name)
        if there is None:
            yield Fault(f"the function {name} is missing", f"restore {name} from migrations/versions", leaks=False)
            continue
        if there.definer != function.definer:
            whose = ("its caller", "its owner")
            wanted = "DEFINER" if function.definer else "INVOKER"
            yield Fault(
                f"the function {name} runs with the rights of {whose[there.definer]}",
                f"ALTER ROUTINE {name} SECURITY {wanted}",
                there.definer,
            )
        if there.config != function.config:
            sets = [f"SET {each.replace('=', ' = ', 1).replace(HERE, found.schema)}" for each in function.config]
            yield Fault(
                f"the function {name} runs under {', '.join(there.config) or 'no settings of its own'}",
                "; ".join(f"ALTER ROUTINE {name} {each}" for each in ["RESET ALL", *sets]),
                leaks=False,
            )
        yield from _rights("ROUTINE", name, function.rights, there.rights)

"""What keeps tenants apart in the database, as the migrations made it, and how a database differs from that.

`isolation.json` holds what a migrated database has: row-level security, policies, views, rights, functions and who they
run as. `make isolation` writes it, a test compares it with the migrations, `catalogue` reads it from a database. A difference
comes with the statement that mends it.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec

from app import roles
from app.errors import Unsafe
from app.tables import RUN_PREFIX, bearing

FILE = Path(__file__).with_name("isolation.json")

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
    """A function or procedure: whether it runs with its owner's rights, and under which settings.

    `steps`: the migration that makes it, as `alembic upgrade` takes it. `nature`: its language, then what may be assumed of
    it. `body`: digest of arguments, result and text; None where it was not to be had. `owner`: None, or who has it
    instead of the tables' owner.
    """

    steps: str = ""
    nature: str = ""
    body: str | None = None
    owner: str | None = None
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
    owner: str = ""
    """Whose the tables are. Not of what is expected: any login may be."""


class Fault(NamedTuple):
    """A difference, the statement that mends it, and whether the service itself could read or write what is not its own."""

    what: str
    mend: str
    leaks: bool


@cache
def expected() -> Rules:
    """What the migrations of this release make."""
    return msgspec.json.decode(FILE.read_bytes(), type=Rules)


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
            yield Fault(f"the function {name} is missing", _made_again(name, function), leaks=False)
            continue
        if there.body not in {None, function.body} or there.nature.split()[0] != function.nature.split()[0]:
            yield Fault(
                f"the function {name} was replaced: its text, arguments or result are others",
                _made_again(name, function),
                leaks=False,
            )
        elif there.nature != function.nature:
            yield Fault(f"the function {name} is {there.nature}", _assumed(name, function), leaks=False)
        if there.owner is not None:
            yield Fault(
                f"the function {name} belongs to {there.owner}",
                f"ALTER ROUTINE {name} OWNER TO {_quoted(found.owner)}",
                there.definer,
            )
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


def _made_again(name: str, function: Function) -> str:
    return f"run the CREATE of {name.partition('(')[0]} that `alembic upgrade {function.steps} --sql` prints"


def _assumed(name: str, function: Function) -> str:
    _, volatility, *more = function.nature.split()
    strict = "STRICT" if "strict" in more else "CALLED ON NULL INPUT"
    parallel = "SAFE" if "safe" in more else "UNSAFE"
    return f"ALTER ROUTINE {name} {volatility.upper()} {strict} NOT LEAKPROOF PARALLEL {parallel}"

"""Every table, view and function of the catalogue, as everybody who may connect: alike in both worlds."""

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from app import local, roles
from tests.isolation.worlds import BEARING, MARK, World

RELATIONS = """
select c.relname from pg_class c
 where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
   and not exists (select from pg_depend where classid = 'pg_class'::regclass and objid = c.oid and deptype = 'e')
 order by 1
"""
FUNCTIONS = """
select p.proname from pg_proc p
 where p.pronamespace = 'public'::regnamespace
   and not exists (select from pg_depend where classid = 'pg_proc'::regclass and objid = p.oid and deptype = 'e')
 order by 1
"""

TENANTS = ("umbral", "acme")
VECTOR = f"'{[1.0] + [0.0] * 63}'::vector"
GLOBAL = frozenset({"index_health", "model_progress"})
"""Views of the whole database's indexes: sizes and counts in which every tenant has its part, and no row of any."""
IDS = "array['theirs', 'shared', 'mine']"
CALLS: dict[str, list[str]] = {
    "text_language": ["select text_language()"],
    "chunk_terms": ["select chunk_terms('reset your password')"],
    "tenant_terms": ["select tenant_terms('umbral', chunk_terms('reset your password'))"],
    "learn_terms": [f"select learn_terms('{tenant}', {IDS}, {{keys}})" for tenant in ("umbral", "acme")],
    "forget_terms": [
        f"select forget_terms('{tenant}', {IDS}{keys})" for tenant in ("umbral", "acme") for keys in ("", ", {keys}")
    ],
    "fill_terms": ["call fill_terms(10)"],
    "fold_statistics": ["select fold_statistics('umbral')"],
    "recount_statistics": ["select recount_statistics('umbral')"],
    "text_question": [
        f"select * from text_question('{tenant}', '{question}', 10, 1000)"
        for tenant in ("umbral", "acme")
        for question in ("reset password", MARK)
    ],
    "threshold_formula": [
        "select threshold_formula(array['a', 'b'], array[1.0, 2.0]::float8[], array[1.0, 2.0]::float8[], 1, 0.5)"
    ],
    "search_statement": ["select search_statement('few')"],
    "metadata_value": ["select metadata_value(array['lang'])"],
    "metadata_equality": ["select metadata_equality('metadata', array['\"en\"'::jsonb], array['lang'])"],
    "metadata_condition": ['select metadata_condition(\'{"lang": "en"}\')'],
    "text_question_read": [f"select * from text_question_read('{tenant}', 'reset', 10, 1000)" for tenant in TENANTS],
    "refuse": ["select refuse('top_k: is 0', 'a hint')"],
    "search_fault": [f"select * from search_fault('search_documents', '{tenant}', 0)" for tenant in TENANTS],
    "search_chunks": [f"select * from search_chunks('{tenant}', {VECTOR}, 'reset', 100)" for tenant in TENANTS],
    "search_documents": [
        *(f"select * from search_documents('{tenant}', {VECTOR}, 100)" for tenant in TENANTS),
        f"select * from search_documents('umbral', {VECTOR}, 100, -1, 'faq {MARK}')",
    ],
    "hybrid_search": [
        *(f"select * from hybrid_search('{tenant}', 'reset password', {VECTOR}, 100)" for tenant in TENANTS),
        *(f"select * from hybrid_search('{tenant}', '{MARK}')" for tenant in TENANTS),
    ],
    "similar_documents": [
        f"select * from similar_documents('{tenant}', '{name}', 100)"
        for tenant in TENANTS
        for name in ("shared", "theirs")
    ],
    "recall_check": [f"select queries, walked, recall from recall_check('{tenant}', 3)" for tenant in TENANTS],
    "keys_in_use": ["select keys_in_use()"],
    "find_key": ["select * from find_key('aaaaaaaa')"],
    "use_key": ["select * from use_key('aaaaaaaa', '', 1)"],
    "hold_streams": ["select hold_streams('aaaaaaaa', '', gen_random_uuid(), 1)"],
    "take_tokens": ["select granted from take_tokens(5)"],
    "admin_tenant": ["select admin_tenant('', '')"],
    "list_keys": ["select * from list_keys('', '')"],
    "create_key": [
        "select * from create_key('', '', 'aaaaaaaa', sha256('x'), null, array['read'], 'umbral', null, null, null)"
    ],
    "revoke_key": ["select * from revoke_key('', '', 'aaaaaaaa')"],
    "list_tenants": ["select * from list_tenants('', '', null)", "select * from list_tenants('', '', 'umbral')"],
    "put_tenant": ["select put_tenant('', '', 'umbral', true, 1, true, 1)"],
    "delete_tenant": ["select delete_tenant('', '', 'umbral')"],
    "other_model_chunks": ["select other_model_chunks()"],
    "text_candidates": ["select text_candidates(array['a', 'b'], array[1.0, 2.0]::float8[], 0.5, null)"],
}
"""How each function is called by somebody who is after umbral's rows; {keys}: the keys of all its chunks."""


class Identity(NamedTuple):
    """Who asks: a login, the role it takes, and the tenant it names."""

    name: str
    login: str
    role: str | None = None
    tenant: str | None = None


IDENTITIES = [
    Identity("the service as acme", "{service}", roles.APP, "acme"),
    Identity("the service as nobody", "{service}", roles.APP, "nobody"),
    Identity("the service without a tenant", "{service}", roles.APP),
    Identity("the service with an empty tenant", "{service}", roles.APP, ""),
    Identity("the service that forgot its role", "{service}", None, "umbral"),
    Identity("an analyst of acme", "{analyst}"),
    Identity("an analyst of acme that names another tenant", "{analyst}", None, "umbral"),
    Identity("an analyst of nothing", "{idle}"),
    Identity("somebody with a login", "{outsider}", None, "umbral"),
]
"""Not the worker, which sees the state of every tenant's documents, nor the owner and the backup, which see all."""


@pytest.fixture(scope="module")
def logins(cluster) -> Iterator[dict[str, str]]:
    """Logins of the cluster for these identities."""
    made = {name: f"{name}_{secrets.token_hex(4)}" for name in ("analyst", "idle", "outsider")}
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        for login in made.values():
            admin.execute(sql.SQL("create role {} login").format(sql.Identifier(login)))
        for name in ("analyst", "idle"):
            admin.execute(sql.SQL("grant pgrecall_analyst to {}").format(sql.Identifier(made[name])))
        yield {**made, "service": local.SERVICE}
        for login in made.values():
            admin.execute(sql.SQL("drop role {}").format(sql.Identifier(login)))


class Client:
    """A session that takes an identity for one statement and forgets what it did."""

    def __init__(self, world: World, logins: dict[str, str]) -> None:
        self.logins, self.shared = logins, world.shared
        self.connection = psycopg.connect(world.cluster.url(world.name), autocommit=True)
        self.connection.execute("insert into analyst_tenants values (%s, 'acme')", (logins["analyst"],))

    def tell(self, identity: Identity, statement: str) -> tuple[Any, str]:
        """The rows as text, their number or the error; and what umbral's rows were afterwards. It is undone."""
        login = identity.login.format(**self.logins)
        with self.connection.transaction(force_rollback=True):
            self.connection.execute(sql.SQL("set local session authorization {}").format(sql.Identifier(login)))
            if identity.role is not None:
                self.connection.execute(sql.SQL("set local role {}").format(sql.Identifier(identity.role)))
            if identity.tenant is not None:
                self.connection.execute("select set_config('pgrecall.tenant_id', %s, true)", (identity.tenant,))
            given: Any
            try:
                with self.connection.transaction():
                    cursor = self.connection.execute(statement.encode())
                    given = sorted(map(repr, cursor.fetchall())) if cursor.description else cursor.rowcount
            except psycopg.Error as error:
                given = (error.sqlstate, error.diag.message_primary, error.diag.message_detail)
            self.connection.execute("reset role")
            self.connection.execute("reset session authorization")
            return given, self.foreign()

    def foreign(self) -> str:
        """All rows of umbral, digested."""
        if not hasattr(self, "_digests"):
            tables = self.connection.execute(BEARING).fetchall()
            each = sql.SQL(
                "select {name} || md5(coalesce(string_agg(t::text, '|' order by t::text), '')) from {table} t "
                "where tenant_id = 'umbral'"
            )
            self._digests = sql.SQL(" union all ").join(
                each.format(name=sql.Literal(name), table=sql.Identifier(name)) for (name,) in tables
            )
        return repr(self.connection.execute(self._digests).fetchall())


@pytest.fixture
def clients(pair, logins) -> Iterator[tuple[Client, Client]]:
    with contextlib.ExitStack() as stack:
        made = tuple(Client(world, logins) for world in pair)
        for each in made:
            stack.callback(each.connection.close)
        yield made  # type: ignore[misc]  # two


def statements(client: Client) -> list[str]:
    """What is tried on every relation: read it, count it, take umbral's rows, spoil them, push rows to umbral."""
    found = []
    bearing = {name for (name,) in client.connection.execute(BEARING).fetchall()}
    for (name,) in client.connection.execute(RELATIONS).fetchall():
        found += [f"select t::text from {name} t", f"select count(*) from {name}"]
        columns = f"select from pg_attribute where attrelid = '{name}'::regclass and attname = 'tenant_id'"
        if client.connection.execute(columns.encode()).fetchone() is not None:
            found += [
                f"select t::text from {name} t where tenant_id = 'umbral'",
                f"update {name} set tenant_id = tenant_id where tenant_id = 'umbral'",
                f"update {name} set tenant_id = 'umbral'",
                f"delete from {name} where tenant_id = 'umbral'",
            ]
        if name in bearing:
            found += [f"delete from {name}", f"insert into {name} select * from {name}", f"truncate {name} cascade"]
    return found


def leaking(clients: tuple[Client, Client], identity: Identity, several: list[str]) -> list[str]:
    """Those of these statements that touch something of umbral, show its mark or tell whether it is there."""
    both, alone = clients
    before = both.foreign()
    found = []
    for statement in several:
        given, after = both.tell(identity, statement)
        shown = after != before or MARK in repr(given).lower()
        of_all = any(f"from {name}" in statement for name in GLOBAL)
        if shown or (not of_all and given != alone.tell(identity, statement)[0]):
            found.append(statement)
    return found


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda each: each.name)
def test_a_relation_shows_nothing_of_another_tenant_and_lets_nothing_of_it_be_touched(clients, identity):
    several = statements(clients[0])
    assert len(several) > 50
    assert leaking(clients, identity, several) == []


def test_a_view_that_nobody_thought_of_is_tried_and_found_to_leak(clients):
    for each in clients:
        each.connection.execute("create view novel as select tenant_id, content from documents")
        each.connection.execute("grant select on novel to pgrecall_app")
    several = [each for each in statements(clients[0]) if "novel" in each]
    found = leaking(clients, IDENTITIES[0], several)
    assert {"select t::text from novel t", "select count(*) from novel"} <= set(found)


def test_every_function_has_a_recipe(clients):
    def found() -> set[str]:
        return {name for (name,) in clients[0].connection.execute(FUNCTIONS).fetchall()}

    assert found() == CALLS.keys()
    clients[0].connection.execute("create function novel() returns bigint language sql return 1")
    assert found() - CALLS.keys() == {"novel"}


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda each: each.name)
def test_a_function_shows_nothing_of_another_tenant_and_touches_nothing_of_it(clients, identity):
    keyed = "select array_agg(distinct chunk_key)::text from documents"
    (keys,) = clients[0].connection.execute(keyed).fetchone()
    several = [each.replace("{keys}", f"'{keys}'::text[]") for calls in CALLS.values() for each in calls]
    assert leaking(clients, identity, several) == []


def test_the_worker_sees_the_state_of_documents_and_nothing_that_is_in_them(clients):
    both, _ = clients
    worker = Identity("the worker", "{service}", roles.WORKER)
    before = both.foreign()
    for statement in statements(both):
        given, after = both.tell(worker, statement)
        assert after == before, statement
        assert MARK not in repr(given).lower().replace(f"refused {MARK}", ""), statement
    seen = "select tenant_id, id, state, error from sources where tenant_id = 'umbral' and state = 'failed'"
    assert len(both.tell(worker, seen)[0]) == 3

"""Every revision up, down and up again with two tenants' rows in every table, and mended after a build that was killed.

The revisions are those of the script directory: a new one cannot be left out.
"""

import io
import re
import secrets
import threading
import time

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy.exc import OperationalError

from app import local, schema
from tests.conftest import DIMENSIONS, PATIENCE, passwords, settings_for
from tests.migration.catalogue import difference, rows, snapshot, tables

CONFIG = schema.config(settings_for(None, "http://127.0.0.1:9/v1"))
SCRIPTS = list(reversed(list(ScriptDirectory.from_config(CONFIG).walk_revisions())))
BEFORE = {script.revision: script.down_revision or "base" for script in SCRIPTS}

TENANTS = ("acme", "umbra")

VALUES = {
    "id": "a",
    "chunk_key": "k",
    "state": "ready",
    "embedding_origin": "pgrecall",
    "input_type": "document",
    "analyst": "jane",
    "content": "The pump is primed before the first run.",
    "chunk_keys": ["k"],
    "start_offsets": [0],
    "scopes": ["read"],
}
"""What a column of this name holds in the rows put here, where its type alone does not say what it may hold."""

BY_TYPE = {
    "text": "text",
    "text[]": ["text"],
    "integer": 3,
    "smallint": 3,
    "bigint": 3,
    "real": 0.5,
    "double precision": 0.5,
    "boolean": True,
    "jsonb": '{"lang": "en"}',
    "bytea": b"\x01" * 32,
    "timestamp with time zone": "2026-11-26T12:00:00Z",
    "uuid": "8f0a1c3e-0f5d-4d8a-9a53-0c2f1a7e9b11",
    "vector": str([0.5] * DIMENSIONS),
    f"vector({DIMENSIONS})": str([0.5] * DIMENSIONS),
    "tsvector": "'pump':2",
    "integer[]": [0],
    "interval": "1 hour",
    "date": "2026-11-26",
}


@pytest.fixture
def empty(cluster):
    """A database with roles and extensions and nothing else; its name."""
    name = f"test_{secrets.token_hex(6)}"
    local.bootstrap(cluster.admin, name)
    passwords(cluster)
    yield name
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def settings(cluster, empty):
    return settings_for(None, "http://127.0.0.1:9/v1", migration_url=cluster.url(empty, local.OWNER))


@pytest.fixture
def config(settings):
    return schema.config(settings)


@pytest.fixture
def owner(settings):
    with psycopg.connect(settings.migration_url, autocommit=True) as connection:
        yield connection


def fill(connection):
    """A row of each of two tenants in every table that has tenants' rows, unless it has some already."""
    waiting = {table: columns for table, columns in tables(connection).items() if "tenant_id" in columns}
    while waiting:
        refused = {}
        for table, columns in waiting.items():
            name = sql.Identifier(table)
            insert = sql.SQL("insert into {} ({}) values ({})").format(
                name,
                sql.SQL(", ").join(map(sql.Identifier, columns)),
                sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
            )
            for tenant in TENANTS:
                own = {"tenant_id": tenant, "prefix": f"{tenant:a<8}"}
                values = [(own | VALUES).get(name, BY_TYPE[kind]) for name, kind in columns.items()]
                has = sql.SQL("select from {} where tenant_id = %s").format(name)
                if connection.execute(has, (tenant,)).fetchone() is not None:
                    continue
                try:
                    connection.execute(insert, values)
                except psycopg.errors.ForeignKeyViolation as error:
                    refused[table] = error
        assert len(refused) < len(waiting), refused
        waiting = {table: waiting[table] for table in refused}


def held(connection, known=None):
    """Every table's columns and rows; of the columns that `known` has, where it is given."""
    found = {}
    for table, columns in tables(connection).items():
        kept = [name for name in columns if known is None or name in known.get(table, ({},))[0]]
        found[table] = ({name: columns[name] for name in kept}, rows(connection, table, kept))
    return found


def lost(before, after):
    """What `before` holds and `after` does not: tables, columns, and tables whose rows are others."""
    for table, (columns, had) in before.items():
        if table not in after:
            yield table
        elif gone := set(columns) - set(after[table][0]):
            yield from (f"{table}.{name}" for name in sorted(gone))
        elif had != after[table][1]:
            yield f"rows of {table}: {had} became {after[table][1]}"


def stated(revision, root):
    """What docs/deploy.md says in backticks of a revision: in what it contracts, and in what its downgrade drops."""
    row = re.search(rf"^\| {revision} \|(.*)\|$", (root / "docs/deploy.md").read_text(), re.MULTILINE)
    assert row, f"docs/deploy.md says nothing of revision {revision}"
    _, step, *_, drops = row[1].split("|")
    expands, _, contracts = step.partition("contract")
    assert expands.strip().startswith("expand")
    return [sorted(set(re.findall(r"`([a-z_.]+)`", part))) for part in (contracts, drops)]


NAMES = """
select c.relname from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'i')
union
select c.relname || '.' || a.attname from pg_class c join pg_attribute a on a.attrelid = c.oid
 where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped
union
select p.oid::regprocedure::text from pg_proc p where p.pronamespace = 'public'::regnamespace
"""
"""What code may name."""


def names(connection):
    return {name for (name,) in connection.execute(NAMES)}


@pytest.mark.parametrize("revision", BEFORE)
def test_up_down_and_up_again_with_rows_in(revision, config, settings, owner, root):
    url, before = settings.migration_url, BEFORE[revision]
    if before != "base":
        command.upgrade(config, before)
    fill(owner)
    contracts, drops_stated = stated(revision, root)
    bare, old, named = snapshot(url), held(owner), names(owner)
    command.upgrade(config, revision)
    assert sorted(named - names(owner)) == contracts
    assert list(lost(old, held(owner, old))) == []
    fill(owner)
    made, full = snapshot(url), held(owner)
    new = {name for table, (columns, _) in full.items() for name in [table, *(f"{table}.{c}" for c in columns)]}
    new -= {name for table, (columns, _) in old.items() for name in [table, *(f"{table}.{c}" for c in columns)]}
    drops = {name for name in new if "." not in name or name.partition(".")[0] not in new}
    assert sorted(drops) == drops_stated

    command.downgrade(config, before)
    if before != "base":
        assert difference(bare, snapshot(url)) == {}
    down = held(owner)
    assert sorted(lost(full, held(owner, full))) == sorted(drops)
    assert list(lost(old, down)) == []

    command.upgrade(config, revision)
    assert difference(made, snapshot(url)) == {}
    assert list(lost(old, held(owner, old))) == []


def printed(settings, way, revision):
    """The SQL of one step."""
    config = schema.config(settings)
    config.output_buffer = io.StringIO()
    step = f"{BEFORE[revision]}:{revision}" if way == "upgrade" else f"{revision}:{BEFORE[revision]}"
    getattr(command, way)(config, step, sql=True)
    return config.output_buffer.getvalue()


BUILT = re.compile(r"create (?:unique )?index concurrently if not exists (\S+) on (\S+)", re.IGNORECASE)

BUILDING = [
    (way, script.revision, BUILT.findall(printed(settings_for(None, "http://127.0.0.1:9/v1"), way, script.revision)))
    for script in SCRIPTS
    for way in ("upgrade", "downgrade")
    if (script.revision, way) != ("0001", "downgrade") and script.down_revision is not None
]
"""What each step of the stairs builds beside readers and writers: name and table of each index."""


@pytest.mark.parametrize(
    ("way", "revision", "built"), [pytest.param(*each, id=" ".join(each[:2])) for each in BUILDING if each[2]]
)
def test_what_a_killed_build_left_is_made_anew(way, revision, built, config, settings, owner, cluster, empty, contrib):
    names = [name for name, _ in built if contrib or not re.search("(labels|metadata)_idx$", name)]
    before = BEFORE[revision] if way == "upgrade" else revision
    after = revision if way == "upgrade" else BEFORE[revision]
    command.upgrade(config, before)
    fill(owner)
    step = getattr(command, way)

    # The end of a build waits for snapshots that are older, without a lock of theirs: there it is killed.
    with psycopg.connect(settings.migration_url) as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("select")
        killed = []
        migrating = threading.Thread(target=lambda: killed.append(_error(step, config, after)))
        migrating.start()
        with psycopg.connect(cluster.url(empty), autocommit=True) as admin:
            waiting = (
                "select pg_terminate_backend(pid) from pg_stat_progress_create_index "
                "where datname = current_database() and lockers_total > lockers_done"
            )
            while not admin.execute(waiting).fetchall():
                assert migrating.is_alive(), killed
                time.sleep(0.02)
        migrating.join(PATIENCE)
    assert isinstance(killed[0], OperationalError)
    assert invalid(owner) == [built[0][0]]
    step(config, after)
    assert invalid(owner) == []
    whole = snapshot(settings.migration_url)

    if way == "upgrade":  # as though each of them had been left, and the revision not been written
        with psycopg.connect(cluster.url(empty), autocommit=True) as admin:
            admin.execute("update pg_index set indisvalid = false where indexrelid = any (%s::regclass[])", (names,))
            admin.execute("update pgrecall_revision set version_num = %s", (before,))
        assert invalid(owner) == sorted(names)
        step(config, after)
        assert difference(whole, snapshot(settings.migration_url)) == {}


def invalid(connection):
    statement = "select indexrelid::regclass::text from pg_index where not indisvalid order by 1"
    return [name for (name,) in connection.execute(statement)]


def _error(step, config, revision):
    try:
        step(config, revision)
    except Exception as error:  # noqa: BLE001  whatever ends it is looked at
        return error
    return None


KEEPS_APART = re.compile(r"^(?!comment on)(?!--).*\b(policy|grant|revoke|view|row level security)\b", re.IGNORECASE)


@pytest.mark.parametrize("revision", [each for each in BEFORE if each > "0007"])
def test_what_keeps_tenants_apart_changes_in_the_transaction_that_writes_the_revision(revision):
    """A service compares it with what the revision says; what is concurrent therefore comes first in a migration."""
    *earlier, last = (
        printed(settings_for(None, "http://127.0.0.1:9/v1"), "upgrade", revision).strip().split("COMMIT;")[:-1]
    )
    assert f"version_num='{revision}'" in last
    assert [line for part in earlier for line in part.splitlines() if KEEPS_APART.search(line)] == []

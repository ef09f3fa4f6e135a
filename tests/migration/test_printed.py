"""What `--sql` prints, as a DBA runs it: by psql, one revision at a time, up and down, and again where it was cut off."""

import io
import re
import secrets
import shutil
import subprocess

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from psycopg import sql

from app import isolation, local, schema
from tests.conftest import NEEDS_CONTRIB, cloned, passwords, settings_for, statements
from tests.migration.catalogue import difference, snapshot

CONFIG = schema.config(settings_for(None, "http://127.0.0.1:9/v1"))
STEPS = [
    (script.down_revision or "base", script.revision)
    for script in reversed(list(ScriptDirectory.from_config(CONFIG).walk_revisions()))
]


@pytest.fixture
def empty(cluster):
    """A database with roles and extensions and nothing else; its name."""
    name = f"test_{secrets.token_hex(6)}"
    local.bootstrap(cluster.admin, name)
    passwords(cluster)
    yield name
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def printed(way, from_, to):
    config = schema.config(settings_for(None, "http://127.0.0.1:9/v1"))
    config.output_buffer = io.StringIO()
    getattr(command, way)(config, f"{from_}:{to}", sql=True)
    return config.output_buffer.getvalue()


def by_psql(url, text):
    """Run it as docs/deploy.md says."""
    return subprocess.run(
        ["psql", url, "-v", "ON_ERROR_STOP=1", "-qf", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def psql(contrib):
    if shutil.which("psql") is None:
        pytest.skip("there is no psql")
    if not contrib:
        pytest.skip(NEEDS_CONTRIB)


def test_psql_goes_up_and_down_step_by_step_as_alembic_does(psql, cluster, template, empty):
    url = cluster.url(empty, local.OWNER)
    with cloned(cluster, template) as other:
        online = cluster.url(other, local.OWNER)
        config = schema.config(settings_for(None, "http://127.0.0.1:9/v1", migration_url=online))
        command.downgrade(config, "base")
        found = {}
        for before, revision in STEPS:
            command.upgrade(config, revision)
            found[revision] = snapshot(online)
            done = by_psql(url, printed("upgrade", before, revision))
            assert done.returncode == 0, done.stderr
            assert difference(found[revision], snapshot(url)) == {}, revision
    for before, revision in reversed(STEPS):
        done = by_psql(url, printed("downgrade", revision, before))
        assert done.returncode == 0, done.stderr
        if before != "base":
            assert difference(found[before], snapshot(url)) == {}, before
    with psycopg.connect(url) as owner:
        assert owner.execute("select to_regclass('sources'), to_regproc('learn_terms')").fetchone() == (None, None)


def test_what_is_printed_stops_where_another_migration_runs(psql, cluster, empty):
    url = cluster.url(empty, local.OWNER)
    with psycopg.connect(url) as other:
        other.execute("select pg_advisory_lock(%s)", (isolation.MIGRATOR_LOCK,))
        done = by_psql(url, printed("upgrade", "base", "0001"))
        assert done.returncode == 3
        assert "another migration is running" in done.stderr
        assert other.execute("select to_regclass('sources')").fetchone() == (None,)


def cuts(several):
    """After how many statements something is kept if the session ends there: a transaction that is open is not."""
    inside = False
    for number, statement in enumerate(several, 1):
        words = re.sub(r"^\s*--.*$", "", statement, flags=re.MULTILINE).strip().lower()
        inside = words == "begin" or (inside and words != "commit")
        if not inside and not words.startswith(
            ("set ", "select set_config", "select pg_advisory", "do $$ begin\n    if not pg_try")
        ):
            yield number


CUT = [
    step
    for step in [("upgrade", *step) for step in STEPS] + [("downgrade", to, from_) for from_, to in STEPS[1:]]
    if len([*cuts(statements(printed(*step), contrib=True))]) > 1
]
"""The steps that are more than one transaction: of the others a cut leaves nothing."""


@pytest.mark.parametrize(("way", "from_", "to"), CUT)
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.long)], ids=["one cut", "every cut"])
def test_what_was_cut_off_is_run_again_from_the_start(cluster, empty, contrib, way, from_, to, thorough):
    """Each cut in a clone of its own, then the whole once more, as docs/deploy.md says: the schema is the same."""
    if from_ != "base":
        settings = settings_for(None, "http://127.0.0.1:9/v1", migration_url=cluster.url(empty, local.OWNER))
        command.upgrade(schema.config(settings), from_)
    several = statements(printed(way, from_, to), contrib)
    *places, _ = cuts(several)
    with cloned(cluster, empty) as name:
        run(cluster.url(name, local.OWNER), several)
        whole = snapshot(cluster.url(name, local.OWNER))
    for place in places if thorough else [places[len(places) // 2]]:
        with cloned(cluster, empty) as name:
            url = cluster.url(name, local.OWNER)
            run(url, several[:place])
            run(url, several)
            assert difference(whole, snapshot(url)) == {}, several[place - 1]


def run(url, several):
    """Run these in a session, one at a time, and end it."""
    with psycopg.connect(url, autocommit=True) as owner:
        for statement in several:
            owner.execute(statement.encode())
        owner.execute("select pg_advisory_unlock_all()")

"""Migrations of a database that is being served: no request fails, nobody is unready, no lock is waited for without end."""

import contextlib
import functools
import itertools
import re
import secrets
import subprocess
import threading
import time

import psycopg
import pytest
from alembic.script import ScriptDirectory
from psycopg import sql

from app import local, schema
from tests.conftest import PATIENCE, passwords, settings_for
from tests.migration.traffic import Traffic, seed, serving

WAITS_FOR_SNAPSHOTS = """
select from pg_locks where locktype = 'virtualxid' and not granted
   and pid in (select pid from pg_stat_activity where datname = current_database())
"""
"""The end of a concurrent build: no request waits for it, and it for as long as need be."""

REVISIONS = [
    script.revision
    for script in reversed(
        list(ScriptDirectory.from_config(schema.config(settings_for(None, "http://127.0.0.1:9/v1"))).walk_revisions())
    )
]


@contextlib.contextmanager
def reading(url):
    """Somebody whose transaction has read every table and is left open; a moment before the end it is closed."""
    with psycopg.connect(url) as reader:
        tables = reader.execute(
            "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'"
        ).fetchall()
        reader.execute(
            sql.SQL("lock table {} in access share mode").format(
                sql.SQL(", ").join(sql.Identifier(t) for (t,) in tables)
            )
        )
        yield


def in_thread(work):
    """Start work; its error, or None, is in the list once the thread has ended."""
    ended = []

    def run():
        try:
            work()
        except Exception as error:  # noqa: BLE001  looked at by the caller
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def migrate_past_a_reader(url, work):
    """Migrate beside a transaction that was left open: what needs its locks gives up by itself; then once more. Whether."""
    with reading(url), psycopg.connect(url, autocommit=True) as looking:
        thread, ended = in_thread(work)
        began = time.monotonic()
        while thread.is_alive() and looking.execute(WAITS_FOR_SNAPSHOTS).fetchone() is None:
            assert time.monotonic() - began < PATIENCE, "the migration waits for a lock that is not to be had"
            time.sleep(0.05)
    thread.join(PATIENCE)
    assert ended, "the migration never ended"
    if ended[0] is not None:
        assert ended[0].__cause__.__cause__.orig.sqlstate == "55P03", ended[0]  # lock_timeout, no deadlock
        work()
    return ended[0] is not None


@functools.cache
def commit_of(root, revision):
    """The last commit that has the migrations up to this one and no more; None where the history has none.

    Of several the one comes first of whose migrations the most are today's to the letter: they may have been mended since.
    """
    git = ["git", "-C", str(root)]

    def migrations(commit):
        """Names of the files, each with its hash."""
        listed = subprocess.check_output([*git, "ls-tree", commit, "migrations/versions/"], text=True).splitlines()
        return {line.rpartition("/")[2]: line.split()[2] for line in listed if line.endswith((".py", ".sql"))}

    today = {name: blob for name, blob in migrations("HEAD").items() if name[:4] <= revision}
    commits = [
        subprocess.check_output([*git, "rev-list", *how, "HEAD"], text=True).split() for how in (["--first-parent"], [])
    ]
    most, best = -1, None
    for commit in dict.fromkeys(itertools.chain(*commits)):  # what was merged before what was on the way to a merge
        found = migrations(commit)
        if found.keys() == today.keys() and (alike := len(found.items() & today.items())) > most:
            most, best = alike, commit
            if found == today:
                break
    return best


def code_of(root, revision):
    """The commit whose code a database at this revision is served by; None where the history has none.

    Where no commit stopped at this revision, as where a merge brought two, it is that of the next one, if it asks for no
    more than this one: it served such a database too.
    """
    if (commit := commit_of(root, revision)) is not None:
        return commit
    if (commit := commit_of(root, REVISIONS[REVISIONS.index(revision) + 1])) is not None:
        shown = ["git", "-C", str(root), "show", f"{commit}:app/schema.py"]
        required = re.search(r'^REQUIRED = "(\d+)"', subprocess.check_output(shown, text=True), re.MULTILINE)
        return commit if required and required[1] <= revision else None
    return None


@pytest.mark.parametrize("served", [*(pytest.param(each, marks=pytest.mark.long) for each in REVISIONS[:-1]), "newest"])
def test_the_previous_releases_code_serves_while_its_database_is_migrated(
    served, cluster, openai, tmp_path, root, capsys
):
    """The code whose newest revision was `served`, through the next migration, then through all that came after."""
    if not (root / ".git").exists():
        pytest.skip("this is no clone: the previous release's code is taken from git")
    if served == "newest":
        served = next((each for each in reversed(REVISIONS[:-1]) if commit_of(root, each)), REVISIONS[-2])
    commit, following = code_of(root, served), REVISIONS[REVISIONS.index(served) + 1]
    if commit is None:
        pytest.skip(f"the history has no commit that serves a database at {served}")
    name = f"test_{secrets.token_hex(6)}"
    local.bootstrap(cluster.admin, name)
    passwords(cluster)
    code = tmp_path / "code"
    code.mkdir()
    (tmp_path / "code.tar").write_bytes(subprocess.check_output(["git", "-C", str(root), "archive", commit]))
    subprocess.run(["tar", "-x", "-C", str(code), "-f", str(tmp_path / "code.tar")], check=True)
    url = cluster.url(name, local.OWNER)
    settings = settings_for(None, openai.url, migration_url=url)
    schema.migrate(settings, served)
    seed(url)
    try:
        with (
            serving(tmp_path, code, cluster.url(name, local.SERVICE), openai.url) as address,
            Traffic(address) as traffic,
        ):
            traffic.wait(2)
            usual = traffic.slowest()
            told = []
            for revision in dict.fromkeys((following, "head")):
                began = time.monotonic()
                waited = migrate_past_a_reader(url, lambda to=revision: schema.migrate(settings, to))
                traffic.wait(1)
                told.append((revision, time.monotonic() - began, waited, traffic.slowest(began), len(traffic.faults())))
            counts = traffic.count()
    finally:
        with psycopg.connect(cluster.admin, autocommit=True) as admin:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
    with capsys.disabled():
        for revision, seconds, waited, slowest, failed in told:
            print(
                f"\n{commit[:7]} at {served} -> {revision}: {seconds:.1f} s, gave up once: {waited}, slowest {slowest:.2f} s "
                f"(before: {usual:.2f}), {failed} of {sum(counts.values())} failed; {counts}"
            )
    assert traffic.faults() == []

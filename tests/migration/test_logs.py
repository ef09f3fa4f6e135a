"""What migrations log: a record for each step, and one for what stopped them."""

import json
import logging
import os
import secrets
import subprocess
import sys

import psycopg
import pytest
from alembic import command
from alembic.util import CommandError
from psycopg import sql

from app import local, schema
from tests.conftest import DIMENSIONS, PATIENCE, passwords, settings_for


@pytest.fixture
def owner_url(cluster):
    """A database with roles and extensions and nothing else, as its owner."""
    name = f"test_{secrets.token_hex(6)}"
    local.bootstrap(cluster.admin, name)
    passwords(cluster)
    yield cluster.url(name, local.OWNER)
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def run(root, owner_url, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PGRECALL_", "OPENAI_", "DATABASE_"))} | {
        "PGRECALL_MIGRATION_URL": owner_url,
        "PGRECALL_LOG_FORMAT": "json",
        "PGRECALL_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
        "OPENAI_API_KEY": "sk-marked",
    }
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_each_step_is_an_object_by_alembic_and_by_pgrecall_and_so_is_what_stops_one(root, owner_url, caplog):
    first = run(root, owner_url, "alembic", "upgrade", "0002")
    assert (first.returncode, first.stdout) == (0, "")
    rest = run(root, owner_url, "app", "migrate", "--json")
    assert rest.returncode == 0
    head = schema.head()
    assert json.loads(rest.stdout) == {"revision": head, "migrated": True}
    steps = [json.loads(line) for line in (first.stderr + rest.stderr).splitlines()]
    assert {(step["message"], step["direction"], step["level"]) for step in steps} == {("migrated", "upgrade", "info")}
    assert [step["from"] for step in steps] == ["base"] + [step["revision"] for step in steps[:-1]]
    assert steps[-1]["revision"] == head
    assert steps[0]["statements"]["create table"] >= 5
    assert steps[2]["statements"]["create index concurrently"] >= 16
    assert all(step["seconds"] >= 0 and step["statements"].get("select") is None for step in steps)

    caplog.set_level(logging.INFO)
    command.downgrade(schema.config(settings_for(None, "http://127.0.0.1:9/v1", migration_url=owner_url)), "0006")
    assert [record.facts["direction"] for record in caplog.records if record.name == "app.progress"] == [
        "downgrade"
    ] * (int(head) - 6)
    # Nothing was stopped where `check` finds something pending.
    caplog.clear()
    with pytest.raises(CommandError, match="not up to date"):
        command.check(schema.config(settings_for(None, "http://127.0.0.1:9/v1", migration_url=owner_url)))
    assert "migration stopped" not in caplog.messages
    with psycopg.connect(owner_url) as other:
        other.execute("create table embedding_claims (not_ours integer)")
    stopped = run(root, owner_url, "app", "migrate")
    assert stopped.returncode == 2
    record, told = (json.loads(line) for line in stopped.stderr.splitlines())
    assert (record["message"], record["level"], record["revision"]) == ("migration stopped", "error", "0006")
    fault = 'column "tenant_id" does not exist'
    assert (record["sqlstate"], record["error"]) == ("42703", fault)
    assert f"migration failed: {fault}" in told["message"]
    assert "sk-marked" not in first.stderr + rest.stderr + stopped.stderr


def test_printed_sql_that_nobody_reads_to_its_end_is_no_traceback(root):
    reading, writing = os.pipe()
    os.close(reading)  # as a pager does that is left
    with os.fdopen(writing, "wb") as left:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PGRECALL_", "OPENAI_", "DATABASE_"))}
        command_line = [sys.executable, "-m", "alembic", "upgrade", "base:0001", "--sql"]
        ended = subprocess.run(
            command_line, cwd=root, env=environment, stdout=left, stderr=subprocess.PIPE, check=False, timeout=PATIENCE
        )
    assert (ended.returncode, ended.stderr) == (1, b"")

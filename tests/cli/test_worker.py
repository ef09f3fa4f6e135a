"""`pgrecall worker`, `queue` and `retry` as processes of their own: killed, interrupted, drained, beside the server."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import httpx
import psycopg
import pytest

from app.__main__ import main
from tests.cli.test_commands import serving
from tests.conftest import PATIENCE, started_copy


@pytest.fixture
def environment(settings, openai):
    return {k: v for k, v in os.environ.items() if not k.startswith("PGRECALL")} | {
        "DATABASE_URL": settings.database_url,
        "OPENAI_API_KEY": "sk-test",
        "OPENAI_BASE_URL": openai.url,
        "PGRECALL_EMBEDDING_DIMENSIONS": "64",
        "PGRECALL_EMBEDDING_MODEL": "text-embedding-3-small",
        "PGRECALL_WORKER_LEASE": "3",
        "PGRECALL_WORKER_POLL": "0.3",
    }


@contextlib.contextmanager
def worker(environment, *options):
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "worker", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


WAITING = """
select from pg_locks waiting join pg_locks held using (pid)
 where not waiting.granted and held.database = (select oid from pg_database where datname = current_database())
"""
"""Somebody in this database waits for a lock of somebody else."""


def insert(owner, count, tenant="acme"):
    owner.execute(
        "insert into sources (tenant_id, id, content) select %s, 'd' || n, 'text ' || n from generate_series(1, %s) n",
        (tenant, count),
    )


def count(owner, condition):
    return owner.execute(f"select count(*) from sources where {condition}").fetchone()[0]


def test_what_a_killed_worker_held_is_finished_by_another(environment, owner, openai):
    insert(owner, 40)
    openai.delay = 2 * PATIENCE
    with worker(environment) as first:
        until(lambda: openai.embedded)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert count(owner, "claimed_by is not null and state = 'pending'") >= 32
    openai.delay = 0.0
    with worker(environment) as second:
        until(lambda: count(owner, "state = 'ready'") == 40)
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=PATIENCE) == 0
    assert owner.execute("select count(*) from documents").fetchone() == (40,)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_worker_gives_back_at_once_and_ends_well(environment, owner, openai, number):
    insert(owner, 3)
    openai.delay = 2 * PATIENCE
    with worker(environment | {"PGRECALL_WORKER_LEASE": "3600"}) as process:
        until(lambda: openai.embedded)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "3 given back" in err
    assert "Traceback" not in err
    assert count(owner, "state = 'pending' and claimed_by is null and not_before is null and attempts = 0") == 3


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_break_off_the_giving_back(environment, owner, openai, second):
    insert(owner, 3)
    openai.delay = 2 * PATIENCE
    with worker(environment | {"PGRECALL_WORKER_LEASE": "3600"}) as process:
        until(lambda: openai.embedded)
        # The rows cannot be given back until this transaction ends, so that the second signal comes in between.
        with owner.transaction():
            owner.execute("select from sources for update")
            process.send_signal(signal.SIGINT)
            until(lambda: owner.execute(WAITING).fetchone() is not None)
            process.send_signal(second)
            time.sleep(0.2)  # for it to do what it must not
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "3 given back" in err
    assert "Traceback" not in err
    assert count(owner, "state = 'pending' and claimed_by is null and not_before is null and attempts = 0") == 3


def test_once_drains_and_its_status_says_whether_all_went_well(environment, owner, openai):
    insert(owner, 40)
    insert(owner, 5, "umbra")
    openai.poison = "text 7"
    only = subprocess.run(
        [sys.executable, "-m", "app", "worker", "--once", "--tenant", "umbra", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (only.returncode, json.loads(only.stdout)["ready"]) == (0, 5)
    every = subprocess.run(
        [sys.executable, "-m", "app", "worker", "--once", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (every.returncode, json.loads(every.stdout)["ready"], json.loads(every.stdout)["parked"]) == (1, 39, 1)
    assert "given up" in every.stderr


def test_the_queue_is_listed_and_retried_from_the_command_line(environment, owner, openai, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    insert(owner, 2)
    openai.poison = "text 1"
    assert main(["worker", "--once"]) == 1
    capsys.readouterr()
    assert main(["queue", "--state", "failed", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["documents"]
    assert (listed["tenant_id"], listed["id"], listed["attempts"]) == ("acme", "d1", 1)
    assert main(["queue", "--tenant", "acme"]) == 0
    assert "refuses this text" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main(["status", "--json"]) == 0
    (tenant,) = json.loads(capsys.readouterr().out)["tenants"]
    assert (tenant["pending"], tenant["failed"], tenant["ready_last_hour"]) == (0, 1, 1)
    assert main(["status"]) == 0
    assert "pgrecall retry" in capsys.readouterr().err
    openai.poison = None
    assert main(["retry", "--tenant", "acme", "--id", "d1", "--id", "d2", "--id", "none", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"retried": 1, "not_given_up": ["d2", "none"]}
    assert main(["retry", "--tenant", "acme", "--id", "none"]) == 1
    assert "not given up, or not there at all: none" in capsys.readouterr().err
    assert main(["retry", "--tenant", "acme", "--all"]) == 0
    assert main(["worker", "--once"]) == 0
    assert count(owner, "state = 'ready'") == 2


def test_a_worker_refuses_a_database_of_another_model(environment):
    process = subprocess.run(
        [sys.executable, "-m", "app", "worker"],
        env=environment | {"PGRECALL_EMBEDDING_DIMENSIONS": "65"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert process.returncode == 2
    assert "64 dimensions" in process.stderr


def test_serve_works_off_what_is_pending_beside_the_embedded_database(tmp_path, ready_data):
    with started_copy(ready_data, tmp_path / "pg") as data, serving(data) as (process, address):
        body = {"tenant_id": "t", "content": "A heron stands in the water."}
        answer = httpx.put(f"{address}/documents/a", params={"wait": "false"}, json=body, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["state"]) == (202, "pending")
        # The fifth line says where the socket is: elsewhere when the path of the folder is too long for one.
        pgdata = tmp_path / "pg" / "postgres"
        sockets = pgdata / (pgdata / "postmaster.pid").read_text().splitlines()[4]
        with psycopg.connect(f"host={sockets} user=pgrecall_owner dbname=pgrecall") as owner:
            owner.execute(
                "insert into sources (tenant_id, id, content) values ('t', 'b', 'An otter swims in the river.')"
            )

        def states():
            page = httpx.get(f"{address}/documents", params={"tenant_id": "t"}, timeout=PATIENCE).json()
            return {document["state"] for document in page["documents"]}

        until(lambda: states() == {"ready"})
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0

"""`pgrecall sql`, `analyst` and `embed`: the way in for people who write SQL."""

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys

import psycopg
import pytest
from psycopg import sql

from app import embedded, local, psql
from app.__main__ import main
from app.settings import masked
from tests.conftest import PATIENCE, passwords


@pytest.fixture(scope="module")
def stored(data_dir, tmp_path_factory):
    """Two tenants with two documents each."""
    path = tmp_path_factory.mktemp("faq") / "faq.jsonl"
    path.write_text(
        '{"id": "password", "content": "To reset a password open the settings."}\n'
        '{"id": "invoice", "content": "Invoices are sent on the first of each month."}\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGRECALL_DATA_DIR", str(data_dir))
        for tenant in ("acme", "umbra"):
            assert main(["ingest", str(path), "--tenant", tenant]) == 0


def printed(data_dir, *arguments, files=()):
    """What the command prints that psql prints: it writes past what pytest captures of this process."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "sql", *arguments],
        env=os.environ | {"PGRECALL_DATA_DIR": str(data_dir), "PGOPTIONS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        pass_fds=files,
    )
    return done.returncode, done.stdout, done.stderr


def test_sql_opens_psql_as_the_analyst_who_reads_and_does_not_write(run, data_dir, stored):
    asked = "select session_user, count(distinct tenant_id) from documents"
    status, out, _ = printed(data_dir, "-c", asked)
    assert status == 0
    assert re.search(r"analyst +\| +2", out)
    status, _, err = printed(data_dir, "-c", "delete from documents")
    assert status == 1
    assert "permission denied for table documents" in err


def test_sql_hands_what_stands_behind_two_dashes_to_psql(run, data_dir, stored):
    asked = "select id, content from documents where tenant_id = 'acme' order by id limit 1"
    row = "invoice,Invoices are sent on the first of each month.\n"
    assert printed(data_dir, "--", "--csv", "-t", "-c", asked) == (0, row, "")
    assert printed(data_dir, "-c", asked, "--", "-qAtF,") == (0, row, "")
    assert printed(data_dir, "--owner", "--", "-Atc", "select session_user") == (0, f"{local.OWNER}\n", "")
    status, _, err = run("sql", "select")
    assert status == 2
    assert "'select' is no option; allowed: psql's options after --" in err


def test_a_file_may_be_what_the_shell_opened_for_the_command(run, data_dir, stored):
    reading, writing = os.pipe()
    os.write(writing, b"select 6 * 7")
    os.close(writing)
    with os.fdopen(reading):  # as `-f <(echo …)` hands it over
        assert printed(data_dir, "-f", f"/dev/fd/{reading}", "--", "-qAt", files=(reading,)) == (0, "42\n", "")


def test_sql_tells_a_person_where_to_begin_and_a_program_nothing(run, data_dir, stored, monkeypatch, tmp_path):
    shown = tmp_path / "psql"
    shown.write_text("#!/bin/sh\n")
    shown.chmod(0o755)
    monkeypatch.setattr(psql, "_program", lambda: str(shown))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "search_documents" in run("sql")[2]
    assert run("sql", "--", "-qAt") == (0, "", "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert run("sql") == (0, "", "")


def test_where_nothing_keeps_the_embedded_database_up_is_printed_and_that_it_is_down(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PGRECALL_DATA_DIR", str(tmp_path / "pg"))
    status, out, err = run("sql", "--print-url")
    assert (status, out.startswith(f"postgresql://{local.ANALYST}@")) == (0, True)
    assert "nothing keeps the embedded database up" in err
    with contextlib.closing(embedded.start(tmp_path / "pg")), psycopg.connect(out.strip()) as connection:
        assert connection.execute("select session_user").fetchone() == (local.ANALYST,)


def test_sql_prints_where_to_connect(run, data_dir, stored):
    for option, login in (((), local.ANALYST), (("--owner",), local.OWNER)):
        status, out, err = run("sql", "--print-url", *option)
        assert status == 0
        with psycopg.connect(out.strip()) as connection:
            assert connection.execute("select session_user").fetchone() == (login,)
        assert "up" not in err


def test_sql_without_psql_prints_where_to_connect(run, data_dir, stored, monkeypatch):
    monkeypatch.setattr(psql, "_program", lambda: None)
    status, out, err = run("sql")
    assert (status, out.startswith(f"postgresql://{local.ANALYST}@")) == (0, True)
    assert "no psql" in err


def test_sql_on_a_postgresql_of_ones_own_takes_the_url_that_is_set(run, cluster, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", cluster.url("postgres", local.SERVICE))
    status, _, err = run("sql", "--print-url")
    assert status == 2
    assert "set PGRECALL_ANALYST_URL to the URL of an analyst's login" in err
    status, _, err = run("sql", "--print-url", "--owner")
    assert status == 2
    assert "set PGRECALL_MIGRATION_URL" in err
    monkeypatch.setenv("PGRECALL_ANALYST_URL", "postgresql+psycopg://jane:secret@db/app")
    status, out, _ = run("sql", "--print-url")
    assert (status, out) == (0, "postgresql://jane:secret@db/app\n")
    assert masked("analyst_url", "postgresql://jane:secret@db/app") == "postgresql://jane:********@db/app"


def test_the_analysts_url_that_is_set_is_taken_and_no_database_started(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PGRECALL_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("PGRECALL_ANALYST_URL", "postgresql://jane@db/app")
    assert run("sql", "--print-url")[:2] == (0, "postgresql://jane@db/app\n")
    assert not (tmp_path / "none").exists()


def test_psql_is_given_the_password_where_others_do_not_see_it():
    place, environment = psql._hidden("postgresql://jane:se%20cret@db/app")
    assert "se" not in place.replace("user", "")
    assert environment["PGPASSWORD"] == "se cret"


@pytest.fixture
def login(cluster):
    name = f"jane {secrets.token_hex(4)}"
    yield name
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        if admin.execute("select from pg_roles where rolname = %s", (name,)).fetchone():
            admin.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
            admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def test_an_analyst_is_made_with_tenants_and_a_limit_and_may_be_made_again(run, cluster, database_name, owner, login):
    owner.execute(
        "insert into sources (tenant_id, id, content) select tenant, 'd', 'x' from unnest(array['acme', 'umbra', 'other']) tenant"
    )
    url = cluster.url(database_name)

    def sees():
        passwords(cluster, login)
        with psycopg.connect(cluster.url(database_name, login.replace(" ", "%20"))) as connection:
            limit = connection.execute("select current_setting('statement_timeout')").fetchone()[0]
            scan = connection.execute("select current_setting('hnsw.iterative_scan')").fetchone()[0]
            rows = connection.execute("select tenant_id from whole_documents order by 1").fetchall()
            return limit, scan, [row[0] for row in rows]

    status, out, _ = run("analyst", login, "--tenant", "acme", "--tenant", "umbra", "--statement-timeout", "0.5")
    assert status == 0
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(out)
    assert sees() == ("500ms", "strict_order", ["acme", "umbra"])
    status, _, err = run("analyst", login, "--tenant", "umbra", "--apply", "--url", url)
    assert (status, f"{login} reads umbra" in err) == (0, True)
    assert sees() == ("1min", "strict_order", ["umbra"])
    assert run("analyst", login, "--all-tenants", "--apply", "--url", url)[0] == 0
    assert sees() == ("1min", "strict_order", ["acme", "other", "umbra"])
    with psycopg.connect(cluster.url(database_name, login.replace(" ", "%20")), autocommit=True) as connection:
        connection.execute("set statement_timeout = '100ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("select pg_sleep(20)")
    status, _, err = run("analyst", login, "--revoke", "--apply", "--url", url)
    assert (status, "reads nothing any more" in err) == (0, True)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        sees()


def test_a_tenant_that_nobody_knows_is_warned_of(run, cluster, database_name, owner, login):
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'd', 'x')")
    owner.execute("insert into tenants (tenant_id) values ('registered')")
    url = cluster.url(database_name)
    several = [part for tenant in ("acme", "registered", "Acme") for part in ("--tenant", tenant)]
    status, _, err = run("analyst", login, *several, "--apply", "--url", url)
    assert (status, f"{login} reads acme, registered, Acme" in err) == (0, True)
    assert [line for line in err.splitlines() if "warning" in line] == [
        "warning: tenant Acme: has no document, and is not registered"
    ]
    assert "warning" not in run("analyst", login, "--all-tenants", "--apply", "--url", url)[2]


def test_who_may_not_make_analysts_is_told_whom_to_ask(run, cluster, database_name, owner_url, login):
    status, _, err = run("analyst", login, "--all-tenants", "--apply", "--url", owner_url)
    assert status == 2
    assert "Hand what `pgrecall analyst` prints to an administrator" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jane"], "--tenant"),
        (["jane", "--tenant", "a b"], "--tenant"),
        (["", "--all-tenants"], "login"),
        (["j" * 64, "--all-tenants"], "login"),
    ],
)
def test_analysts_that_cannot_be_made_are_refused(run, arguments, said):
    status, _, err = run("analyst", *arguments)
    assert status == 2
    assert said in err


def test_the_embedded_databases_administrator_makes_analysts_too(run, data_dir, stored):
    assert run("analyst", "june", "--tenant", "acme", "--apply")[0] == 0
    url = run("sql", "--print-url")[1].strip().replace("analyst@", "june@")
    with psycopg.connect(url) as connection:
        assert connection.execute("select distinct tenant_id from documents").fetchall() == [("acme",)]


def test_the_vector_of_a_question_is_what_a_search_takes(run, data_dir, stored):
    status, out, _ = run("embed", "I lost my password")
    assert status == 0
    assert json.loads(run("embed", "I lost my password", "--json")[1]) == json.loads(out)
    found = json.loads(run("search", "I lost my password", "--tenant", "acme", "--json")[1])["results"]
    with psycopg.connect(run("sql", "--print-url")[1].strip()) as connection:
        rows = connection.execute("select id, similarity from search_documents('acme', %s)", (out.strip(),)).fetchall()
    assert [row[0] for row in rows] == [hit["id"] for hit in found]
    assert [row[1] for row in rows] == pytest.approx([hit["similarity"] for hit in found])

"""The command line on an embedded database of its own, with the local model."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

from app import demo, erasure, local
from app.__main__ import main
from app.arguments import parser
from app.drafts import Draft
from app.errors import SetupError
from app.settings import Settings
from tests.conftest import PATIENCE


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs/deep").mkdir(parents=True)
    (tmp_path / "docs/otters.md").write_text("# Otters\n\nOtters eat fish and sleep in rafts.\n")
    (tmp_path / "docs/deep/engines.txt").write_text("The engine is started by turning the key to the right.")
    (tmp_path / "docs/.hidden.md").write_text("never read")
    (tmp_path / "docs/picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "faq.jsonl").write_text(
        '{"id": "faq/1", "content": "To reset a password open the settings.", "doc_type": "faq", "metadata": {"lang": "en"}}\n'
        "\n"
        '{"id": "faq/2", "content": "Une réponse en français.", "metadata": {"lang": "fr"}, "created_at": "2024-01-01T00:00:00Z"}\n'
    )
    return tmp_path


def test_ingest_search_ask_and_status(run, folder):
    status, out, err = run(
        "ingest", folder / "docs", folder / "faq.jsonl", "--tenant", "cli", "--metadata", '{"src": "t"}'
    )
    assert status == 0
    assert "4 created, 0 updated, 0 unchanged" in err
    status, out, err = run(
        "ingest", folder / "docs", folder / "faq.jsonl", "--tenant", "cli", "--metadata", '{"src": "t"}', "--json"
    )
    assert json.loads(out)["unchanged"] == 4

    status, out, _ = run("search", "what do otters eat?", "--tenant", "cli", "--json")
    found = json.loads(out)
    assert (status, found["results"][0]["id"], found["scan"]["strategy"]) == (0, "otters.md", "exact")
    assert found["results"][0]["metadata"] == {"src": "t"}
    status, out, _ = run("search", "password", "--tenant", "cli", "--doc-type", "faq", "--metadata", '{"lang": "en"}')
    assert "faq/1" in out
    assert "otters" not in out

    status, out, _ = run("ask", "How is the engine started?", "--tenant", "cli", "--json")
    answer = json.loads(out)
    assert answer["model"] == "extractive"
    assert answer["cited"]
    assert "turning the key" in answer["answer"]
    assert "[Source " in answer["answer"]
    status, out, _ = run("ask", "How is the engine started?", "--tenant", "cli")
    assert "deep/engines.txt" in out
    status, out, _ = run("ask", "Who won the football match in 1954?", "--tenant", "cli", "--json")
    assert json.loads(out)["cited"] == []

    status, out, _ = run("status", "--json")
    report = json.loads(out)
    assert next(t for t in report["tenants"] if t["tenant_id"] == "cli")["documents"] == 4
    assert report["embedding_model"] == "all-MiniLM-L6-v2-int8"
    url = re.search(r"'(postgresql://[^']+)'", report["psql"])[1]
    with psycopg.connect(url) as analyst:
        assert analyst.execute("select count(*) from document_chunks where tenant_id = 'cli'").fetchone() == (4,)
    status, out, _ = run("status")
    assert "cli" in out


def test_unreadable_files_and_lines_are_reported_and_the_rest_goes_on(run, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "good.txt").write_text("A readable text.")
    (tmp_path / "rows.jsonl").write_text('{"id": "r1", "content": "fine"}\n{"id": "r2"}\nnot json\n')
    status, out, err = run("ingest", tmp_path, "--tenant", "mixed", "--json")
    report = json.loads(out)
    assert (status, report["created"]) == (1, 3)
    faults = {item["path"].rpartition("/")[2]: item["fault"] for item in report["skipped"]}
    assert set(faults) == {"blank.txt", "rows.jsonl:2", "rows.jsonl:3"}
    assert "UTF-8" in report["notes"][0]["note"]
    assert "skipped" in err


def test_migrate_says_whether_there_was_anything_to_do(run):
    status, out, _ = run("migrate", "--json")
    assert status == 0
    assert json.loads(out)["revision"] == "0011"
    assert json.loads(run("migrate", "--json")[1]) == {"revision": "0011", "migrated": False}


def test_the_indexes_are_named_in_json(run):
    status, out, _ = run("index", "--json")
    (kept,) = json.loads(out)["indexes"]
    assert (status, kept["kind"], kept["state"], kept["valid"], kept["indexes"]) == (0, "full", "active", 16, 16)


def test_migrate_check_lists_what_is_pending_and_changes_nothing(data_dir, run):
    run("migrate")
    status, out, _ = run("migrate", "--check", "--json")
    current = json.loads(out)
    head = current["head"]
    assert (status, current) == (0, {"revision": head, "head": head, "pending": []})
    every = [f"{number:04}" for number in range(1, int(head) + 1)]
    with (
        contextlib.closing(local.start(Settings(data_dir=str(data_dir)))) as database,
        psycopg.connect(database.owner_url, autocommit=True) as owner,
    ):
        try:
            owner.execute("update pgrecall_revision set version_num = '0005'")
            status, out, _ = run("migrate", "--check", "--json")
            assert (status, json.loads(out)["revision"]) == (3, "0005")
            assert [step["revision"] for step in json.loads(out)["pending"]] == every[5:]
            status, out, err = run("migrate", "--check")
            assert (status, "at revision 0005; pending" in err) == (3, True)
            assert "0007  Claims on texts that are being embedded" in out
            assert owner.execute("select version_num from pgrecall_revision").fetchone() == ("0005",)
            owner.execute("delete from pgrecall_revision")
            status, out, err = run("migrate", "--check")
            assert (status, "without a schema" in err) == (3, True)
            assert [line.partition(" ")[0] for line in out.splitlines()] == every
            # A newer release was here: nothing is pending for this one.
            owner.execute("insert into pgrecall_revision values ('9999')")
            assert run("migrate", "--check")[0] == 0
        finally:
            owner.execute("delete from pgrecall_revision")
            owner.execute("insert into pgrecall_revision values (%s)", (head,))


def test_migrate_by_another_than_the_owner_says_whose_login_is_wanted(data_dir, run, monkeypatch):
    run("migrate")
    with contextlib.closing(local.start(Settings(data_dir=str(data_dir)))) as database:
        monkeypatch.setenv("DATABASE_URL", database.service_url)
        for arguments in (["migrate"], ["migrate", "--check"]):
            status, _, err = run(*arguments)
            assert status == 2
            assert "permission denied for table pgrecall_revision. Migrations are for the owner" in err
            assert "PGRECALL_MIGRATION_URL" in err


def test_roles_prints_sql_that_can_be_run_again(run, cluster):
    status, out, _ = run("roles", "--login", urlsplit(cluster.admin).username)
    assert status == 0
    assert "create role" in out
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(out.encode())
        admin.execute(out.encode())
        assert admin.execute("select count(*) from pg_roles where rolname like 'pgrecall\\_%%'").fetchone()[0] >= 4


def test_roles_apply(run, cluster):
    status, _, err = run("roles", "--apply", "--url", cluster.admin)
    assert status == 0
    assert "pgrecall_app" in err


def test_settings_show_source_and_mask_secrets(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hidden@h/d")
    status, out, _ = run("settings", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (rows["OPENAI_API_KEY"]["value"], rows["OPENAI_API_KEY"]["source"]) == ("********", "environment")
    assert rows["PGRECALL_POOL_SIZE"]["source"] == "default"
    assert "very-secret" not in out
    assert "hidden" not in out
    assert run("settings")[0] == status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "x", "--tenant", "no spaces"], "--tenant"),
        (["search", "x", "--tenant", "t", "--metadata", "{"], "--metadata"),
        (["search", "x", "--tenant", "t", "--metadata", '{"a": {"$foo": 1}}'], "$foo"),
        (["ingest", "/nowhere/at/all", "--tenant", "t"], "does not exist"),
        (["serve", "--host", "0.0.0.0"], "--insecure"),
        (["serve", "--host", "example.org"], "--insecure"),
    ],
)
def test_refusals_name_the_fault_and_exit_with_2(run, arguments, words):
    status, _, err = run(*arguments)
    assert status == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["search"], ["search", "x", "--tenant", "t", "--top-k", "0"], ["serve", "--port", "x"], []]
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("number", ["nan", "-1.5", "inf", "x"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["ingest", ".", "--tenant", "t", "--price"],
        ["model", "plan", "m", "--rate"],
        ["model", "switch", "--tolerance"],
        ["analyst", "jane", "--all-tenants", "--statement-timeout"],
        ["search", "x", "--tenant", "t", "--threshold"],
        ["ask", "x", "--tenant", "t", "--threshold"],
    ],
)
def test_a_number_that_is_none_is_refused_with_what_is_allowed(arguments, number, capsys):
    # A fall of nDCG by more than nan there is none: switch would have refused nothing.
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, number])
    assert stopped.value.code == 2
    assert f"{number!r} is not allowed; allowed: a number from " in capsys.readouterr().err


def test_a_wrong_setting_stops_with_its_name(run, monkeypatch):
    monkeypatch.setenv("PGRECALL_POOL_SIZE", "0")
    status, _, err = run("status")
    assert (status, "PGRECALL_POOL_SIZE" in err, "1 to 1000" in err) == (2, True, True)


def test_a_database_of_another_model_is_refused(run, monkeypatch, folder):
    run("migrate")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    status, _, err = run("search", "x", "--tenant", "t")
    assert status == 2
    assert "holds vectors of all-MiniLM-L6-v2-int8 with 384 dimensions" in err


def test_every_command_has_help_with_examples(capsys):
    (several,) = (action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    assert set(several.choices) == {
        "serve", "demo", "migrate", "roles", "index", "ingest", "search", "ask", "evaluate", "settings", "status",
        "worker", "queue", "retry", "model", "erase", "sql", "analyst", "embed", "tenant", "key",
    }  # fmt: skip
    for name in several.choices:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert "examples:\n  " in capsys.readouterr().out


def test_the_demo_goes_from_nothing_to_a_cited_answer_and_ingests_only_once(run, monkeypatch):
    few = [draft for draft in demo.drafts() if draft.id in ("reference/with", "reference/raise", "reference/del")]
    assert len(few) == 3
    monkeypatch.setattr(demo, "drafts", lambda: few)
    status, out, err = run("demo", "--once")
    assert status == 0
    assert "3 created" in err
    assert out.count("rank") == 3
    assert "[Source " in out
    status, out, err = run("demo", "--once")
    assert "3 unchanged; chunks: 0 embedded" in err


def test_the_demo_corpus_is_real_prose_within_the_limits():
    drafts = demo.drafts()
    assert len(drafts) > 50
    assert sum(len(draft.content) for draft in drafts) > 300_000
    assert all(isinstance(draft, Draft) for draft in drafts)


@contextlib.contextmanager
def serving(data_dir, *options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PGRECALL")} | {
        "PGRECALL_DATA_DIR": str(data_dir)
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0", *options],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stderr:
            if found := re.search(r"serving on (http://\S+),", line):
                yield process, found[1]
                break
        else:
            pytest.fail("the server ended before it served")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()


def postmaster(data_dir):
    path = data_dir / "postgres/postmaster.pid"
    return int(path.read_text().split("\n")[0]) if path.exists() else None


def test_serve_brings_a_database_along_and_ctrl_c_stops_both(tmp_path):
    with serving(tmp_path / "pg") as (process, address):
        assert httpx.get(f"{address}/health/ready").json()["status"] == "ready"
        assert postmaster(tmp_path / "pg") is not None
        body = {"tenant_id": "t", "content": "A heron stands in the water."}
        assert httpx.put(f"{address}/documents/a%2Fb", json=body, timeout=PATIENCE).status_code == 201
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0
        assert postmaster(tmp_path / "pg") is None
    with serving(tmp_path / "pg", "--workers", "2") as (process, address):
        found = httpx.post(f"{address}/search", json={"tenant_id": "t", "query": "bird"}, timeout=PATIENCE).json()
        assert [hit["id"] for hit in found["results"]] == ["a/b"]
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 0
        assert postmaster(tmp_path / "pg") is None


def test_a_killed_server_starts_again_and_has_what_it_acknowledged(tmp_path):
    with serving(tmp_path / "pg") as (process, address):
        body = {"tenant_id": "t", "content": "A heron stands in the water."}
        assert httpx.put(f"{address}/documents/a", json=body, timeout=PATIENCE).status_code == 201
        database = postmaster(tmp_path / "pg")
        os.killpg(process.pid, signal.SIGKILL)
        os.kill(database, signal.SIGKILL)
        process.wait()
        time.sleep(0.2)
    with serving(tmp_path / "pg") as (process, address):
        assert httpx.get(f"{address}/documents/a", params={"tenant_id": "t"}).json()["content"] == body["content"]
        os.killpg(process.pid, signal.SIGHUP)  # the terminal is closed
        assert process.wait(timeout=PATIENCE) == 0
    assert postmaster(tmp_path / "pg") is None


def test_several_processes_from_nothing_share_one_server(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PGRECALL")} | {
        "PGRECALL_DATA_DIR": str(tmp_path / "pg")
    }
    several = [
        subprocess.Popen(
            [sys.executable, "-m", "app", "status", "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=PATIENCE) for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], results
    assert all(json.loads(out)["revision"] == "0011" for out, _ in results)
    assert postmaster(tmp_path / "pg") is None


def test_erase_asks_first_and_says_what_went_and_what_is_left_where(run, folder, monkeypatch):
    run("ingest", folder / "docs", "--tenant", "leaving")
    status, _, err = run("erase", "--tenant", "leaving")
    assert status == 2
    assert "--yes" in err
    assert "2 documents" in err
    for typed, expected in (("another", 2), ("", 2), ("leaving", 0)):  # nothing is typed where Ctrl-D is pressed
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        status, out, err = run("erase", "--tenant", "leaving", "--id", "otters.md")
        assert status == expected
    assert "erased, nothing of it can be read any more" in " ".join(out.split())
    status, out, _ = run("erase", "--tenant", "leaving", "--yes", "--vacuum", "--json")
    report = json.loads(out)
    assert status == 0
    assert (report["complete"], report["removed"]["sources"], report["removed"]["documents"]) == (True, 1, 1)
    assert report["vacuum_seconds"] > 0
    assert report["remains"]
    assert not any(t["tenant_id"] == "leaving" for t in json.loads(run("status", "--json")[1])["tenants"])
    assert run("erase", "--tenant", "leaving", "--id", "otters.md", "--yes")[0] == 2

    def refused(url):
        raise SetupError("VACUUM is for the owner of the tables")

    monkeypatch.setattr(erasure, "vacuum", refused)
    status, out, err = run("erase", "--tenant", "leaving", "--yes", "--vacuum")
    assert status == 1
    assert "there was nothing to erase" in " ".join(out.split())
    assert "not vacuumed: VACUUM is for the owner" in err


def test_closed_standard_input_is_said_to_be_closed(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it for `<&-`
    status, _, err = run("erase", "--tenant", "leaving")
    assert (status, "--yes: is missing" in err) == (2, True)
    status, _, err = run("ingest", "-", "--format", "jsonl", "--tenant", "leaving")
    assert (status, "standard input is closed" in err) == (2, True)


def test_output_that_cannot_be_written_ends_without_a_traceback(run, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = run("status", "--json")
    assert (status, err) == (1, "pgrecall: No space left on device: where the output goes\n")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as left:
        monkeypatch.setattr(sys, "stdout", left)
        status, _, err = run("status", "--json")
    assert (status, err) == (1, "")


def test_ctrl_c_while_the_program_is_loaded_ends_without_a_traceback():
    pressed = """
import os, signal, sys
class Pressed:
    def find_spec(self, name, *_):
        if name == "app.settings":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Pressed())
import app.__main__
"""
    ended = subprocess.run([sys.executable, "-c", pressed], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True

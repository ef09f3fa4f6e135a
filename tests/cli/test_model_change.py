"""`pgrecall model` from plan to finish, on a database with an owner and a service of its own; a backfill that is killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from app.__main__ import main
from app.embedding import LocalEmbedder
from tests.conftest import DIMENSIONS
from tests.openai_server import EMBEDDINGS, embedding

WORDS = [
    "otter",
    "heron",
    "river",
    "engine",
    "invoice",
    "password",
    "harbour",
    "lantern",
    "meadow",
    "violin",
    "copper",
    "saddle",
]
NEW = "text-embedding-3-large"


def text(number):
    rng = np.random.default_rng(number)
    return f"Note {number}: " + " ".join(WORDS[place] for place in rng.integers(len(WORDS), size=6)) + "."


@pytest.fixture
def environment(settings, owner_url, openai, monkeypatch):
    values = {
        "DATABASE_URL": settings.database_url,
        "PGRECALL_MIGRATION_URL": owner_url,
        "OPENAI_BASE_URL": openai.url,
        "PGRECALL_EMBEDDING_MODEL": "text-embedding-3-small",
        "PGRECALL_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def run(environment, capsys):
    """Run a step; its exit status, standard output and standard error."""

    def _run(*arguments):
        status = main(["model", *map(str, arguments)])
        return status, *capsys.readouterr()

    return _run


@pytest.fixture
def stored(environment, tmp_path):
    """120 documents of two tenants."""
    for tenant in ("acme", "umbra"):
        file = tmp_path / f"{tenant}.jsonl"
        file.write_text("".join(json.dumps({"id": f"n{n}", "content": text(n)}) + "\n" for n in range(60)))
        assert main(["ingest", str(file), "--tenant", tenant]) == 0


def test_from_plan_to_finish(run, stored, owner, tmp_path, capsys):
    capsys.readouterr()
    planned = json.loads(run("plan", NEW, "--dimensions", 32, "--price", 0.13, "--json")[1])
    assert (planned["documents"], planned["tenants"], planned["chunks"], planned["callers"]) == (120, 2, 120, 0)
    assert planned["tokens"] > 1_000
    assert planned["cost"] == pytest.approx(planned["tokens"] * 0.13e-6)
    assert (planned["kind"], planned["obstacles"]) == ("full", [])
    assert owner.execute("select count(*) from embedding_models").fetchone() == (1,)
    status, out, _ = run("backfill", NEW, "--dimensions", 32, "--json")
    filled = json.loads(out)
    assert (status, filled["embedded"], filled["gaps"]["missing"], filled["unfinished_indexes"]) == (0, 120, 0, 0)
    assert {each["name"]: each["state"] for each in filled["models"]} == {
        "text-embedding-3-small": "active",
        NEW: "filling",
    }
    compared = json.loads(run("compare", "--sample", 20, "--json")[1])
    assert compared["queries"] == 20
    assert 0 < compared["overlap@10"] < 1
    judged = tmp_path / "judged.jsonl"
    judged.write_text(
        "".join(
            json.dumps({"query": text(n), "expected_doc_ids": [f"n{n}"], "tenant_id": "acme"}) + "\n" for n in range(20)
        )
    )
    figures = json.loads(run("compare", "--judged", judged, "--json")[1])["metrics"]
    assert (figures["ndcg@10"]["other"], figures["ndcg@10"]["this"]) == (1.0, 1.0)
    status, out, err = run("switch", "--judged", judged)
    assert status == 0, err
    assert "searches use text-embedding-3-large now" in err
    assert run("rollback")[0] == run("switch")[0] == 0
    status, out, err = run("finish", "--json")
    assert status == 0, err
    assert {each["name"]: each["state"] for each in json.loads(out)["models"]} == {
        "text-embedding-3-small": "dropped",
        NEW: "active",
    }
    assert run("finish")[0] == 0
    assert owner.execute("select distinct embedding_model from sources").fetchall() == [(NEW,)]
    shown = run()[1]
    assert "dropped" in shown
    assert "active" in shown


def test_a_model_that_finds_less_than_the_tolerance_allows_is_not_switched_to(run, stored, owner, tmp_path, capsys):
    """One number for a text: everything in its half of the line is as near as anything else."""
    capsys.readouterr()
    run("backfill", "poor-model", "--dimensions", 1)
    judged = tmp_path / "judged.jsonl"
    judged.write_text("".join(json.dumps({"query": text(n), "expected_doc_ids": [f"n{n}"]}) + "\n" for n in range(20)))
    status, _, err = run("switch", "--judged", judged, "--tenant", "acme")
    assert status == 2
    assert "nDCG@10 falls from 1.000 to 0." in err
    assert owner.execute("select name from embedding_models where state = 'active'").fetchone() == (
        "text-embedding-3-small",
    )
    assert run("switch", "--judged", judged, "--tenant", "acme", "--tolerance", 1)[0] == 0


def test_a_backfill_that_is_killed_goes_on_where_it_was(run, stored, environment, owner, openai, capsys):
    capsys.readouterr()
    # The second tenant's texts are under way when it is killed: the first's vectors are written, its own never come.
    openai.fail("hang", path=EMBEDDINGS, seconds=0)
    openai.fail("hang", path=EMBEDDINGS, seconds=100)
    command = [sys.executable, "-m", "app", "model", "backfill", NEW, "--dimensions", "32"]
    before = len(openai.embedding_calls)
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(openai.embedding_calls) < before + 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert owner.execute("select count(*) from pgrecall_run_documents").fetchone() == (60,)
    status, _, err = run("backfill", "--json")
    assert status == 0, err
    # What was written is not embedded again, only what was under way: one tenant's texts of a batch.
    assert [len(call.body["input"]) for call in openai.embedding_calls[before:]] == [60, 60, 60]
    assert run("switch")[0] == 0
    rows = owner.execute("select content, embedding::text from documents").fetchall()
    assert len(rows) == 120
    for content, vector in rows:
        assert np.allclose(np.array(vector.strip("[]").split(","), np.float32), embedding(content, 32), atol=1e-5)


def test_a_budget_stops_a_backfill_and_another_run_goes_on(run, stored, capsys):
    capsys.readouterr()
    status, out, _ = run("backfill", NEW, "--dimensions", 32, "--max-tokens", 100, "--json")
    report = json.loads(out)
    assert status == 1
    assert report["tokens"] <= 100
    assert report["gaps"]["missing"] == 120 - report["embedded"]
    assert "tokens" in report["stopped"]
    assert run("switch")[0] == 2
    assert run("backfill", "--json")[0] == 0
    assert run("switch")[0] == 0


def test_vectors_of_callers_are_left_alone_unless_their_texts_may_be_embedded(run, stored, tmp_path, capsys, owner):
    vector = embedding("anything", DIMENSIONS).tolist()
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"id": "own", "content": "A text of its own.", "embedding": vector}) + "\n")
    assert main(["ingest", str(file), "--tenant", "acme"]) == 0
    capsys.readouterr()
    status, out, _ = run("backfill", NEW, "--dimensions", 32, "--json")
    assert (status, json.loads(out)["gaps"]) == (1, {"missing": 1, "callers": 1, "extra": 0})
    assert "vectors that their callers brought" in run("switch")[2]
    assert run("backfill", "--callers")[0] == 0
    assert run("switch")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "unheard-of"), "--dimensions: is not given, and 'unheard-of' is not known here"),
        (("plan", "local", "--dimensions", "100"), "allowed: 384"),
        (("backfill",), "model: is missing"),
        (("backfill", "text-embedding-3-small", "--dimensions", "64"), "is the model already"),
        (("compare",), "there is nothing to compare"),
        (("switch",), "there is nothing to switch"),
        (("finish",), "there is nothing to finish"),
        (("abandon",), "there is nothing to abandon"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_can(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2
    assert message in err


def test_documents_with_chunks_the_new_model_does_not_read_whole_are_cut_anew(run, stored, tmp_path, capsys, owner):
    """Words without a meaning are three tokens to one model's estimate, and six to the other."""
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("qxzjvk"), 6)) for _ in range(600)]
    paragraphs = [" ".join(words[place : place + 12]).capitalize() + "." for place in range(0, 600, 12)]
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"id": "long", "content": " ".join(paragraphs), "metadata": {"a": 1}}) + "\n")
    assert main(["ingest", str(file), "--tenant", "acme"]) == 0
    places = "select chunk_keys, start_offsets, chunker from sources where id = %s"
    short = owner.execute(places, ("n1",)).fetchall()
    capsys.readouterr()
    planned = json.loads(run("plan", "local", "--json")[1])
    assert planned["too_long"] > 0
    assert any("cut anew" in note for note in planned["notes"])
    local = LocalEmbedder()
    chunks = "select content from documents where id = 'long'"
    assert max(local.count_tokens([content for (content,) in owner.execute(chunks)])) > local.max_tokens
    status, out, err = run("backfill", "local", "--json")
    assert status == 0, err
    assert json.loads(out)["gaps"] == {"missing": 0, "callers": 0, "extra": 0}
    assert max(local.count_tokens([content for (content,) in owner.execute(chunks)])) <= local.max_tokens
    assert owner.execute(places, ("n1",)).fetchall() == short
    assert run("switch")[0] == 0
    whole = owner.execute(
        "select bool_and(substring(s.content from c.start_offset + 1 for length(c.content)) = c.content), "
        "string_agg(c.content, ' ') <> '', count(*) = max(cardinality(s.chunk_keys)) "
        "from document_chunks c join sources s using (tenant_id, id) where s.id = 'long'"
    )
    assert whole.fetchone() == (True, True, True)
    rows = owner.execute("select content, embedding::text from documents where id = 'long'").fetchall()
    expected = asyncio.run(local.embed([content for content, _ in rows], "document"))
    found = np.array([vector.strip("[]").split(",") for _, vector in rows], np.float32)
    assert np.einsum("nd,nd->n", expected, found) == pytest.approx(np.ones(len(rows)), abs=0.01)

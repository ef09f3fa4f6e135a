"""`pgrecall ingest`: every format, what agrees and what is deleted, dry runs, interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from app import deferral, files
from tests.unit.test_formats import HTML, pdf


@pytest.fixture
def owner(data_dir, run):
    run("migrate")
    with psycopg.connect(f"host={data_dir / 'postgres'} user=pgrecall_owner dbname=pgrecall", autocommit=True) as made:
        yield made


@pytest.fixture
def stored(owner):
    """The documents of a tenant: by id, their columns."""

    def _stored(tenant, columns="title"):
        rows = owner.execute(
            f"select id, {columns} from sources where tenant_id = %s order by id", (tenant,)
        ).fetchall()
        return {row[0]: row[1] if len(row) == 2 else row[1:] for row in rows}

    return _stored


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "docs"
    (made / "deep/er").mkdir(parents=True)
    (made / "otters.md").write_text(
        "---\ntitle: Otters\ntype: guide\ndate: 2024-05-01\nlang: en\n---\n# Otters\n\nThey eat fish.\n"
    )
    (made / "page.html").write_bytes(HTML)
    (made / "deep/two.pdf").write_bytes(pdf("Badgers dig.", "Herons wait.", title="Animals"))
    (made / "deep/er/plain.txt").write_text("A plain text.")
    (made / "faq.csv").write_text("id;content;lang\nfaq/1;Why?;en\nfaq/2;Warum?;de\n")
    (made / ".hidden.txt").write_text("never read")
    (made / "picture.png").write_bytes(b"\x89PNG")
    (made / "loop").symlink_to(made)
    return made


def test_a_folder_of_every_format_becomes_documents(run, folder, stored):
    options = ("--tenant", "formats", "--field", "metadata.lang=lang", "--doc-type", "other", "--json")
    status, out, err = run("ingest", folder, *options)
    report = json.loads(out)
    assert (status, report["created"], report["skipped"], err.count("skipped")) == (0, 6, [], 0)
    found = stored("formats", "title, doc_type, metadata, created_at::date::text")
    assert found.keys() == {"otters.md", "page.html", "deep/two.pdf", "deep/er/plain.txt", "faq/1", "faq/2"}
    assert found["otters.md"] == ("Otters", "guide", {"lang": "en"}, "2024-05-01")
    assert found["page.html"] == ("Otters at home", "other", {"lang": "en", "author": "M. Mink"}, "2024-05-01")
    assert found["deep/two.pdf"][0] == "Animals"
    assert found["faq/2"][2] == {"lang": "de"}
    assert report["bytes"] == sum(
        p.stat().st_size
        for p in folder.rglob("*.*")
        if p.suffix in {".md", ".html", ".pdf", ".txt", ".csv"} and p.name[0] != "."
    ) - len("id;content;lang\n")
    status, out, _ = run("ingest", folder, *options)
    assert json.loads(out)["unchanged"] == 6


def test_what_cannot_be_read_is_reported_and_skipped(run, folder, stored):
    (folder / "a.pdf").write_bytes(b"%PDF-1.4 broken")
    (folder / "b.pdf").write_bytes(pdf("secret", password="p"))
    (folder / "c.txt").write_bytes(b"")
    (folder / "d.txt").write_bytes(b"zero\0byte")
    (folder / "e.txt").write_bytes("Une réponse en français, donnée à l'élève.".encode("cp1252"))
    (folder / "f.csv").write_text("content\nno id\n")
    status, out, err = run("ingest", folder, "--tenant", "damage", "--other-fields", "metadata", "--json")
    report = json.loads(out)
    faults = {item["path"].rpartition("/")[2]: item["fault"] for item in report["skipped"]}
    assert (status, faults.keys()) == (1, {"a.pdf", "b.pdf", "c.txt", "d.txt", "f.csv:2"})
    assert "encrypted" in faults["b.pdf"]
    assert "NUL" in faults["d.txt"]
    assert "note: " in err
    assert "taken for cp1252" in report["notes"][0]["note"]
    assert report["created"] == 7
    assert stored("damage", "content")["e.txt"] == "Une réponse en français, donnée à l'élève."


def test_a_name_that_is_not_utf8_is_told_in_json_too(run, tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.md")).write_text("Coffee.")
    status, out, _ = run("ingest", tmp_path, "--tenant", "named", "--json")
    (skipped,) = json.loads(out)["skipped"]
    assert (status, skipped["id"]) == (1, r"caf\udce9.md")
    assert "lone surrogate" in skipped["fault"]


def test_two_folders_with_the_same_file_do_not_overwrite_each_other(run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.txt").write_text(name)
    status, _, err = run("ingest", tmp_path / "one", tmp_path / "two", "--tenant", "twins")
    assert status == 1
    assert "same id as a file of" in err
    assert run("ingest", tmp_path / "two", "--tenant", "twins", "--prefix", "two/")[0] == 0


def test_of_two_records_of_one_id_the_later_is_kept_and_its_line_named(run, tmp_path, stored):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    lines = [json.dumps({"id": f"d{n}", "content": f"text {n}"}) for n in range(600)]
    first.write_text("\n".join([*lines, json.dumps({"id": "d0", "content": "another text"})]))
    second.write_text(json.dumps({"id": "d1", "content": "a third text"}))
    status, out, err = run("ingest", first, second, "--tenant", "records", "--json")
    places = [f"{first}:601", f"{second}:1"]
    assert (status, [each["path"] for each in json.loads(out)["notes"]]) == (0, places)
    assert f"note: {places[0]} replaces an earlier record of the same id: 'd0'" in err
    found = stored("records", "content")
    assert (len(found), found["d0"], found["d1"]) == (600, "another text", "a third text")


def test_no_more_ids_than_a_bound_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMEMBERED", 1)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"id": each, "content": "text"}) for each in "abab"))
    notes = [step.item for step in files.drafts([path], files.Reading()) if isinstance(step.item, files.Noted)]
    assert [note.path for note in notes] == [f"{path}:3"]


def test_dates_of_files_are_taken_on_demand(run, tmp_path, stored):
    (tmp_path / "a.txt").write_text("text")
    os.utime(tmp_path / "a.txt", (86_400, 86_400))
    run("ingest", tmp_path / "a.txt", "--tenant", "dates", "--date-from", "mtime")
    assert stored("dates", "created_at::date::text") == {"a.txt": "1970-01-02"}


def test_standard_input(data_dir, stored):
    environment = os.environ | {"PGRECALL_DATA_DIR": str(data_dir)}

    def piped(text, *options):
        command = [sys.executable, "-m", "app", "ingest", "-", "--tenant", "piped", *options]
        return subprocess.run(command, check=False, input=text, env=environment, capture_output=True, text=True)

    done = piped('{"id": 1, "content": "one"}\n{"id": 2, "content": "two"}\n', "--format", "jsonl", "--prefix", "n/")
    assert done.returncode == 0, done.stderr
    assert piped("# Notes\n\nText.", "--format", "markdown", "--prefix", "notes.md").returncode == 0
    assert stored("piped", "content") == {"n/1": "one", "n/2": "two", "notes.md": "# Notes\n\nText."}


def test_a_dry_run_counts_and_writes_nothing(run, folder, stored, owner):
    def rows():
        tables = ("sources", "documents", "embedding_cache", "document_terms", "term_statistics")
        return [owner.execute(f"select count(*), max(xmin::text::bigint) from {table}").fetchone() for table in tables]

    run("ingest", folder / "otters.md", folder / "deep/er", "--tenant", "dry")
    (folder / "otters.md").write_text(
        "# Otters\n\nThey eat fish. " + " ".join(f"They swim in river {n}." for n in range(200))
    )
    (folder / "copy.txt").write_text("They eat fish, all of them.")
    (folder / "copy2.txt").write_text("They eat fish, all of them.")
    before = rows()
    options = ("--tenant", "dry", "--other-fields", "ignore", "--dry-run", "--price", "0.02")
    status, out, err = run("ingest", folder, *options, "--json")
    report = json.loads(out)
    assert (status, rows()) == (0, before)
    assert (report["created"], report["updated"], report["unchanged"]) == (7, 1, 0)
    cost = report["dry_run"]
    assert cost["price"] == pytest.approx(cost["tokens"] * 0.02 / 1e6)
    run("ingest", folder / "copy.txt", folder / "copy2.txt", "--tenant", "dry")
    less = json.loads(run("ingest", folder, *options, "--json")[1])
    assert less["dry_run"]["chunks"] == cost["chunks"] - 1, "a text that comes twice is embedded once"
    status, _, err = run("ingest", folder, *options)
    assert "nothing was written. This would create 5 documents, update 1, leave 2 as they are" in err
    assert "at 0.02 a million" in err
    cost = less["dry_run"]
    report = json.loads(run("ingest", folder, *options[:4], "--json")[1])
    assert report["embedded"] == cost["chunks"] + cost["cached"]


def test_a_dry_run_knows_what_is_in_the_cache(run, folder, owner):
    run("ingest", folder / "deep", "--tenant", "known")
    owner.execute("delete from sources where tenant_id = 'known'")
    out = run("ingest", folder / "deep", "--tenant", "known", "--dry-run", "--json")[1]
    assert json.loads(out)["dry_run"] == {"cached": 2, "chunks": 0, "tokens": 0, "price": None}


@pytest.fixture
def agree(run, tmp_path):
    """A folder of 30 files and the command that makes it and a tenant agree."""
    folder = tmp_path / "handbook"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(f"Page {number} of the handbook.")

    def _agree(tenant, *options):
        arguments = ("ingest", folder, "--tenant", tenant, "--as", "handbook", "--delete-missing", "--json", *options)
        status, out, err = run(*arguments)
        return status, json.loads(out), err

    _agree.folder = folder
    return _agree


def test_delete_missing_deletes_what_came_with_the_same_name_and_is_gone(run, agree, stored, tmp_path):
    (tmp_path / "faq.txt").write_text("From elsewhere.")
    (tmp_path / "05.txt").write_text("Put by somebody else.")
    run("ingest", tmp_path / "faq.txt", "--tenant", "agree", "--as", "faq")
    assert agree("agree")[1]["created"] == 30
    run("ingest", tmp_path / "05.txt", "--tenant", "agree")  # takes 05.txt over: its metadata names no load now
    for name in ("03.txt", "04.txt", "05.txt"):
        (agree.folder / name).unlink()
    status, report, _ = agree("agree", "--dry-run")
    assert (status, report["deleted"], len(stored("agree"))) == (0, 2, 31)
    status, report, _ = agree("agree")
    assert (status, report["deleted"]) == (0, 2)
    found = stored("agree", "content")
    assert len(found) == 29
    assert {"faq.txt", "05.txt"} <= found.keys()
    assert not {"03.txt", "04.txt"} & found.keys()
    assert agree("agree")[1]["deleted"] == 0


def test_delete_missing_refuses_where_it_may_well_be_a_mistake(agree, stored):
    agree("careful")
    (agree.folder / "00.txt").unlink()
    (agree.folder / "01.txt").write_bytes(b"")
    status, report, err = agree("careful")
    assert (status, report["deleted"], len(stored("careful"))) == (1, 0, 30)
    assert "could not be read" in report["refused"]
    assert "--force" in err
    status, report, _ = agree("careful", "--force")
    assert (status, report["deleted"]) == (1, 1)
    assert "01.txt" in stored("careful"), "its file is there, only unreadable"
    (agree.folder / "01.txt").write_text("Page 1.")
    for number in range(2, 20):
        (agree.folder / f"{number:02}.txt").unlink()
    status, report, _ = agree("careful")
    assert (status, report["deleted"]) == (1, 0)
    assert "more than half" in report["refused"]
    shutil.rmtree(agree.folder)
    agree.folder.mkdir()
    status, report, _ = agree("careful")
    assert (status, report["deleted"]) == (1, 0)
    assert "right folder" in report["refused"]
    assert agree("careful", "--force")[1]["deleted"] == 29
    assert stored("careful") == {}


def test_delete_missing_needs_a_name(run, folder):
    status, _, err = run("ingest", folder, "--tenant", "t", "--delete-missing")
    assert (status, "--as NAME" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--field", "body=x"], "--field"),
        (["--separator", "ab"], "--separator"),
        (["--encoding", "nonsense"], "--encoding"),
        (["--metadata", "[]"], "--metadata"),
        (["--as", ""], "--as: is empty"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, folder, options, words):
    status, _, err = run("ingest", folder, "--tenant", "t", *options)
    assert (status, words in err) == (2, True)


@pytest.mark.parametrize(("options", "words"), [([], "--format"), (["--format", "text"], "--prefix")])
def test_standard_input_has_to_be_named(run, options, words):
    status, _, err = run("ingest", "-", "--tenant", "t", *options)
    assert (status, words in err) == (2, True)


def test_ctrl_c_leaves_whole_documents_and_the_next_run_goes_on(data_dir, tmp_path, owner, run):
    lines = (
        json.dumps({"id": f"d{n}", "content": " ".join(f"Sentence {n} {m} tells of a river." for m in range(20))})
        for n in range(1_000)
    )
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    command = ["ingest", str(tmp_path / "many.jsonl"), "--tenant", "stopped"]
    count = "select count(*) from sources where tenant_id = 'stopped'"
    with subprocess.Popen(
        [sys.executable, "-m", "app", *command],
        env=os.environ | {"PGRECALL_DATA_DIR": str(data_dir)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while owner.execute(count).fetchone()[0] < 40:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 130
    assert "goes on where this one stopped" in said
    stored = owner.execute(count).fetchone()[0]
    assert 40 <= stored < 1_000
    halves = "select count(*) from sources s where tenant_id = 'stopped' and (state <> 'ready' or cardinality(chunk_keys) <> (select count(*) from documents d where d.tenant_id = s.tenant_id and d.id = s.id))"
    assert owner.execute(halves).fetchone() == (0,)
    # Batches end in any order: what is stored, and ten more.
    there = {row[0] for row in owner.execute("select id from sources where tenant_id = 'stopped'")}
    listed = (tmp_path / "many.jsonl").read_text().splitlines()
    known = [line for line in listed if json.loads(line)["id"] in there]
    others = [line for line in listed if json.loads(line)["id"] not in there]
    (tmp_path / "many.jsonl").write_text("\n".join(known + others[:10]))
    status, out, _ = run(*command, "--json")
    report = json.loads(out)
    assert (status, report["created"], report["unchanged"]) == (0, 10, stored)


def test_defer_index_builds_the_index_afterwards(run, tmp_path, owner, monkeypatch):
    bucket = "select hashtextextended(%s, 0) & 15 not in (select hashtextextended(tenant_id, 0) & 15 from sources)"
    tenant = next(name for n in range(1_000) if owner.execute(bucket, (name := f"deferred{n}",)).fetchone() == (True,))
    lines = (
        json.dumps({"id": f"d{n}", "content": f"Text {n}.", "embedding": [n + 1.0, *[0.5] * 383]}) for n in range(30)
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = ("ingest", tmp_path / "rows.jsonl", "--tenant", tenant, "--defer-index")
    status, _, err = run(*command)
    assert (status, "does not pay" in err) == (2, True)
    monkeypatch.setattr(deferral, "WORTHWHILE", 0)
    indexes = "select count(*) from pg_indexes where indexname like 'documents_embedding_full_%'"
    monkeypatch.setattr(deferral.Deferred, "build", lambda *_: None)  # as if it ended here
    assert json.loads(run(*command, "--json")[1])["created"] == 30
    assert owner.execute(indexes).fetchone() == (15,)
    (tmp_path / "a.txt").write_text("Another document.")
    assert run("ingest", tmp_path / "a.txt", "--tenant", tenant)[0] == 0
    assert owner.execute(indexes).fetchone() == (16,)
    status, _, err = run(*command)
    assert (status, "has documents already" in err) == (2, True)


def test_max_tokens_stops_before_it_is_passed_and_the_next_run_goes_on(run, tmp_path, stored):
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"River number {number} runs to the sea. " * 5)
    command = ("ingest", tmp_path, "--tenant", "budget", "--json")
    status, out, err = run(*command, "--max-tokens", "30")
    report = json.loads(out)
    assert (status, report["created"], report["embedding"]["tokens"] <= 30) == (1, len(stored("budget")), True)
    assert "--max-tokens" in report["stopped"]
    assert "goes on where this one stopped" in err
    assert run(*command)[0] == 0
    assert json.loads(run(*command)[1])["unchanged"] == 20


def test_files_of_other_kinds_are_counted_in_one_note(tmp_path):
    for name in ("a.md", "b.png", "c/d.PNG", "e", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Text.")
    *read, note = [step.item for step in files.drafts([tmp_path], files.Reading())]
    assert [draft.id for draft in read] == ["a.md"]
    assert note.path == str(tmp_path)
    assert note.note.startswith("also: 3 files of kinds that are not read (.png 2, no ending 1)")
    assert len([*files.drafts([tmp_path], files.Reading(format="text"))]) == 4

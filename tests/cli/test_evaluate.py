"""`pgrecall evaluate` with the local model: a BEIR folder, a JSONL file, figures and floors."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from app import evaluation
from app.__main__ import main
from app.local import SERVICE
from app.settings import Settings
from tests.conftest import cloned, migrated

CORPUS = [
    {"_id": "otters", "title": "Otters", "text": "Otters eat fish and sleep in rafts on the water."},
    {"_id": "engine", "title": "", "text": "The engine is started by turning the key to the right."},
    {"_id": "bread", "title": "Baking bread", "text": "Knead the dough, let it rise for an hour, then bake it."},
    {"_id": "moon", "title": "The Moon", "text": "The Moon goes round the Earth once in 27 days."},
]
QUERIES = [
    {"_id": "q1", "text": "What do otters eat?"},
    {"_id": "q2", "text": "How do I make the car go?"},
    {"_id": "q3", "text": "How long does dough rise?"},
    {"_id": "q4", "text": "nobody judged this"},
]
BLOCK = re.compile(r"(?:`([\w.]+)`[^\n]*\n\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(\d+\.\d+)")
QRELS = [("q1", "otters", 2), ("q1", "bread", 0), ("q2", "engine", 1), ("q3", "moon", 1)]


@pytest.fixture
def url(cluster):
    with cloned(cluster, migrated(cluster, "template_local", Settings(embedder="local"))) as name:
        yield cluster.url(name, SERVICE)


@pytest.fixture
def run(url, monkeypatch, capsys):
    """Run a command; its exit status, standard output and standard error."""
    monkeypatch.setenv("DATABASE_URL", url)

    def _run(*arguments):
        status = main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return _run


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "small"
    made.mkdir()
    write(made, CORPUS, "corpus.jsonl")
    write(made, QUERIES, "queries.jsonl")
    (made / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{g}\n" for q, d, g in QRELS))
    return made


def write(path, rows, name):
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path / name


def test_a_folder_is_ingested_once_and_measured(run, folder):
    status, out, err = run("evaluate", folder, "-k", "1", "--mode", "vector", "--json")
    report = json.loads(out)
    assert status == 0
    assert "tenant eval-small: 4 created, 0 updated, 0 unchanged; chunks: 4 embedded" in err
    similarity = report["metrics"].pop("mean_similarity")
    assert 0.1 < similarity < 0.9
    # q1 and q2 are answered first, q3 is judged to want the moon
    assert report.pop("metrics") == pytest.approx({"recall@1": 2 / 3, "mrr": 2 / 3, "ndcg@1": 2 / 3})
    latency = report.pop("latency_ms")
    assert set(latency) == {"p50", "p95"}
    assert 0 < latency["p50"] <= latency["p95"]
    low, high = report.pop("intervals")["recall@1"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert report == {
        "queries": 3,
        "missing_documents": 0,
        "scans": {"exact": 3, "index": 0, "completed": 0},
    }

    status, out, err = run("evaluate", folder, "--mode", "vector")
    assert "tenant eval-small: 0 created, 0 updated, 4 unchanged" in err
    assert "small: 3 queries" in out
    for shown in ("recall@10", "mrr", "ndcg@10", "mean_similarity", "95 % interval", "latency p50", "latency p95"):
        assert shown in out
    assert "What do otters eat?" not in out


def test_vector_text_and_hybrid_stand_side_by_side_by_default(run, folder):
    status, out, _ = run("evaluate", folder, "-k", "1", "--json")
    report = json.loads(out)
    assert status == 0
    assert list(report) == ["vector", "text", "hybrid"]
    assert [each["metrics"]["mrr"] for each in report.values()] == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert "mean_similarity" in report["hybrid"]["metrics"]
    assert "mean_similarity" not in report["text"]["metrics"]  # words have none
    assert report["text"]["scans"]["text"] == 3
    out = run("evaluate", folder)[1]
    assert re.search(r"metric +┃ +vector +┃ +text +┃ +hybrid", out)
    assert re.search(r"mean_similarity +│ +0\.\d+ +│ +– +│ +0\.\d+", out)
    out = run("evaluate", folder, "--per-query")[1]
    assert "ndcg@10 of each query, worst first" in out
    assert out.index("q3") < out.index("q1")


@pytest.mark.parametrize(("modes", "embedded", "searches"), [(["text"], 0, 3), (["text", "text"], 0, 3), ([], 3, 9)])
def test_a_question_is_embedded_and_searched_no_more_than_needed(run, folder, monkeypatch, modes, embedded, searches):
    counts = {"embedded": 0, "searches": 0}

    def counted(name, module, function):
        was = getattr(module, function)

        async def call(*arguments, **options):
            counts[name] += 1
            return await was(*arguments, **options)

        monkeypatch.setattr(module, function, call)

    counted("embedded", evaluation, "question_vector")
    counted("searches", evaluation.search, "search")
    assert run("evaluate", folder, *(part for mode in modes for part in ("--mode", mode)))[0] == 0
    assert counts == {"embedded": embedded, "searches": searches}


def test_a_reranker_orders_what_each_mode_finds(run, folder, tmp_path, openai, monkeypatch):
    status, _, err = run("evaluate", folder, "--rerank")
    assert status == 2
    assert "rerank: no reranker is configured; allowed with PGRECALL_RERANK_URL and PGRECALL_RERANK_MODEL" in err
    monkeypatch.setenv("PGRECALL_RERANK_URL", openai.url)
    monkeypatch.setenv("PGRECALL_RERANK_MODEL", "bge-reranker")
    openai.relevance = lambda _, text: float("Moon" in text)
    assert json.loads(run("search", "dough", "--tenant", "eval-small", "--json")[1])["count"] == 0  # nothing was stored
    status, out, _ = run("evaluate", folder, "-k", "1", "--rerank", "--json", "--save", tmp_path / "reranked.json")
    assert status == 0
    # the moon is put first wherever it is found, which is right for q3 and wrong for the others; words do not find it
    assert [each["metrics"]["mrr"] for each in json.loads(out).values()] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert json.loads((tmp_path / "reranked.json").read_text())["text"]["setup"]["rerank"] == "bge-reranker"
    hits = json.loads(run("search", "dough", "--tenant", "eval-small", "--rerank", "--json")[1])["results"]
    assert (hits[0]["id"], hits[0]["rerank_score"]) == ("moon", 1.0)
    assert "moon" in run("ask", "How long does dough rise?", "--tenant", "eval-small", "--rerank")[1]


def test_each_query_on_demand(run, folder):
    report = json.loads(run("evaluate", folder, "--mode", "vector", "--per-query", "--json", "-k", "2")[1])
    assert [row["id"] for row in report["per_query"]] == ["q1", "q2", "q3"]
    first = report["per_query"][0]
    assert (first["query"], first["tenant_id"], first["expected"]) == ("What do otters eat?", "eval-small", ["otters"])
    assert (first["found"][0], len(first["found"]), first["recall@2"], first["mrr"]) == ("otters", 2, 1, 1)
    out = run("evaluate", folder, "--mode", "vector", "--per-query", "-k", "2")[1]
    assert out.index("q3") < out.index("q1")


def test_a_figure_under_its_floor_fails(run, folder):
    command = ("evaluate", folder, "--mode", "vector", "--fail-under", "recall@10=0.5", "--fail-under", "mrr=0.9")
    status, out, err = run(*command)
    assert status == 1
    assert "recall@10" in out
    lines = [line for line in err.splitlines() if "under" in line]
    assert len(lines) == 1
    assert lines[0].startswith("mrr is 0.")
    assert lines[0].endswith(", under 0.9")
    assert run("evaluate", folder, "--mode", "hybrid", "--fail-under", "recall@10=1")[0] == 0


def test_a_floor_holds_for_the_mode_it_names_or_for_each(run, folder):
    # by words the engine is not found: the question shares none with it
    assert run("evaluate", folder, "-k", "1", "--fail-under", "vector:mrr=0.6")[0] == 0
    status, _, err = run("evaluate", folder, "-k", "1", "--fail-under", "mrr=0.6", "--fail-under", "hybrid:mrr=0.7")
    assert status == 1
    faults = [line.split(" is ")[0] for line in err.splitlines() if "under" in line]
    assert faults == ["text:mrr", "hybrid:mrr"]
    assert run("evaluate", folder, "-k", "1", "--fail-under", "mean_similarity=0.1")[0] == 0


@pytest.mark.parametrize(
    ("floor", "fault"),
    [
        ("recall@5=0.8", "recall@10, mrr, ndcg@10, mean_similarity, also after vector:, hybrid:"),
        ("speed=0.5", "there is no 'speed'"),
        ("text:mrr=0.5", "there is no 'text:mrr'"),
    ],
)
def test_a_floor_for_a_figure_that_is_not_there_is_refused(run, folder, floor, fault):
    status, _, err = run("evaluate", folder, "--mode", "vector", "--mode", "hybrid", "--fail-under", floor)
    assert status == 2
    assert fault in err


@pytest.mark.parametrize("floor", ["recall@10", "recall@10=", "mrr=nan", "mrr=80"])
def test_a_floor_that_is_no_number_is_refused(run, folder, floor, capsys):
    with pytest.raises(SystemExit) as ended:
        run("evaluate", folder, "--fail-under", floor)
    assert ended.value.code == 2
    assert "METRIC=VALUE with a value from -1 to 1" in capsys.readouterr().err


def test_a_file_is_measured_where_its_documents_are(run, folder, tmp_path):
    run("evaluate", folder, "--tenant", "acme")
    path = write(
        tmp_path,
        [
            {"query": "What do otters eat?", "expected_doc_ids": ["otters"], "tenant_id": "acme"},
            {"query": "How do I start the car?", "expected_doc_ids": ["engine", "gone"]},
        ],
        "judged.jsonl",
    )
    status, out, err = run("evaluate", path, "--tenant", "acme", "--mode", "vector", "--json")
    report = json.loads(out)
    assert (status, report["queries"], report["missing_documents"]) == (0, 2, 1)
    assert report["metrics"]["recall@10"] == pytest.approx(0.75)
    assert f"expected documents that tenant acme does not have: 1, such as 'gone' ({path}:2)" in err


def test_documents_that_cannot_be_stored_or_do_not_belong_are_named(run, folder):
    run("evaluate", folder)
    write(folder, [*CORPUS[:3], {"_id": "empty", "text": " "}, CORPUS[3] | {"_id": "luna"}], "corpus.jsonl")
    (folder / "qrels.tsv").write_text("q1\totters\t1\nq3\tempty\t1\n")
    status, out, err = run("evaluate", folder, "--json")
    assert (status, json.loads(out)["hybrid"]["missing_documents"]) == (0, 1)
    assert "skipped empty: content: is empty" in err
    assert "documents of tenant eval-small that are not in the folder: 1;" in err
    assert "expected documents that tenant eval-small does not have: 1, such as 'empty'" in err


def test_input_at_fault_is_named_before_anything_is_stored(run, folder):
    with (folder / "qrels.tsv").open("a") as qrels:
        qrels.write("q1\tunknown\t1\n")
    status, _, err = run("evaluate", folder)
    assert status == 2
    assert f"{folder / 'qrels.tsv'}:6: 'unknown' is not in corpus.jsonl" in err
    assert json.loads(run("search", "otters", "--tenant", "eval-small", "--json")[1])["count"] == 0


def test_a_query_the_search_refuses_is_named(run, folder):
    write(folder, [*QUERIES[:2], {"_id": "q3", "text": "long " * 300}], "queries.jsonl")
    status, _, err = run("evaluate", folder)
    assert status == 2
    assert "queries.jsonl:3: has 300 tokens; allowed: 254" in err


def test_a_run_is_saved_shown_and_compared_with(run, folder, tmp_path):
    before, page = tmp_path / "before.json", tmp_path / "report.html"
    status, out, err = run("evaluate", folder, "-k", "1", "--save", before, "--json", "--per-query")
    assert json.loads(before.read_text()) == json.loads(out)
    assert f"wrote {before}" in err
    write(folder, [CORPUS[0] | {"text": "Nothing about animals."}, *CORPUS[1:]], "corpus.jsonl")
    status, out, err = run("evaluate", folder, "-k", "1", "--compare", before, "--report", page, "--json")
    report = json.loads(out)
    assert status == 0
    assert list(report) == ["vector", "text", "hybrid"]
    for mode, each in report.items():
        assert each["compared"]["setup"]["mode"] == mode
        assert each["compared"]["metrics"]["recall@1"]["difference"] <= 0
    assert report["vector"]["compared"]["metrics"]["mean_similarity"]["difference"] < 0
    assert "mean_similarity" not in report["text"]["compared"]["metrics"]
    html = page.read_text()
    for shown in ("What do otters eat?", "Compared with before.json: text", "ef_search 400", "Nothing about animals."):
        assert shown in html
    assert "hybrid against vector" in html
    out = run("evaluate", folder, "-k", "1", "--compare", before)[1]
    assert [f"{mode} compared with" in out for mode in ("vector", "text", "hybrid")] == [True] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before.json", "report.html", "small"]


def test_a_mode_is_compared_with_the_same_one_only(run, folder, tmp_path):
    before = tmp_path / "before.json"
    run("evaluate", folder, "--mode", "vector", "--save", before)
    report = json.loads(run("evaluate", folder, "--compare", before, "--json")[1])
    assert [mode for mode, each in report.items() if "compared" in each] == ["vector"]
    status, _, err = run("evaluate", folder, "--mode", "text", "--mode", "hybrid", "--compare", before)
    assert status == 2
    assert "before.json: was searched by vector; allowed: a run by text or hybrid" in err


def test_a_run_of_other_queries_is_refused_before_anything_is_stored(run, folder, tmp_path):
    run("evaluate", folder, "--save", tmp_path / "before.json")
    write(folder, [QUERIES[0] | {"text": "What do seals eat?"}, *QUERIES[1:]], "queries.jsonl")
    status, _, err = run("evaluate", folder, "--tenant", "fresh", "--compare", tmp_path / "before.json")
    assert status == 2
    assert "is a run of other queries: it lacks 'q1' ('What do seals eat?')" in err
    assert json.loads(run("search", "otters", "--tenant", "fresh", "--json")[1])["count"] == 0


@pytest.mark.parametrize("option", ["--report", "--save"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_stored(run, folder, tmp_path, option):
    for path in (tmp_path, tmp_path / "missing" / "report.html"):
        status, _, err = run("evaluate", folder, option, path)
        assert status == 2
        assert f"{option}: '{path}' cannot be written; allowed: a file in a folder that exists" in err
    assert json.loads(run("search", "otters", "--tenant", "eval-small", "--json")[1])["count"] == 0


def test_the_index_is_checked_without_judgements(run, folder):
    run("evaluate", folder)
    run("evaluate", folder, "--tenant", "other")
    status, out, err = run("evaluate", "--ann", "--sample", "6", "--json", "--fail-under", "recall@10=1")
    report = json.loads(out)
    assert (status, report["metrics"], report["queries"]) == (0, {"recall@10": 1.0}, 6)
    assert report["scans"] == {"exact": 6, "index": 0, "completed": 0}
    assert {tenant: (each["chunks"], each["queries"]) for tenant, each in report["tenants"].items()} == {
        "eval-small": (4, 3),
        "other": (4, 3),
    }
    assert set(report["latency_ms"]) == {"served", "exact"}
    status, out, err = run("evaluate", "--ann", "--tenant", "other")
    assert status == 0
    assert "scans exact" in out
    assert "every search was exact, so nothing can be lost" in err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "path: is missing; allowed: a file or folder of judged queries, or --ann"),
        (["--ann", "judged.jsonl"], "--ann: takes no path"),
        (["--ann", "--per-query"], "--ann: takes no per-query"),
        (["--ann", "--rerank"], "--ann: takes no rerank"),
        (["--ann", "--tenant", "nobody"], "--tenant: tenant nobody has no chunks to sample"),
        (["--ann", "--fail-under", "mrr=0.5"], "there is no 'mrr' with -k 10; allowed: recall@10"),
    ],
)
def test_what_does_not_go_together_is_refused(run, arguments, fault):
    status, _, err = run("evaluate", *arguments)
    assert status == 2
    assert fault in err


def comparable(text):
    """Words and figures apart, without borders, latencies and the last state of progress bars."""
    text = "".join(line for line in text.splitlines(keepends=True) if "100%" not in line)
    text = re.sub(r'[\d.]+ ms|"latency_ms":\{.*?\}', "", text)
    text = re.sub(r"[\s\u2500-\u257f]+", " ", text)
    return NUMBER.sub("", text).split(), list(map(float, NUMBER.findall(text)))


def test_every_command_of_the_page_gives_what_it_shows(url, folder, root, tmp_path):
    (tmp_path / "beir").mkdir()
    for name in ("scifact", "cranfield"):
        (tmp_path / "beir" / name).symlink_to(folder)
    environment = os.environ | {"DATABASE_URL": url, "COLUMNS": "100", "PYTHONPATH": str(root)}
    ran = 0
    for name, language, text in BLOCK.findall((root / "docs/evaluation.md").read_text()):
        if language == "json":
            (tmp_path / name).write_text(text)
            continue
        command, _, shown = text.removeprefix("$ pgrecall ").partition("\n")
        done = subprocess.run(
            [sys.executable, "-m", "app", *shlex.split(command)],
            check=False,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == ("under" in done.stdout), done.stdout
        if "beir" not in command:
            shown, cut, _ = shown.partition("…\n")  # what follows differs every time
            lines = [line for line in done.stdout.splitlines(keepends=True) if "100%" not in line]
            given = "".join(lines[: shown.count("\n")] if cut else lines)
            (words, figures), (given_words, given_figures) = comparable(shown), comparable(given)
            assert words == given_words
            assert figures == pytest.approx(given_figures, abs=0.02)
        ran += 1
    assert ran >= 5

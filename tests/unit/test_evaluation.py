"""The measures, by hand and against trec_eval; and what a judged collection may look like."""

import json

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from app import evaluation, judgements
from app.drafts import Draft
from app.errors import BadInput
from app.evaluation import Judged
from app.judgements import Question
from tests.conftest import THOROUGH

GRADES = {"b": 3, "d": 1, "x": 2, "a": 0}
RANKING = ["a", "b", "c", "d"]


def judged(found, grades, milliseconds=1.0):
    return Judged(Question("1", "?", "t", grades, "f:1"), found, milliseconds)


@pytest.mark.parametrize(
    ("k", "recall", "ndcg"),
    [
        (1, 0.0, 0.0),
        # gains 0, 3 of at best 3, 2: 3 / log2(3) over 3 + 2 / log2(3)
        (2, 1 / 3, 1.8927892607 / 4.2618595071),
        (3, 1 / 3, 1.8927892607 / 4.7618595071),
        # and 1 / log2(5) for d
        (4, 2 / 3, 2.3234658187 / 4.7618595071),
        (100, 2 / 3, 2.3234658187 / 4.7618595071),
    ],
)
def test_by_hand(k, recall, ndcg):
    assert evaluation.recall(RANKING, GRADES, k) == pytest.approx(recall)
    assert evaluation.ndcg(RANKING, GRADES, k) == pytest.approx(ndcg)


@pytest.mark.parametrize(("ranking", "expected"), [(["b"], 1), (RANKING, 1 / 2), (["a", "c", "x"], 1 / 3), ([], 0)])
def test_reciprocal_rank_by_hand(ranking, expected):
    assert evaluation.reciprocal_rank(ranking, GRADES) == pytest.approx(expected)


def test_the_best_ranking_has_ndcg_1_and_nothing_found_is_0():
    assert evaluation.ndcg(["b", "x", "d"], GRADES, 10) == pytest.approx(1)
    assert evaluation.metrics(judged({}, GRADES), 10) == {
        "recall@10": 0,
        "mrr": 0,
        "ndcg@10": 0,
        "mean_similarity": 0,
    }


def test_means_and_latency():
    results = [judged({"b": 0.9, "c": 0.5}, {"b": 1}, 10.0), judged({"a": 0.3}, {"b": 1}, 20.0)]
    assert evaluation.mean_metrics(results, 5) == pytest.approx(
        {"recall@5": 0.5, "mrr": 0.5, "ndcg@5": 0.5, "mean_similarity": (0.7 + 0.3) / 2}
    )
    assert evaluation.latency([one.milliseconds for one in results]) == pytest.approx({"p50": 15.0, "p95": 19.5})


DOCUMENTS = [f"d{n}" for n in range(30)]
RUN = st.tuples(
    st.lists(st.sampled_from(DOCUMENTS), unique=True, min_size=1),
    st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(-1, 4), min_size=1).filter(lambda g: max(g.values()) > 0),
)


@settings(max_examples=150 * THOROUGH, deadline=None)
@given(st.lists(RUN, min_size=1, max_size=5), st.integers(1, 40))
def test_agrees_with_trec_eval(runs, k):
    # trec_eval reads the order from the scores
    ranked = {f"q{n}": {d: float(-place) for place, d in enumerate(found)} for n, (found, _) in enumerate(runs)}
    qrels = {f"q{n}": grades for n, (_, grades) in enumerate(runs)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {f"recall.{k}", f"ndcg_cut.{k}", "recip_rank"}).evaluate(ranked)
    results = [judged(dict.fromkeys(found, 0.5), grades) for found, grades in runs]
    for n, one in enumerate(results):
        ours = evaluation.metrics(one, k)
        assert ours[f"recall@{k}"] == pytest.approx(theirs[f"q{n}"][f"recall_{k}"], abs=1e-9)
        assert ours[f"ndcg@{k}"] == pytest.approx(theirs[f"q{n}"][f"ndcg_cut_{k}"], abs=1e-9)
        assert ours["mrr"] == pytest.approx(theirs[f"q{n}"]["recip_rank"], abs=1e-9)
    mean = pytrec_eval.compute_aggregated_measure("ndcg", [each[f"ndcg_cut_{k}"] for each in theirs.values()])
    assert evaluation.mean_metrics(results, k)[f"ndcg@{k}"] == pytest.approx(mean, abs=1e-9)


def write(folder, **changes):
    """A BEIR folder; None leaves a file out."""
    files = {
        "corpus.jsonl": '{"_id": "a", "title": "Otters", "text": "They eat fish."}\n{"_id": "b", "text": "An engine.", "metadata": {}}\n',
        "queries.jsonl": '{"_id": "1", "text": "otters?"}\n{"_id": "2", "text": "engines?"}\n{"_id": "3", "text": "unjudged"}\n',
        "qrels.tsv": "query-id\tcorpus-id\tscore\n1\ta\t2\n1\tb\t0\n2\tb\t0\n",
    }
    folder.mkdir(exist_ok=True)
    for name, text in (files | {name.replace("_", "."): text for name, text in changes.items()}).items():
        if text is not None:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_folder_gives_its_documents_and_the_queries_with_a_relevant_one(tmp_path):
    read = judgements.read(write(tmp_path / "my set (2)"))
    assert read.tenant_id == "eval-my-set-2-"
    assert read.drafts == [Draft("a", "Otters\nThey eat fish."), Draft("b", "An engine.")]
    origin = f"{tmp_path / 'my set (2)' / 'queries.jsonl'}:1"
    assert read.questions == [Question("1", "otters?", "eval-my-set-2-", {"a": 2, "b": 0}, origin)]
    assert judgements.read(tmp_path / "my set (2)", "other").questions[0].tenant_id == "other"


def test_qrels_may_lie_where_beir_puts_them_and_have_no_header(tmp_path):
    folder = write(tmp_path / "beir", qrels_tsv=None)
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_bytes(b"\xef\xbb\xbf2\tb\t1\r\n\r\n")
    assert [question.grades for question in judgements.read(folder).questions] == [{"b": 1}]


@pytest.mark.parametrize(
    ("changes", "field", "fault"),
    [
        ({"corpus_jsonl": None}, "corpus.jsonl", "No such file"),
        ({"queries_jsonl": None}, "queries.jsonl", "No such file"),
        ({"qrels_tsv": None}, "qrels.tsv", "No such file"),
        ({"corpus_jsonl": '{"_id": "a", "text": "x"}\n{"_id": "b"}\n'}, "corpus.jsonl:2", "text"),
        (
            {"corpus_jsonl": '{"_id": "a", "text": "x"}\n\n{"_id": "a", "text": "y"}'},
            "corpus.jsonl:3",
            "corpus.jsonl:1",
        ),
        ({"queries_jsonl": "not json"}, "queries.jsonl:1", "malformed"),
        ({"queries_jsonl": b'{"_id": "1", "text": "x"}\n{"_id": "2", "text": "\xe9"}'}, "queries.jsonl:2", "UTF-8"),
        ({"qrels_tsv": "1\ta\t1\nq\ta\t1\n"}, "qrels.tsv:2", "'q' is not in queries.jsonl"),
        ({"qrels_tsv": "query-id\tcorpus-id\tscore\n1\tz\t1\n"}, "qrels.tsv:2", "'z' is not in corpus.jsonl"),
        ({"qrels_tsv": "1\ta\t1\n1 a 1\n"}, "qrels.tsv:2", "tabs"),
        ({"qrels_tsv": "1\ta\tgood\n"}, "qrels.tsv:1", "whole number"),
        ({"qrels_tsv": "1\ta\t1\n1\ta\t2\n"}, "qrels.tsv:2", "again"),
        ({"qrels_tsv": "1\ta\t0\n"}, "", "no judged query"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named_by_file_and_line(tmp_path, changes, field, fault):
    with pytest.raises(BadInput, match=fault) as caught:
        judgements.read(write(tmp_path / "set", **changes))
    assert caught.value.field == str(tmp_path / "set" / field)


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_file_has_tenants_of_its_own_and_another_for_the_rest(tmp_path):
    path = lines(
        tmp_path / "judged.jsonl",
        {"query": "one", "expected_doc_ids": ["a", "b", "a"], "tenant_id": "acme"},
        {"query": "not judged", "expected_doc_ids": [], "tenant_id": "acme"},
        {"query": "two", "expected_doc_ids": ["c"]},
    )
    read = judgements.read(path, "globex")
    assert (read.tenant_id, list(read.drafts)) == (None, [])
    assert read.questions == [
        Question("1", "one", "acme", {"a": 1, "b": 1}, f"{path}:1"),
        Question("3", "two", "globex", {"c": 1}, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("row", "field", "fault"),
    [
        ({"query": "q", "expected_doc_ids": ["a"]}, ":2", "--tenant"),
        ({"query": "q", "expected_doc_ids": ["a"], "tenant_id": "no spaces"}, ":2: tenant_id", "not allowed"),
        ({"query": "q", "expected_doc_ids": "a", "tenant_id": "t"}, ":2", "expected_doc_ids"),
        ({"query": "q", "expected": ["a"], "tenant_id": "t"}, ":2", "expected"),
        ('{"query": "q",', ":2", "truncated"),
        ('{"query": "\\ud800", "expected_doc_ids": ["a"], "tenant_id": "t"}', ":2", "surrogate"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_line(tmp_path, row, field, fault):
    path = lines(tmp_path / "judged.jsonl", {"query": "q", "expected_doc_ids": ["a"], "tenant_id": "t"}, row)
    with pytest.raises(BadInput, match=fault) as caught:
        judgements.read(path)
    assert caught.value.field == f"{path}{field}"


def test_a_path_that_is_not_there_and_a_tenant_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        judgements.read(tmp_path / "missing")
    with pytest.raises(BadInput, match="--tenant"):
        judgements.read(write(tmp_path / "set"), "no spaces")

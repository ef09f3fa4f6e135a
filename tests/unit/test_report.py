"""The page: whole, harmless whatever the texts say, loading nothing; and runs that can be compared."""

import json
import re
from html.parser import HTMLParser

import pytest
from msgspec.structs import replace

from app import comparison, report
from app.errors import BadInput
from app.evaluation import Alternative, Judged, Passage
from app.judgements import Question
from app.report import Evaluation, Results
from app.search import Scan

HOSTILE = "</style></svg><script src=http://evil.example/x.js>alert(1)</script>\"'><img src=x onerror=alert(1)>\x00\x1b[31m\u202e&amp;"
VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Elements, their attributes and the text; complains of elements that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def judged(n, found, expected, text="What?"):
    return Judged(Question(f"q{n}", text, "t", dict.fromkeys(expected, 1), f"f:{n}"), found, 5.0 + n)


GOOD = [judged(1, {"a": 0.9, "b": 0.5}, ["a"]), judged(2, {"b": 0.6, "a": 0.4}, ["a", "z"])]
WORSE = [judged(1, {"b": 0.9, "a": 0.5}, ["a"]), judged(2, {}, ["a", "z"])]
TRIED = [
    Alternative("exact", 0.8, 1.0, {"p50": 9.0, "p95": 12.0}),
    Alternative("ef_search 40", 0.7, 0.9, {"p50": 3.0, "p95": 5.0}),
]


def rows(results):
    return [comparison.row(one, 10) for one in results]


def page(**changes):
    given = {"name": "set", "k": 10, "facts": {"made": "today"}, "modes": {"vector": Results(GOOD, TRIED)}}
    return report.page(Evaluation(**given | changes))


def test_the_page_shows_the_oversampling_of_a_quantised_index_beside_its_ef_search():
    tried = [*TRIED, *(Alternative(f"oversampling {n}", 0.75, 0.95, {"p50": 4.0, "p95": 6.0}) for n in (1, 10))]
    shown = Page(page(modes={"vector": Results(GOOD, tried)}))
    for text in ("oversampling 10", "×10", "Numbers are ef_search, those with × oversampling."):
        assert text in shown.text
    assert "×" not in Page(page()).text


def test_the_page_shows_figures_intervals_and_plots_with_a_table_for_each():
    shown = Page(page())
    for text in (
        "recall@10",
        "0.750",
        "0.500 to 1.000",
        "ndcg@10",
        "latency p95",
        "ef_search 40",
        "today",
        "found at 2",
    ):
        assert text in shown.text
    plots = [attributes for tag, attributes in shown.seen if tag == "svg" and "role" in attributes]
    assert len(plots) == 4
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
    tags = [tag for tag, _ in shown.seen]
    assert tags.count("thead") == tags.count("table") == 5


def test_hostile_texts_are_shown_not_run():
    one = judged(1, {HOSTILE: 0.9}, [HOSTILE + "z"], HOSTILE)
    several = {HOSTILE: Results([one, one], TRIED, {"q1": {HOSTILE: Passage(HOSTILE, 0.9)}}), "text": Results([one])}
    compared = [(HOSTILE, HOSTILE, comparison.compare(rows([one]), rows([one])))]
    html = page(name=HOSTILE, facts={HOSTILE: HOSTILE}, modes=several, compared=compared)
    shown = Page(html)
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in shown.seen}
    assert "alert(1)" in shown.text
    assert not [name for _, attributes in shown.seen for name in attributes if name.startswith("on")]
    assert "\x00" not in html
    assert "\x1b" not in html


def test_nothing_is_loaded_from_elsewhere():
    html = page()
    attributes = [pair for _, attributes in Page(html).seen for pair in attributes.items()]
    assert [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")] == ["data:,"]
    assert not re.search(r"https?:|//|@import|url\(", html)
    assert "default-src 'none'" in html


def test_a_long_text_is_shortened():
    html = page(modes={"vector": Results([judged(1, {}, ["a"], "word " * 500)])})
    assert "word word…" in html.replace(" …", "…")
    assert len(html) < 30_000


def test_a_single_query_that_found_nothing_has_a_page_too():
    shown = Page(page(modes={"vector": Results([judged(1, {}, ["a"])])}))
    assert "No relevant document was found." in shown.text
    assert "not found" in shown.text


def test_the_worst_come_first_and_the_surest_of_them_before():
    sure, unsure = judged(3, {"b": 0.9}, ["a"]), judged(4, {"b": 0.2}, ["a"])
    assert report.worst([*GOOD, unsure, sure], 10) == [sure, unsure, GOOD[1], GOOD[0]]


def test_modes_and_runs_stand_side_by_side():
    found = comparison.compare(rows(GOOD), rows(WORSE))
    worded = [one._replace(found=dict.fromkeys(one.found), scan=Scan("text")) for one in WORSE]
    shown = Page(
        page(modes={"vector": Results(GOOD), "text": Results(worded)}, compared=[("Compared with old.json", "", found)])
    )
    for text in ("vector", "Similarity and speed: vector", "Worst queries: text", "Compared with old.json", "+0.5000"):
        assert text in shown.text
    assert "a: not found → 2" in shown.text
    assert "Similarity and speed: text" not in shown.text  # words measure no similarity
    assert list(comparison.compare(rows(worded), rows(GOOD)).differences) == ["recall@10", "mrr", "ndcg@10"]


def test_differences_are_paired_and_the_queries_that_moved_are_named():
    found = comparison.compare(rows(GOOD), rows(WORSE))
    recall = found.differences["recall@10"]
    assert (recall.other, recall.this, recall.difference) == (0.5, 0.75, 0.25)
    assert recall.interval == (0.0, 0.5)
    assert [change.this.id for change in found.gained] == ["q2", "q1"]
    assert found.lost == []
    back = comparison.compare(rows(WORSE), rows(GOOD))
    assert (back.gained, [change.this.id for change in back.lost]) == ([], ["q2", "q1"])
    assert comparison.compare(rows(GOOD[:1]), rows(WORSE[:1])).differences["mrr"].interval is None


def saved(tmp_path, document):
    path = tmp_path / "other.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return path


RUN = {"metrics": {}, "setup": {"mode": "vector"}, "per_query": [row.as_json() for row in rows(GOOD)]}


def test_a_saved_run_is_read_again_keyed_by_mode_or_not(tmp_path):
    assert comparison.read(saved(tmp_path, RUN), 10)["vector"].rows == rows(GOOD)
    both = comparison.read(saved(tmp_path, {"vector": RUN, "text": RUN | {"setup": {}}}), 10)
    assert list(both) == ["vector", "text"]
    assert list(comparison.read(saved(tmp_path, RUN | {"setup": {"mode": "text"}}), 10)) == ["text"]


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (b"not json", "is not a JSON document"),
        (b"\xff", "is not a JSON document"),
        (b"[]", "is not a JSON document"),
        ({}, "holds no evaluation"),
        ({"metrics": {}}, "has no per_query; allowed"),
        ({"vector": {"metrics": {}}}, "vector: has no per_query"),
        (RUN | {"per_query": [1]}, r"per_query\[0\]"),
        (RUN | {"per_query": [RUN["per_query"][0] | {"found": "a"}]}, "found"),
        (RUN | {"per_query": [RUN["per_query"][0] | {"mrr": "high"}]}, "float"),
    ],
)
def test_what_is_no_saved_run_is_refused(tmp_path, document, fault):
    with pytest.raises(BadInput, match=fault):
        comparison.read(saved(tmp_path, document), 10)


def test_another_k_is_refused(tmp_path):
    with pytest.raises(BadInput, match="has no recall@5; allowed: a run with -k 5"):
        comparison.read(saved(tmp_path, RUN), 5)


def test_a_run_of_other_queries_or_judgements_is_refused():
    wanted = {row.key: row.expected for row in rows(GOOD)}
    comparison.check("f", [replace(row, tenant_id="u", expected=row.expected[::-1]) for row in rows(GOOD)], wanted)
    with pytest.raises(BadInput, match="other queries: it lacks 'q2'"):
        comparison.check("f", rows(GOOD[:1]), wanted)
    with pytest.raises(BadInput, match="other queries: it alone has 'q9'"):
        comparison.check("f", [*rows(GOOD), replace(rows(GOOD)[0], id="q9")], wanted)
    with pytest.raises(BadInput, match="other queries"):
        comparison.check("f", [replace(row, query="Who?") for row in rows(GOOD)], wanted)
    with pytest.raises(BadInput, match="expects other documents for 'q1'"):
        comparison.check("f", [replace(row, expected=["b"]) for row in rows(GOOD)], wanted)

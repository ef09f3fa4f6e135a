"""An evaluation as one HTML page: no script, nothing loaded from elsewhere, every text of a document or query escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from app import evaluation, figures, plots, statistics
from app.comparison import Change, Comparison
from app.evaluation import Alternative, Judged, Passage
from app.markup import short, table, text
from app.statistics import Interval

WORST = 20
"""How many of the worst queries are shown with their documents."""

OPEN = 3
"""How many of these are unfolded."""

EXPECTED = 5
"""How many of a query's expected documents are shown."""

_PAGE = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))


@dataclass(frozen=True, slots=True)
class Results:
    """What one mode gave. `passages`: by query id, of the documents found and expected, for the worst queries."""

    judged: Sequence[Judged]
    alternatives: Sequence[Alternative] = ()
    passages: Mapping[str, Mapping[str, Passage]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the page shows. `facts`: name and value of how it was made; `compared`: a heading and a comparison each."""

    name: str
    k: int
    facts: Mapping[str, str]
    modes: Mapping[str, Results]
    compared: Sequence[tuple[str, str, Comparison]] = ()


def worst(judged: Sequence[Judged], k: int) -> list[Judged]:
    """The queries with the lowest nDCG; among equals those that were most sure of what they found."""
    return sorted(
        judged,
        key=lambda one: (
            evaluation.metrics(one, k)[f"ndcg@{k}"],
            -max(one.similarities, default=-1.0),
            one.question.id,
        ),
    )[:WORST]


def page(shown: Evaluation) -> str:
    """The whole page."""
    parts = [
        f"<header><h1>{text(shown.name)}</h1>",
        f'<p class="lead">Retrieval measured by pgrecall on {_count(_queries(shown), "judged query", "judged queries")}</p></header>',
        "<main>",
        '<dl class="facts">',
        *(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in shown.facts.items()),
        "</dl>",
    ]
    parts += ["<h2>Metrics</h2>", _metrics({mode: results.judged for mode, results in shown.modes.items()}, shown.k)]
    parts += [_compared(*each, shown.k) for each in shown.compared]
    for mode, results in shown.modes.items():
        suffix = f": {mode}" if len(shown.modes) > 1 else ""
        if mode != "text":  # which measures no similarity
            parts += [
                f"<h2>{text('Similarity and speed' + suffix)}</h2>",
                '<div class="plots">',
                figures.threshold_figure(results.judged),
                figures.similarity_figure(results.judged),
                *figures.alternative_figures(results.alternatives, shown.k),
                "</div>",
            ]
        parts += [f"<h2>{text('Worst queries' + suffix)}</h2>", _worst(results, shown.k)]
    parts += ["</main>", _footer(shown.k)]
    return _PAGE.substitute(title=f"{text(shown.name)} – pgrecall evaluation", body="\n".join(parts))


def _queries(shown: Evaluation) -> int:
    return max(len(results.judged) for results in shown.modes.values())


def _metrics(modes: Mapping[str, Sequence[Judged]], k: int) -> str:
    """A column for each mode; the intervals as bars where there is one mode only."""
    means = {mode: evaluation.mean_metrics(judged, k) for mode, judged in modes.items()}
    intervals = {mode: evaluation.mean_intervals(judged, k) for mode, judged in modes.items()}
    waits = {mode: evaluation.latency([one.milliseconds for one in judged]) for mode, judged in modes.items()}
    alone = next(iter(modes)) if len(modes) == 1 else None
    rows = []
    for name in dict.fromkeys(name for each in means.values() for name in each):
        cells = [
            (
                _stacked(f"{each[name]:.3f}" if name in each else "–", "", str(intervals[mode].get(name, ""))),
                "figure wraps",
            )
            for mode, each in means.items()
        ]
        if alone is not None:
            interval = intervals[alone].get(name)
            cells.append(
                (plots.span(interval.low, means[alone][name], interval.high, (0, 1)) if interval else "", "bar")
            )
        rows.append([(name.replace("_", "_<wbr>"), "th"), *cells])
    for name in ("p50", "p95"):
        cells = [(_stacked(f"{waits[mode][name]:.1f} ms", "", ""), "figure") for mode in modes]
        rows.append([(f"latency {name}", "th"), *cells, *([("", "bar")] if alone is not None else [])])
    headings = [(mode, "figure") for mode in modes] if alone is None else [("value", "figure"), ("from 0 to 1", "bar")]
    return table(
        "Means over the queries, each with its 95 % interval. Latency includes embedding the query, where the mode needs it.",
        [("metric", ""), *headings],
        rows,
    )


def _compared(title: str, other: str, comparison: Comparison, k: int) -> str:
    reach = max(
        (abs(bound) for each in comparison.differences.values() for bound in each.interval or (each.difference,)),
        default=0.0,
    )
    ends = (-max(reach, 0.01) * 1.05, max(reach, 0.01) * 1.05)
    rows = []
    for name, each in comparison.differences.items():
        low, high = each.interval or (each.difference, each.difference)
        kind = "good" if low > 0 else "bad" if high < 0 else ""
        rows.append(
            [
                (name.replace("_", "_<wbr>"), "th"),
                (f"{each.other:.3f}", "figure"),
                (f"{each.this:.3f}", "figure"),
                (_stacked(f"{each.difference:+.4f}", kind, _signed(each.interval)), "figure wraps"),
                (plots.span(low, each.difference, high, ends), "bar"),
            ]
        )
    headings = [("metric", ""), ("other", "figure"), ("this", "figure"), ("difference, 95 % interval", "figure wraps")]
    return "\n".join(
        [
            f"<h2>{text(title)}</h2>",
            (
                f"<p>{text(other)} The queries are resampled in pairs: where the interval of a difference leaves out 0, "
                "the difference is more than the choice of queries would explain, and is coloured.</p>"
            ),
            table(
                "This run minus the other",
                [*headings, (f"from {ends[0]:+.3f} to {ends[1]:+.3f}", "bar")],
                rows,
            ),
            _changes(f"Gained most nDCG@{k}", comparison.gained, k),
            _changes(f"Lost most nDCG@{k}", comparison.lost, k),
        ]
    )


def _stacked(value: str, kind: str, below: str) -> str:
    rest = f'<br><span class="soft">{below}</span>' if below else ""
    return f'<span class="big {kind}">{value}</span>{rest}'


def _changes(title: str, changes: Sequence[Change], k: int) -> str:
    if not changes:
        return f"<h3>{text(title)}</h3><p class='soft'>No query.</p>"
    rows = [
        f'<li><span class="query">{short(change.this.query)}</span> <span class="soft">{short(change.this.id, 60)}</span>'
        f"<p>nDCG@{k} {change.other.figures[f'ndcg@{k}']:.3f} → {change.this.figures[f'ndcg@{k}']:.3f} "
        f'<span class="{"good" if change.difference > 0 else "bad"}">({change.difference:+.3f})</span>'
        f"{_moved(change)}</p></li>"
        for change in changes
    ]
    return f'<h3>{text(title)}</h3><ol class="changes">{"".join(rows)}</ol>'


def _moved(change: Change) -> str:
    def rank(found: Sequence[str], document: str) -> str:
        return str(found.index(document) + 1) if document in found else "not found"

    ranks = {d: (rank(change.other.found, d), rank(change.this.found, d)) for d in change.this.expected}
    moved = [(document, pair) for document, pair in ranks.items() if pair[0] != pair[1]]
    shown = [f"{short(document, 40)}: {a} → {b}" for document, (a, b) in moved[:EXPECTED]]
    more = [f"{len(moved) - EXPECTED} more"] if len(moved) > EXPECTED else []
    return f". Rank of expected documents: {', '.join([*shown, *more])}" if moved else ""


def _worst(results: Results, k: int) -> str:
    parts = [
        (
            f"<p>The queries with the lowest nDCG@{k}; among equals those whose first hit looked most similar. Shown of each "
            "document is its part that is most similar to the query.</p>"
        )
    ]
    for place, one in enumerate(worst(results.judged, k)):
        values = evaluation.metrics(one, k)
        passages = results.passages.get(one.question.id, {})
        found = [
            _document(f"{rank}.", document, passages.get(document), "relevant" if document in one.expected else "")
            for rank, document in enumerate(one.found, 1)
        ]
        expected = [
            _document("", document, passages.get(document), _place(list(one.found), document))
            for document in one.expected[:EXPECTED]
        ]
        more = len(one.expected) - EXPECTED
        parts.append(
            f"<details{' open' if place < OPEN else ''}><summary><span class=query>{short(one.question.text)}</span> "
            f"<span class=soft>{short(one.question.id, 60)} · nDCG@{k} {values[f'ndcg@{k}']:.3f} · "
            f"recall@{k} {values[f'recall@{k}']:.3f}</span></summary>"
            f'<div class="inside pair"><div><h4>Expected ({len(one.expected)})</h4><ul>{"".join(expected)}'
            + (f"<li class=soft>and {more} more</li>" if more > 0 else "")
            + f"</ul></div><div><h4>Found ({len(found)})</h4><ol>{''.join(found)}</ol></div></div></details>"
        )
    return "\n".join(parts)


def _place(found: Sequence[str], document: str) -> str:
    return f"found at {found.index(document) + 1}" if document in found else "not found"


def _document(rank: str, document: str, passage: Passage | None, tag: str) -> str:
    kind = "bad" if tag == "not found" else "good"
    return (
        f"<li>{rank} <b>{short(document, 80)}</b> "
        + (f"<span class=soft>similarity {passage.similarity:.3f}</span> " if passage else "")
        + (f'<span class="tag {kind}">{tag}</span>' if tag else "")
        + (f"<p>{short(passage.text)}</p>" if passage else "<p>not stored</p>")
        + "</li>"
    )


def _footer(k: int) -> str:
    meanings = {
        f"recall@{k}": f"share of the relevant documents among the first {k}",
        "mrr": f"1 / rank of the first relevant document, 0 where there is none among the first {k}",
        f"ndcg@{k}": f"gain of the first {k}, discounted by log2(rank + 1), over that of the best order",
        "mean_similarity": "mean cosine similarity of the documents found; a search by words measures none",
        "95 % interval": f"percentile bootstrap over the queries, {statistics.RESAMPLES:,} resamples, fixed seed: "
        "how far the mean would move with other queries of the same kind",
        "threshold": "recall is the mean over the queries of what reaches the threshold; precision is of all these hits "
        "together. Hits that nobody judged count as not relevant",
    }
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(meaning)}</dd>" for name, meaning in meanings.items())
    return f"<footer><h3>What the figures mean</h3><dl>{rows}</dl></footer>"


def _signed(interval: Interval | None) -> str:
    return f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else ""


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"

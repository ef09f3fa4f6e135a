"""An evaluation as one HTML page: no script, nothing loaded from elsewhere, every text of a document or query escaped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from app import evaluation, plots, statistics
from app.comparison import Change, Comparison
from app.evaluation import Alternative, Judged, Passage
from app.plots import Axis, Chart
from app.statistics import Interval

WORST = 20
"""How many of the worst queries are shown with their documents."""

OPEN = 3
"""How many of these are unfolded."""

EXPECTED = 5
"""How many of a query's expected documents are shown."""

SHORT = 220
"""Characters shown of a text."""

KEPT = 0.95
"""Share of the relevant hits that the marked threshold keeps."""

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
            -max(one.found.values(), default=-1.0),
            one.question.id,
        ),
    )[:WORST]


def page(shown: Evaluation) -> str:
    """The whole page."""
    parts = [
        f"<header><h1>{_text(shown.name)}</h1>",
        f'<p class="lead">Retrieval measured by pgrecall on {_count(_queries(shown), "judged query", "judged queries")}</p></header>',
        "<main>",
        '<dl class="facts">',
        *(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in shown.facts.items()),
        "</dl>",
    ]
    for mode, results in shown.modes.items():
        heading = f"Metrics: {mode}" if len(shown.modes) > 1 else "Metrics"
        parts += [f"<h2>{_text(heading)}</h2>", _metrics(results.judged, shown.k)]
    parts += [_compared(*each, shown.k) for each in shown.compared]
    for mode, results in shown.modes.items():
        suffix = f": {mode}" if len(shown.modes) > 1 else ""
        parts += [
            f"<h2>{_text('Similarity and speed' + suffix)}</h2>",
            '<div class="plots">',
            _threshold_figure(results.judged),
            _similarity_figure(results.judged),
            *_alternative_figures(results.alternatives, shown.k),
            "</div>",
            f"<h2>{_text('Worst queries' + suffix)}</h2>",
            _worst(results, shown.k),
        ]
    parts += ["</main>", _footer(shown.k)]
    return _PAGE.substitute(title=f"{_text(shown.name)} – pgrecall evaluation", body="\n".join(parts))


def _queries(shown: Evaluation) -> int:
    return max(len(results.judged) for results in shown.modes.values())


def _metrics(judged: Sequence[Judged], k: int) -> str:
    means, intervals = evaluation.mean_metrics(judged, k), evaluation.mean_intervals(judged, k)
    rows = []
    for name, value in means.items():
        interval = intervals.get(name)
        rows.append(
            [
                (name, "th"),
                (f"{value:.3f}", "figure big"),
                (str(interval or ""), "figure"),
                (plots.span(interval.low, value, interval.high, (0, 1)) if interval else "", "bar"),
            ]
        )
    for name, milliseconds in evaluation.latency([one.milliseconds for one in judged]).items():
        rows.append([(f"latency {name}", "th"), (f"{milliseconds:.1f} ms", "figure big"), ("", "figure"), ("", "bar")])
    headings = [("metric", ""), ("value", "figure"), ("95 % interval", "figure"), ("from 0 to 1", "bar")]
    return _table("Means over the queries. Latency includes embedding the query.", headings, rows)


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
                (name, "th"),
                (f"{each.other:.3f}", "figure"),
                (f"{each.this:.3f}", "figure"),
                (_stacked(f"{each.difference:+.4f}", kind, _signed(each.interval)), "figure wraps"),
                (plots.span(low, each.difference, high, ends), "bar"),
            ]
        )
    headings = [("metric", ""), ("other", "figure"), ("this", "figure"), ("difference, 95 % interval", "figure wraps")]
    return "\n".join(
        [
            f"<h2>{_text(title)}</h2>",
            (
                f"<p>{_text(other)} The queries are resampled in pairs: where the interval of a difference leaves out 0, "
                "the difference is more than the choice of queries would explain, and is coloured.</p>"
            ),
            _table(
                "This run minus the other",
                [*headings, (f"from {ends[0]:+.3f} to {ends[1]:+.3f}", "bar")],
                rows,
            ),
            _changes(f"Gained most nDCG@{k}", comparison.gained, k),
            _changes(f"Lost most nDCG@{k}", comparison.lost, k),
        ]
    )


def _stacked(value: str, kind: str, below: str) -> str:
    return f'<span class="big {kind}">{value}</span><br><span class="soft">{below}</span>'


def _changes(title: str, changes: Sequence[Change], k: int) -> str:
    if not changes:
        return f"<h3>{_text(title)}</h3><p class='soft'>No query.</p>"
    rows = [
        f'<li><span class="query">{_short(change.this.query)}</span> <span class="soft">{_short(change.this.id, 60)}</span>'
        f"<p>nDCG@{k} {change.other.figures[f'ndcg@{k}']:.3f} → {change.this.figures[f'ndcg@{k}']:.3f} "
        f'<span class="{"good" if change.difference > 0 else "bad"}">({change.difference:+.3f})</span>'
        f"{_moved(change)}</p></li>"
        for change in changes
    ]
    return f'<h3>{_text(title)}</h3><ol class="changes">{"".join(rows)}</ol>'


def _moved(change: Change) -> str:
    def rank(found: Sequence[str], document: str) -> str:
        return str(found.index(document) + 1) if document in found else "not found"

    ranks = {d: (rank(change.other.found, d), rank(change.this.found, d)) for d in change.this.expected}
    moved = [(document, pair) for document, pair in ranks.items() if pair[0] != pair[1]]
    shown = [f"{_short(document, 40)}: {a} → {b}" for document, (a, b) in moved[:EXPECTED]]
    more = [f"{len(moved) - EXPECTED} more"] if len(moved) > EXPECTED else []
    return f". Rank of expected documents: {', '.join([*shown, *more])}" if moved else ""


def _threshold_figure(judged: Sequence[Judged]) -> str:
    queries = [evaluation.hits(one) for one in judged]
    edges = _edges([similarity for one in judged for similarity in one.found.values()])
    curve = statistics.threshold_curve(queries, np.linspace(edges[0], edges[-1], 101))
    keeping = statistics.keeping_threshold([s for query in queries for s in query.relevant], KEPT)
    chart = Chart(
        "Precision and recall against the similarity threshold",
        f"Recall falls from {curve.recall[0]:.2f} as the threshold rises from {edges[0]:.2f} to {edges[-1]:.2f}.",
        Axis("threshold (cosine similarity)", edges[0], edges[-1]),
        Axis("share", 0, 1),
    )
    chart.line(list(zip(curve.thresholds.tolist(), curve.recall.tolist(), strict=True)), "one")
    chart.line(list(zip(curve.thresholds.tolist(), curve.precision.tolist(), strict=True)), "two")
    said = "No relevant document was found."
    if keeping is not None:
        chart.rule(keeping, f"{keeping:.3f} keeps {KEPT * 100:.0f} %")
        at = statistics.threshold_curve(queries, np.array([keeping]))
        said = (
            f"A threshold of {keeping:.3f} keeps {KEPT * 100:.0f} % of the relevant hits found: "
            f"precision {at.precision[0]:.3f} instead of {curve.precision[0]:.3f}."
        )
    rows = [
        [
            (f"{curve.thresholds[n]:.2f}", "th"),
            (_share(curve.recall[n]), "figure"),
            (_share(curve.precision[n]), "figure"),
        ]
        for n in range(0, 101, 10)
    ]
    return _figure(
        "What a threshold keeps",
        said,
        [("recall", "one"), ("precision", "two")],
        chart,
        _table("", [("threshold", ""), ("recall", "figure"), ("precision", "figure")], rows),
    )


def _similarity_figure(judged: Sequence[Judged]) -> str:
    queries = [evaluation.hits(one) for one in judged]
    relevant = [s for query in queries for s in query.relevant]
    irrelevant = [s for query in queries for s in query.irrelevant]
    edges = _edges([*relevant, *irrelevant])
    shares = [np.histogram(values, edges)[0] / max(len(values), 1) * 100 for values in (relevant, irrelevant)]
    chart = Chart(
        "Similarity of relevant and other hits",
        f"{_spread('relevant', relevant)} {_spread('others', irrelevant)}",
        Axis("cosine similarity", edges[0], edges[-1]),
        Axis("hits of the kind (%)", 0, max(1.0, float(np.max(shares)) * 1.08)),
    )
    chart.steps(edges, shares[1].tolist(), "two")
    chart.steps(edges, shares[0].tolist(), "one")
    rows = [
        [(f"{low:.2f} to {high:.2f}", "th"), (f"{a:.1f} %", "figure"), (f"{b:.1f} %", "figure")]
        for low, high, a, b in zip(edges, edges[1:], *shares, strict=False)
    ]
    return _figure(
        "Similarity of the hits",
        f"{_spread('relevant', relevant)} {_spread('others', irrelevant)}",
        [(f"relevant ({len(relevant):,})", "one"), (f"others ({len(irrelevant):,})", "two")],
        chart,
        _table("", [("similarity", ""), ("relevant", "figure"), ("others", "figure")], rows),
    )


def _spread(name: str, values: Sequence[float]) -> str:
    if not values:
        return f"{name.capitalize()}: none."
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"{name.capitalize()}: median {middle:.2f}, 80 % between {low:.2f} and {high:.2f}."


def _alternative_figures(alternatives: Sequence[Alternative], k: int) -> list[str]:
    if not alternatives:
        return []
    labels = [each.name.removeprefix("ef_search ") for each in alternatives]
    rows = [
        [
            (each.name, "th"),
            (f"{each.recall:.3f}", "figure"),
            ("–" if each.agreement is None else f"{each.agreement:.3f}", "figure"),
            (f"{each.latency_ms['p50']:.1f} ms", "figure"),
            (f"{each.latency_ms['p95']:.1f} ms", "figure"),
        ]
        for each in alternatives
    ]
    headings = [("search", ""), (f"recall@{k}", "figure"), ("as exact", "figure"), ("p50", "figure"), ("p95", "figure")]
    table = _table("As exact: share of the exact search's documents. Latency without embedding.", headings, rows)
    drawn = [
        (
            "Recall against latency",
            "recall by the judgements",
            f"recall@{k}",
            [(each.latency_ms["p50"], each.recall) for each in alternatives],
        ),
        (
            "Index against exact search",
            "share of the exact search's documents that are found",
            "share of exact's documents",
            [(each.latency_ms["p50"], each.agreement) for each in alternatives if each.agreement is not None],
        ),
    ]
    figures = []
    for title, what, label, points in drawn:
        if not points:
            continue
        ceiling = max(y for _, y in points)
        chart = Chart(
            title,
            f"Points for exact search and the index with several ef_search: {what}, and median latency.",
            plots.spanning("median latency of the search (ms)", [x for x, _ in points], least=1.0, low=0.0),
            plots.spanning(label, [y for _, y in points], least=0.05)._replace(high=min(1.004, ceiling + 0.03)),
        )
        index = [(point, name) for point, name in zip(points, labels, strict=False) if name != "exact"]
        exact = [(point, name) for point, name in zip(points, labels, strict=False) if name == "exact"]
        chart.line([point for point, _ in index], "one")
        chart.points([point for point, _ in index], [name for _, name in index], "one")
        chart.points([point for point, _ in exact], [name for _, name in exact], "two")
        figures.append(
            _figure(
                title,
                f"The same queries under other settings: {what}. Numbers are ef_search.",
                [("index", "one"), ("exact", "two dots")],
                chart,
                table,
            )
        )
    return figures


def _worst(results: Results, k: int) -> str:
    parts = [
        (
            f"<p>The queries with the lowest nDCG@{k}; among equals those whose first hit looked most similar. Shown of each "
            "document is its part that is most similar to the query.</p>"
        )
    ]
    for place, one in enumerate(worst(results.judged, k)):
        figures = evaluation.metrics(one, k)
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
            f"<details{' open' if place < OPEN else ''}><summary><span class=query>{_short(one.question.text)}</span> "
            f"<span class=soft>{_short(one.question.id, 60)} · nDCG@{k} {figures[f'ndcg@{k}']:.3f} · "
            f"recall@{k} {figures[f'recall@{k}']:.3f}</span></summary>"
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
        f"<li>{rank} <b>{_short(document, 80)}</b> "
        + (f"<span class=soft>similarity {passage.similarity:.3f}</span> " if passage else "")
        + (f'<span class="tag {kind}">{tag}</span>' if tag else "")
        + (f"<p>{_short(passage.text)}</p>" if passage else "<p>not stored</p>")
        + "</li>"
    )


def _footer(k: int) -> str:
    meanings = {
        f"recall@{k}": f"share of the relevant documents among the first {k}",
        "mrr": f"1 / rank of the first relevant document, 0 where there is none among the first {k}",
        f"ndcg@{k}": f"gain of the first {k}, discounted by log2(rank + 1), over that of the best order",
        "mean_similarity": "mean cosine similarity of the documents found",
        "95 % interval": f"percentile bootstrap over the queries, {statistics.RESAMPLES:,} resamples, fixed seed: "
        "how far the mean would move with other queries of the same kind",
        "threshold": "recall is the mean over the queries of what reaches the threshold; precision is of all these hits "
        "together. Hits that nobody judged count as not relevant",
    }
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(meaning)}</dd>" for name, meaning in meanings.items())
    return f"<footer><h3>What the figures mean</h3><dl>{rows}</dl></footer>"


def _figure(title: str, said: str, keys: Iterable[tuple[str, str]], chart: Chart, table: str) -> str:
    legend = "".join(f'<span class="key {series}">{_text(name)}</span>' for name, series in keys)
    return (
        f"<figure><figcaption><h3>{_text(title)}</h3><p>{_text(said)}</p>{legend}</figcaption>{chart.svg()}"
        f"<details><summary>The figures as a table</summary><div class=inside>{table}</div></details></figure>"
    )


def _table(caption: str, headings: Sequence[tuple[str, str]], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """A table of (HTML, class) cells; class `th` heads the row."""
    head = "".join(f'<th scope="col" class="{kind}">{_text(name)}</th>' for name, kind in headings)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if kind == "th" else f'<td class="{kind}">{cell}</td>' for cell, kind in row
        )
        + "</tr>"
        for row in rows
    )
    described = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{described}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _edges(values: Sequence[float]) -> list[float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = np.floor(low * 20) / 20, np.ceil(high * 20) / 20
    return [float(edge) for edge in np.linspace(low, max(high, low + 0.05), 26)]


def _signed(interval: Interval | None) -> str:
    return f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else ""


def _share(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _text(text: str) -> str:
    return escape("".join(letter if letter.isprintable() else " " for letter in text))


def _short(text: str, length: int = SHORT) -> str:
    """The beginning, on one line, set apart so that its writing direction stays inside."""
    line = " ".join(text.split())
    return f"<bdi>{_text(line if len(line) <= length else line[: length - 1].rstrip() + '…')}</bdi>"

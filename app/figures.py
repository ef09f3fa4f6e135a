"""The page's plots, each with its figures as a table."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from app import evaluation, plots, statistics
from app.evaluation import Alternative, Judged
from app.markup import table, text
from app.plots import Axis, Chart

KEPT = 0.95
"""Share of the relevant hits that the marked threshold keeps."""

_SERIES = {"ef_search": "one", "oversampling": "three", "exact": "two"}
"""How each setting that is tried is drawn."""


def threshold_figure(judged: Sequence[Judged]) -> str:
    """Precision and recall against the similarity threshold."""
    queries = [evaluation.hits(one) for one in judged]
    edges = _edges([similarity for one in judged for similarity in one.similarities])
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
        keeping = math.floor(1000 * keeping) / 1000  # as it is shown: rounded up it would keep less
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
        table("", [("threshold", ""), ("recall", "figure"), ("precision", "figure")], rows),
    )


def similarity_figure(judged: Sequence[Judged]) -> str:
    """How similar the relevant hits are, and the others."""
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
        table("", [("similarity", ""), ("relevant", "figure"), ("others", "figure")], rows),
    )


def _spread(name: str, values: Sequence[float]) -> str:
    if not values:
        return f"{name.capitalize()}: none."
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"{name.capitalize()}: median {middle:.2f}, 80 % between {low:.2f} and {high:.2f}."


def alternative_figures(alternatives: Sequence[Alternative], k: int) -> list[str]:
    """Recall, and likeness to the exact search, against latency; nothing where nothing was tried."""
    if not alternatives:
        return []
    settings = [each.name.partition(" ")[0] for each in alternatives]
    labels = [_label(*each.name.partition(" ")[::2]) for each in alternatives]
    quantised = "oversampling" in settings
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
    tabled = table("As exact: share of the exact search's documents. Latency without embedding.", headings, rows)
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
            f"Points for exact search and the index with several ef_search{' and oversamplings' if quantised else ''}: "
            f"{what}, and median latency.",
            plots.spanning("median latency of the search (ms)", [x for x, _ in points], least=1.0, low=0.0),
            plots.spanning(label, [y for _, y in points], least=0.05)._replace(high=min(1.004, ceiling + 0.03)),
        )
        for setting, series in _SERIES.items():
            some = [each for each in zip(points, labels, settings, strict=True) if each[2] == setting]
            if setting == "ef_search":
                chart.line([point for point, _, _ in some], series)
            chart.points([point for point, _, _ in some], [name for _, name, _ in some], series)
        figures.append(
            _figure(
                title,
                f"The same queries under other settings: {what}. Numbers are ef_search"
                + (", those with × oversampling." if quantised else "."),
                [("index", "one"), *([("oversampling", "three dots")] if quantised else []), ("exact", "two dots")],
                chart,
                tabled,
            )
        )
    return figures


def _label(setting: str, value: str) -> str:
    return {"ef_search": value, "oversampling": f"×{value}"}.get(setting, setting)


def _figure(title: str, said: str, keys: Iterable[tuple[str, str]], chart: Chart, tabled: str) -> str:
    legend = "".join(f'<span class="key {series}">{text(name)}</span>' for name, series in keys)
    return (
        f"<figure><figcaption><h3>{text(title)}</h3><p>{text(said)}</p>{legend}</figcaption>{chart.svg()}"
        f"<details><summary>The figures as a table</summary><div class=inside>{tabled}</div></details></figure>"
    )


def _edges(values: Sequence[float]) -> list[float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = np.floor(low * 20) / 20, np.ceil(high * 20) / 20
    return [float(edge) for edge in np.linspace(low, max(high, low + 0.05), 26)]


def _share(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"

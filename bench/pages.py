"""The tables of docs/benchmarks.md, written from what the other commands measured (docs/benchmarks/*.json).

    python -m bench.pages

What stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced; the words around it are ours.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from bench.timing import RESULTS

PAGE = RESULTS.parent / "benchmarks.md"
Row = Mapping[str, Any]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns but the first are aligned right where they hold figures."""
    figures = [all(re.fullmatch(r"[\d.,:×–() %-]*", row[n]) for row in rows) for n in range(len(headings))]
    rule = ["---:" if n and each else "---" for n, each in enumerate(figures)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))


def facts(record: Row) -> Iterator[str]:
    """Where it was measured, and what was promised and came out."""
    where = record["surroundings"]
    yield "Measured " + "; ".join(f"{name} {value}" if name != "date" else value for name, value in where.items()) + "."
    if verdict := record.get("verdict"):
        yield "\n".join(f"- {name}: **{' '.join(value.split())}**" for name, value in verdict.items())


def searches(rows: Sequence[Row]) -> Iterator[str]:
    """Each tenant and filter, the guide's statement beside it."""
    by = {(row["variant"], row["tenant"], row["filter"]): row for row in rows}

    def shown(row: Row | None) -> list[str]:
        if row is None:
            return [""] * 4
        found = f"{row['rows']:.1f} of {row['expected_rows']:.0f}"
        return [f"{row['recall']:.3f}", found, f"{row['median_ms']:.2f}", f"{row['p95_ms']:.2f}"]

    columns = ("recall@10", "rows", "median ms", "p95 ms")
    yield table(
        ["tenant", "filter", "scan", *columns, *(f"guide: {name}" for name in columns)],
        [
            [tenant, name, row["strategy"], *shown(row), *shown(by.get(("guide", tenant, name)))]
            for (variant, tenant, name), row in by.items()
            if variant == "pgrecall"
        ],
    )


def peers(rows: Sequence[Row]) -> Iterator[str]:
    """A table per tenant: recall and median of every system; then requests/s."""
    by = {(row["tenant"], row["filter"], row["system"], row["clients"]): row for row in rows}
    systems = list(dict.fromkeys(row["system"] for row in rows))
    most = max(row["clients"] for row in rows)
    cases = list(dict.fromkeys((row["tenant"], row["filter"]) for row in rows))
    yield "Recall@10 and median in ms, one client:"
    yield table(
        ["tenant", "filter", *systems],
        [
            [
                *case,
                *(
                    f"{r['recall']:.3f} · {r['median_ms']:.2f}" if (r := by.get((*case, s, 1))) else "–"
                    for s in systems
                ),
            ]
            for case in cases
        ],
    )
    yield f"Requests/s, {most} clients:"
    yield table(
        ["tenant", "filter", *systems],
        [
            [*case, *(f"{r['requests_per_s']:,.0f}" if (r := by.get((*case, s, most))) else "–" for s in systems)]
            for case in cases
        ],
    )


def http(rows: Sequence[Row]) -> Iterator[str]:
    """Each tenant and kind of request."""
    ratios = ("of bare", "of pgbench")
    yield table(
        [
            "tenant",
            "request",
            "variant, workers",
            "recall@10",
            "requests/s",
            "median ms",
            "p95 ms",
            "server's CPU ms",
            *ratios,
        ],
        [
            [
                row["tenant"],
                row["field"],
                row["variant"],
                f"{row['recall']:.3f}",
                f"{row['requests_per_s']:,.0f}",
                f"{row['median_ms']:.2f}",
                f"{row['p95_ms']:.2f}",
                "" if row["server_cpu_ms"] is None else f"{row['server_cpu_ms']:.2f}",
                *("{1:.2f} ({0:.2f}–{2:.2f})".format(*row[each]) if each in row else "" for each in ratios),
            ]
            for row in rows
        ],
    )


def batch(rows: Sequence[Row]) -> Iterator[str]:
    """Each tenant, and what its searches brought."""
    yield table(
        ["tenant", "brought", "workers", "recall@10", "one by one, ms", "batch, ms", "times faster (quartiles)"],
        [
            [
                row["tenant"],
                row["field"],
                str(row["workers"]),
                "" if row["recall"] is None else f"{row['recall']:.3f}",
                f"{row['one_by_one_ms']:.0f}",
                f"{row['batch_ms']:.0f}",
                "{1:.2f} ({0:.2f}–{2:.2f})".format(*row["ratio"]),
            ]
            for row in rows
        ],
    )


def fusion(rows: Sequence[Row]) -> Iterator[str]:
    """A row for each way to search."""
    yield table(
        ["way", "nDCG@10", "p50 ms", "p95 ms"],
        [[row["way"], f"{row['ndcg']:.3f}", f"{row['median_ms']:.1f}", f"{row['p95_ms']:.1f}"] for row in rows],
    )


def growth(rows: Sequence[Row]) -> Iterator[str]:
    """A row for each size."""
    columns = {
        "hnsw_s": "HNSW s",
        "tables_mb": "tables MB",
        "hnsw_mb": "HNSW MB",
        "loading_mb": "memory, loading MB",
        "searching_mb": "memory, searching MB",
        "recall": "recall@10",
        "median_ms": "p50 ms",
        "p95_ms": "p95 ms",
        "requests_per_s": "requests/s",
        "requests_per_s_4": "4 clients",
    }
    yield table(
        ["rows", *columns.values()],
        [
            [f"{row['rows']:,}"]
            + [
                f"{row[name]:.3f}" if name == "recall" else f"{row[name]:{',.0f' if row[name] >= 20 else '.2f'}}"
                for name in columns
            ]
            for row in rows
        ],
    )


def quantisation(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each kind of vectors."""
    for name in dict.fromkeys(row["vectors"] for row in rows):
        yield f"Vectors: {name}"
        yield table(
            ["kind", "index MB", "build s", "oversampling", "recall@10", "median ms", "p95 ms", "requests/s"],
            [
                [
                    row["kind"],
                    f"{row['bytes'] / 2**20:.0f}",
                    f"{row['build_s']:.0f}",
                    str(row["oversampling"] or "exact"),
                    f"{row['recall']:.3f}",
                    f"{row['median_ms']:.2f}",
                    f"{row['p95_ms']:.2f}",
                    f"{row['requests_per_s']:,.0f}",
                ]
                for row in rows
                if row["vectors"] == name and (row["oversampling"] or row["kind"] == "full")
            ],
        )


def ingest(results: Mapping[str, Any]) -> Iterator[str]:
    """A table for each comparison, with where it was measured."""
    titles = {
        "rows": "Documents with vectors of their own, per row; ratios to a COPY into `documents` of the same round",
        "embedder": "Documents that are embedded, per chunk; ratios to the embedder alone of the same round",
        "elsewhere": "Documents that a server elsewhere embeds, per chunk; ratios to its client alone in the same round",
        "again": "Documents that did not change, per document",
        "deferred": "A load into an empty database, per row; ratios to the load with the index in place",
    }
    for name, title in titles.items():
        if name in results:
            where, rows = results[name]["surroundings"], results[name]["rows"]
            yield f"{title} ({where['date']}, load before {where['load before']}, {where['size']}, rounds {rows[0]['rounds']}):"
            yield table(
                ["variant", "wall ms", "server's CPU ms", "client's CPU ms", "speed, wall", "speed, CPU"],
                [
                    [row["variant"], *(f"{row[each]:.2f}" for each in ("wall_ms", "server_cpu_ms", "client_cpu_ms"))]
                    + [_spread(row[each]) for each in ("speed_wall", "speed_cpu")]
                    for row in rows
                ],
            )
    if "stream" in results:
        (row,) = results["stream"]["rows"]
        where = results["stream"]["surroundings"]
        tenths = ", ".join(f"{size:.0f}" for size in row["rss_at_each_tenth_mb"])
        yield (
            f"`POST /documents/stream`, {row['items']:,} documents with vectors in one request ({where['date']}, load before "
            f"{where['load before']}): {row['seconds']:,.0f} s; the server's memory {row['rss_before_mb']:.0f} MB before, "
            f"{tenths} at each tenth, {row['rss_after_mb']:.0f} after."
        )


def isolation(rows: Sequence[Row]) -> Iterator[str]:
    """Each tenant and filter, as served beside the owner on the tables."""
    yield table(
        [
            "tenant",
            "filter",
            "scan",
            "served ms",
            "served p95",
            "owner ms",
            "owner p95",
            "medians",
            "p95",
            "same indexes",
        ],
        [
            [
                row["tenant"],
                row["filter"],
                row["strategy"],
                *(f"{row[way][name]:.2f}" for way in ("served", "owner") for name in ("median_ms", "p95_ms")),
                f"{row['median_ratio']:.2f}",
                f"{row['p95_ratio']:.2f}",
                "yes" if row["same_indexes"] else "no",
            ]
            for row in rows
        ],
    )


def analysts(rows: Sequence[Row]) -> Iterator[str]:
    """Each function and what stands beside it."""
    times = ("median_ms", "p95_ms")
    yield table(
        ["tenant, what is asked", "function ms", "p95", "beside it", "ms", "p95", "medians", "same rows", "scan"],
        [
            [
                row["cell"],
                *(f"{row['function'][name]:.2f}" for name in times),
                row["against"],
                *(f"{row['beside'][name]:.2f}" for name in times),
                f"{row['ratio']:.2f}",
                f"{row['same']} of {row['rounds']}",
                row["scan"],
            ]
            for row in rows
        ],
    )


def _spread(ratios: Sequence[float]) -> str:
    middle = sorted(ratios)[len(ratios) // 2]
    return f"{middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


TABLES: dict[str, Callable[[Any], Iterator[str]]] = {
    each.__name__: each
    for each in (searches, peers, http, batch, fusion, growth, quantisation, ingest, isolation, analysts)
}


def main() -> None:
    page = PAGE.read_text()
    for name, made in TABLES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        record = msgspec.json.decode(path.read_bytes())
        text = "\n\n".join([*facts(record), *made(record["results"])])
        page, replaced = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}",
            page,
            flags=re.DOTALL,  # type: ignore[misc]
        )
        if not replaced:
            raise SystemExit(f"{PAGE} has no place for {name}")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()

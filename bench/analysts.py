"""What the functions for analysts cost: beside the statement by hand as the owner, and by words beside the API's search.

    python -m bench.analysts [--rows 50000] [--data-dir .bench] [--rounds 200]

The analyst's connection is under row-level security. By hand, the owner runs the statement that `search_documents` comes
to, with the settings of the walk already set. By words, `hybrid_search` stands beside `app.search.search` of the same
question, which goes through the service's role and views and asks the index of the words. Both of a pair ask the same
thing, one right after the other, one connection each; milliseconds are what the caller waits.
"""

import asyncio
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import psycopg

from app import analysts, local, scans, search, terminal
from app.conditions import Conditions
from app.database import Database
from app.search import Mode, Options
from app.settings import LOCAL_DIMENSIONS
from bench import data, postgres, text, timing
from bench.data import Narrowing
from bench.postgres import TOP_K, Loaded

CELLS = {
    "half, walked": ("half", "nearest", None),
    "tenth, walked": ("tenth", "nearest", None),
    "hundredth, measured": ("hundredth", "few", None),
    "half, one key, measured": ("half", "few metadata", '{"lang": "de"}'),
}
WORDS: dict[str, tuple[str, Mode, Narrowing]] = {
    "half, words": ("half", "text", Narrowing()),
    "hundredth, words": ("hundredth", "text", Narrowing()),
    "half, words, one type": ("half", "text", Narrowing(doc_type="faq")),
    "half, words and vector": ("half", "hybrid", Narrowing()),
}
CANDIDATES = 40
QUESTIONS_OF = 2_000
"""Rows from whose texts the questions are taken."""

Rows = list[tuple[Any, ...]]


class Pair(NamedTuple):
    """The function and what stands beside it, each of which gives ids and scores, and the scan that the function told."""

    function: Callable[[int], tuple[Rows, str]]
    beside: Callable[[int], Awaitable[Rows]]


def by_hand(fragment: str, condition: str) -> str:
    """The statement of the builder, values named as psycopg has them."""
    known = {each.name: each.sql for each in analysts.fragments()}
    sql = known[fragment].replace("{order}", known["order full"]).replace("{conditions}", condition)
    sql = sql.replace("{dimensions}", str(LOCAL_DIMENSIONS)).replace("%", "%%")
    for number, name in reversed(list(enumerate(analysts.PARAMETERS, 1))):
        sql = sql.replace(f"${number}", f"%({name})s" + ("::vector" if name == "embedding" else ""))
    return sql


def prepared(owner: psycopg.Connection[Any]) -> None:
    """Let the analyst in, and let the corpus have its words, by whose counts a large tenant is known."""
    owner.execute(local.ADMIT_ANALYST, (local.ANALYST,))
    owner.execute("select '[1]'::vector")
    if not owner.execute("select from document_terms limit 1").fetchall():
        owner.execute("truncate collection_statistics, term_statistics")
        owner.execute("call fill_terms()")
        owner.execute("vacuum analyze document_terms, term_statistics, collection_statistics")


def nearest(
    owner: psycopg.Connection[Any],
    analyst: psycopg.Connection[Any],
    queries: Sequence[str],
    tenant: str,
    fragment: str,
    metadata: str | None,
) -> Pair:
    """`search_documents` beside its statement."""
    config = scans.index_config(250, CANDIDATES) if fragment == "nearest" else scans.EXACT | {"enable_sort": "on"}
    for setting, value in config.items():
        owner.execute("select set_config(%s, %s, false)", (setting, value))
    condition = "true"
    if metadata is not None:
        ((condition,),) = owner.execute("select metadata_condition(%s)", (metadata,)).fetchall()
    statement = by_hand(fragment, condition)
    asked = "select id, similarity, scan from search_documents(%s, %s, %s, metadata => %s)"
    places = (1, -1) if fragment != "nearest" else (2, -1)
    fixed = {"tenant_id": tenant, "top_k": TOP_K, "bound": 20_001, "candidates": CANDIDATES, "threshold": float("-inf")}

    def function(number: int) -> tuple[Rows, str]:
        found = analyst.execute(asked, (tenant, queries[number % len(queries)], TOP_K, metadata)).fetchall()
        return [row[:2] for row in found], found[0][2]

    async def beside(number: int) -> Rows:
        rows = owner.execute(statement, fixed | {"embedding": queries[number % len(queries)]}).fetchall()
        return [tuple(row[place] for place in places) for row in rows]

    return Pair(function, beside)


def words(
    service: Database,
    analyst: psycopg.Connection[Any],
    loaded: Loaded,
    questions: Sequence[str],
    tenant: str,
    mode: Mode,
    narrowing: Narrowing,
) -> Pair:
    """`hybrid_search` beside the API's search."""
    conditions: Conditions = postgres.conditions(narrowing)
    options = Options(mode=mode)
    asked = "select id, score, scan from hybrid_search(%s, %s, %s, %s, doc_type => %s)"

    def vector(number: int) -> Any:
        return loaded.corpus.queries[number % len(loaded.corpus.queries)] if mode == "hybrid" else None

    def function(number: int) -> tuple[Rows, str]:
        query = vector(number)
        written = None if query is None else literal(query)
        values = (tenant, questions[number % len(questions)], written, TOP_K, narrowing.doc_type)
        found = analyst.execute(asked, values).fetchall()
        return [row[:2] for row in found], found[0][2] if found else ""

    async def beside(number: int) -> Rows:
        found = await search.search(
            service,
            loaded.settings,
            tenant,
            vector(number),
            question=questions[number % len(questions)],
            top_k=TOP_K,
            conditions=conditions,
            options=options,
        )
        return [(hit.id, hit.score) for hit in found.hits]

    return Pair(function, beside)


def literal(vector: Any) -> str:
    """A vector as PostgreSQL reads it."""
    return "[" + ",".join(map(str, vector)) + "]"


async def cell(pair: Pair, rounds: int) -> dict[str, Any]:
    """Milliseconds of both, how often they gave the same rows, and how the function searched."""
    took: tuple[list[float], list[float]] = ([], [])
    same, scan = 0, ""
    for number in range(rounds):
        begun = time.perf_counter()
        found, scan = pair.function(number)
        between = time.perf_counter()
        expected = await pair.beside(number)
        took[1].append(time.perf_counter() - between)
        took[0].append(between - begun)
        same += found == expected
    function, beside = ({"median_ms": 1e3 * statistics.median(e), "p95_ms": timing.quantile(e, 0.95)} for e in took)
    ratio = function["median_ms"] / beside["median_ms"]
    return {"function": function, "beside": beside, "ratio": ratio, "same": same, "rounds": rounds, "scan": scan}


async def measured(
    loaded: Loaded, owner: psycopg.Connection[Any], analyst: psycopg.Connection[Any], rounds: int
) -> list[dict[str, Any]]:
    """Every cell."""
    queries = [literal(vector) for vector in loaded.corpus.queries]
    questions, _ = text.questions(Random(5), [data.content(number) for number in range(QUESTIONS_OF)])
    service = Database(loaded.settings, loaded.service_url)
    try:
        rows = []
        for name, asked in CELLS.items():
            pair = nearest(owner, analyst, queries, *asked)
            rows.append({"cell": name, "against": "by hand, as owner"} | await cell(pair, rounds))
        for name, meant in WORDS.items():
            pair = words(service, analyst, loaded, questions, *meant)
            rows.append({"cell": name, "against": "the API's search"} | await cell(pair, rounds))
        return rows
    finally:
        await service.close()


def main() -> None:
    """Print the medians and their ratio, and keep them for the page."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    options = timing.arguments(parser, rows=50_000)
    with postgres.started(options.data_dir) as server:
        loaded = postgres.loaded(server, options.rows)
        with (
            psycopg.connect(loaded.owner_url, autocommit=True) as owner,
            psycopg.connect(server.url(local.ANALYST, loaded.name), autocommit=True) as analyst,
        ):
            prepared(owner)
            where = timing.surroundings(loaded.owner_url) | {
                "rows": f"{options.rows:,} of {LOCAL_DIMENSIONS} dimensions",
                "rounds": str(options.rounds),
            }
            rows = asyncio.run(measured(loaded, owner, analyst, options.rounds))
    timing.say(where)
    headings = ["cell", "function ms", "beside it", "ms", "ratio", "the same rows", "scan"]
    terminal.table("what functions for analysts cost", [(each, "left") for each in headings], list(shown(rows)))
    timing.save(options.out, "analysts", {"surroundings": where, "results": rows}, draw)


def shown(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The rows of the table."""
    for row in rows:
        times = (f"{row[each]['median_ms']:.2f}" for each in ("function", "beside"))
        yield (
            row["cell"],
            next(times),
            row["against"],
            next(times),
            f"{row['ratio']:.2f}",
            f"{row['same']} of {row['rounds']}",
            row["scan"],
        )


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """The ratio of each cell."""
    _, axes = pyplot.subplots(figsize=(7, 3.5))
    rows = record["results"]
    axes.barh([row["cell"] for row in rows], [row["ratio"] for row in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("median of the function / of what stands beside it")


if __name__ == "__main__":
    main()

"""What `search_documents` costs an analyst against the statement it runs, written out by hand and run by the owner.

    python -m bench.analysts [--rows 50000] [--data-dir .bench] [--rounds 200]

The owner's session has the settings of the walk already and no row-level security. Both ask with the same vectors in turn,
by psycopg with the vector as text, on one connection each; milliseconds are what the client waits. `walk` is a tenant whose
index is walked, `measured` one whose every row is.
"""

import statistics
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import psycopg

from app import analysts, local, scans, terminal
from app.settings import LOCAL_DIMENSIONS
from bench import postgres
from bench.postgres import TOP_K

CELLS = {
    "half, walked": ("half", "nearest", None),
    "tenth, walked": ("tenth", "nearest", None),
    "hundredth, measured": ("hundredth", "few", None),
    "half, one key, measured": ("half", "few metadata", '{"lang": "de"}'),
}
CANDIDATES = 40


def by_hand(fragment: str, condition: str) -> str:
    """The statement of the builder, values named as psycopg has them."""
    known = {each.name: each.sql for each in analysts.fragments()}
    text = known[fragment].replace("{order}", known["order full"]).replace("{conditions}", condition)
    text = text.replace("{dimensions}", str(LOCAL_DIMENSIONS)).replace("%", "%%")
    for number, name in reversed(list(enumerate(analysts.PARAMETERS, 1))):
        text = text.replace(f"${number}", f"%({name})s" + ("::vector" if name == "embedding" else ""))
    return text


def main() -> None:
    """Print the medians and their ratio."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--data-dir", type=Path, default=Path(".bench"))
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    with postgres.started(arguments.data_dir) as server:
        loaded = postgres.loaded(server, arguments.rows)
        queries = ["[" + ",".join(map(str, vector)) + "]" for vector in loaded.corpus.queries]
        with (
            psycopg.connect(loaded.owner_url, autocommit=True) as owner,
            psycopg.connect(server.url(local.ANALYST, loaded.name), autocommit=True) as analyst,
        ):
            owner.execute(local.ADMIT_ANALYST, (local.ANALYST,))
            owner.execute("select '[1]'::vector")
            # As `learn_terms` keeps them, by which a large tenant is known; the corpus is filled without its words.
            owner.execute("truncate collection_statistics")
            owner.execute("insert into collection_statistics select tenant_id, count(*), 1 from documents group by 1")
            rows = []
            for name, (tenant, fragment, metadata) in CELLS.items():
                rows.append((name, *_cell(owner, analyst, tenant, fragment, metadata, queries, arguments.rounds)))
    headings = [
        ("cell", "left"),
        *((each, "right") for each in ("function ms", "by hand ms", "ratio", "the same rows", "scan")),
    ]
    terminal.table(f"{arguments.rows:,} rows, {arguments.rounds} rounds, medians", headings, rows)


def _cell(
    owner: psycopg.Connection[Any],
    analyst: psycopg.Connection[Any],
    tenant: str,
    fragment: str,
    metadata: str | None,
    queries: list[str],
    rounds: int,
) -> tuple[str, ...]:
    config = scans.index_config(250, CANDIDATES) if fragment == "nearest" else scans.EXACT | {"enable_sort": "on"}
    for setting, value in config.items():
        owner.execute("select set_config(%s, %s, false)", (setting, value))
    condition = "true"
    if metadata is not None:
        ((condition,),) = owner.execute("select metadata_condition(%s)", (metadata,)).fetchall()
    statement = by_hand(fragment, condition)
    asked = "select id, similarity, scan from search_documents(%s, %s, %s, metadata => %s)"
    took: tuple[list[float], list[float]] = ([], [])
    same, scan = 0, ""
    for number in range(rounds):
        query = queries[number % len(queries)]
        begun = time.perf_counter()
        found = analyst.execute(asked, (tenant, query, TOP_K, metadata)).fetchall()
        between = time.perf_counter()
        values = {"tenant_id": tenant, "embedding": query, "top_k": TOP_K, "bound": 20_001, "candidates": CANDIDATES}
        expected = owner.execute(statement, values | {"threshold": float("-inf")}).fetchall()
        took[1].append(time.perf_counter() - between)
        took[0].append(between - begun)
        places = (1, -1) if fragment != "nearest" else (2, -1)
        same += [row[:2] for row in found] == [tuple(row[place] for place in places) for row in expected]
        scan = found[0][2]
    function, hand = (1000 * statistics.median(each) for each in took)
    return f"{function:.2f}", f"{hand:.2f}", f"{function / hand:.2f}", f"{same}/{rounds}", scan


if __name__ == "__main__":
    main()

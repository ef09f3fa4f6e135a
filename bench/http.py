"""HTTP search throughput against a bare handler in the same server, and against pgbench: the same transactions, in turns.

    python -m bench.http [--rows 200000] [--data-dir .bench] [--rounds 15] [--clients 4]

Each search's transactions (role, tenant, limits, statements) are recorded once from `app.search.search`. The bare handler
(bench/bare.py) runs them on a bare psycopg connection, in pgrecall's own server and with as many workers; pgbench runs
them from C, one packet each. pgrecall is asked over HTTP: once with the vector as JSON numbers in `embedding`, once
with a text in `query`, the same few texts again and again. The vectors of `query` are the texts' own, and so are those
of the runs it is compared with. The load (bench/load.py) is one process with epoll. The table shows the CPU that a
request takes of the server's processes (without PostgreSQL) and of the load: on a busy machine the steadier figures. Every
variant has to give the rows that were recorded, so that recall@10 is one for all of a case.
"""

import asyncio
import dataclasses
import itertools
import json
import pickle
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from app import terminal
from app.embedding import open_embedder
from app.settings import Settings
from bench import data, postgres, served, timing, transactions
from bench.data import TENANTS, Vectors
from bench.load import Load, request
from bench.postgres import Loaded
from bench.served import Serving
from bench.timing import Sample

QUESTIONS = 16
WORKERS = (1, 2)
SECONDS = 0.5
"""Of one turn."""
SCRIPTS = 4
"""Of pgbench: each is prepared on each of its connections, which are new every turn."""
LEAST = {"bare": 0.8, "pgbench": 0.4}
"""The ratios of requests/s that are promised."""
PGBENCH = "pgbench"


class Case(NamedTuple):
    """What is asked: whose documents, and what the request brings."""

    tenant: str
    field: str


Turn = Callable[[], Sample]


def texts() -> list[str]:
    """Questions that differ, a line each."""
    names = sorted(topics)[:: len(topics) // QUESTIONS][:QUESTIONS]
    return [f"What does the reference say about {name.lower()}, and when does it matter?" for name in names]


async def embedded(settings: Settings, questions: Sequence[str]) -> Vectors:
    """The local model's vectors."""
    embedder = open_embedder(settings)
    try:
        return await embedder.embed(questions, "query")
    finally:
        await embedder.aclose()


def variants(
    loaded: Loaded, vectors: Mapping[str, Vectors], tenants: Sequence[str], clients: int, opened: ExitStack
) -> tuple[dict[Case, dict[str, Turn]], dict[Case, float]]:
    """Everything started: a turn of each variant for each case, and the case's recall@10, the same for all variants."""
    folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
    cases = [Case(tenant, field) for tenant in tenants for field in vectors]
    recorded = {
        case: asyncio.run(transactions.recorded(loaded.settings, loaded.service_url, case.tenant, vectors[case.field]))
        for case in cases
    }
    kept = folder / "searches"
    kept.write_bytes(pickle.dumps({f"{c.tenant}-{c.field}": found[0] for c, found in recorded.items()}))
    load = opened.enter_context(Load())
    servers = {f"pgrecall, {n}": opened.enter_context(served.pgrecall(loaded.service_url, n)) for n in WORKERS}
    servers |= {f"bare, {n}": opened.enter_context(served.bare(loaded.service_url, str(kept), n)) for n in WORKERS}
    made: dict[Case, dict[str, Turn]] = {}
    recalls: dict[Case, float] = {}
    for case, (searches, expected) in recorded.items():
        made[case] = {}
        asked = dataclasses.replace(loaded.corpus, queries=vectors[case.field])
        truth = asked.truth(case.tenant, NOTHING, postgres.TOP_K)
        recalls[case] = fmean(data.recall(ids, best) for ids, best in zip(expected, truth, strict=True))
        for name, serving in servers.items():
            base = serving.address
            requests = [
                request(f"{base}/search", postgres.body(case.tenant, NOTHING, **{case.field: value}))
                if name.startswith("pgrecall")
                else request(f"{base}/bare/{case.tenant}-{case.field}/{number}")
                for number, value in enumerate(texts() if case.field == "query" else vectors[case.field].tolist())
            ]
            for _ in range(4):  # every worker prepares the statements on several connections
                bodies = load.turn(base, requests * 4, clients, 0).bodies
            for number, ids in enumerate(expected):
                found = [hit["id"] for hit in json.loads(bodies[number])["results"]]
                if found != ids:
                    raise SystemExit(f"{name} found {found} for {case.tenant}, {case.field} {number}, not {ids}")
            made[case][name] = partial(_http, load, serving, requests, clients)
        made[case][PGBENCH] = _pgbench(loaded, transactions.write_scripts(searches[:SCRIPTS], folder), clients, folder)
    return made, recalls


NOTHING = data.Narrowing()


def _http(load: Load, serving: Serving, requests: Sequence[bytes], clients: int) -> Sample:
    before = serving.cpu()
    sample = load.turn(serving.address, requests, clients, SECONDS).sample
    return sample._replace(server=serving.cpu() - before)


def _pgbench(loaded: Loaded, scripts: list[str], clients: int, folder: Path) -> Turn:
    # It counts transactions, not seconds: as many as fit a turn, from what the last one took.
    each = 40

    def turn() -> Sample:
        nonlocal each
        sample = transactions.pgbench(loaded.service_url, scripts, clients, each, folder)
        each = max(20, round(SECONDS * len(sample.latencies) / sample.elapsed / clients))
        return sample

    turn()
    return turn


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of every variant (15)")
    parser.add_argument("--clients", type=int, default=4, help="connections at once (4)")
    parser.add_argument("--tenants", nargs="+", choices=list(TENANTS), default=list(TENANTS), help="whose documents")
    options = timing.arguments(parser)
    samples: dict[tuple[Case, str], list[Sample]] = {}
    with postgres.started(options.data_dir) as server, ExitStack() as opened:
        loaded = postgres.loaded(server, options.rows)
        where = timing.surroundings(loaded.service_url, ("litestar", "uvicorn", "msgspec"))
        where |= {"rows": f"{options.rows:,} of 384 dimensions", "clients": str(options.clients)}
        vectors = {
            "embedding": loaded.corpus.queries[:QUESTIONS],
            "query": asyncio.run(embedded(loaded.settings, texts())),
        }
        cases, recalls = variants(loaded, vectors, options.tenants, options.clients, opened)
        with terminal.progress("rounds") as progress:
            for number in progress.track(range(options.rounds), description="measuring"):
                for case, turns in cases.items():
                    names = list(turns)
                    for name in names[number % len(names) :] + names[: number % len(names)]:
                        samples.setdefault((case, name), []).append(turns[name]())
    results = [row(case, name, found, samples) | {"recall": recalls[case]} for (case, name), found in samples.items()]
    verdict = judged(results)
    timing.say(where)
    show(results)
    timing.say(verdict)
    timing.save(options.out, "http", {"surroundings": where, "verdict": verdict, "results": results}, draw)


def row(
    case: Case, name: str, found: Sequence[Sample], samples: Mapping[tuple[Case, str], Sequence[Sample]]
) -> dict[str, Any]:
    """Figures, and the quartiles of the rounds' ratios of requests/s."""
    made = case._asdict() | {"variant": name} | timing.figures(found)
    if name.startswith("pgrecall"):
        for against in (name.replace("pgrecall", "bare"), PGBENCH):
            ratios = [
                (len(ours.latencies) / ours.elapsed) / (len(theirs.latencies) / theirs.elapsed)
                for ours, theirs in zip(found, samples[case, against], strict=True)
            ]
            made[f"of {against.partition(',')[0]}"] = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return made


def judged(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The promised ratios, the worst over tenants, for each kind of request and number of workers."""
    verdict = {}
    own = [row for row in results if row["variant"].startswith("pgrecall")]
    for (field, variant), against in itertools.product(
        dict.fromkeys((row["field"], row["variant"]) for row in own), LEAST
    ):
        rows = [row for row in own if (row["field"], row["variant"]) == (field, variant)]
        worst = min(rows, key=lambda row: row[f"of {against}"][1])
        verdict[f"{variant} workers, {field}, of {against} (at least {LEAST[against]:g})"] = (
            f"{worst[f'of {against}'][1]:.2f} ({worst['tenant']})"
        )
    return verdict


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table per tenant."""
    numbers = (
        "recall@10",
        "requests/s",
        "median ms",
        "p95 ms",
        "server's CPU ms",
        "load's",
        "of bare (quartiles)",
        "of pgbench (quartiles)",
    )
    for tenant in dict.fromkeys(row["tenant"] for row in results):
        terminal.table(
            f"tenant {tenant}",
            [("request", "left"), ("variant, workers", "left"), *((name, "right") for name in numbers)],
            [
                (
                    row["field"],
                    row["variant"],
                    f"{row['recall']:.3f}",
                    f"{row['requests_per_s']:.0f}",
                    f"{row['median_ms']:.2f}",
                    f"{row['p95_ms']:.2f}",
                    *("" if row[cpu] is None else f"{row[cpu]:.2f}" for cpu in ("server_cpu_ms", "client_cpu_ms")),
                    *("{1:.2f} ({0:.2f}–{2:.2f})".format(*row[f"of {a}"]) if f"of {a}" in row else "" for a in LEAST),
                )
                for row in results
                if row["tenant"] == tenant
            ],
        )


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """Requests/s of each variant, by tenant and kind of request."""
    rows = record["results"]
    cases = list(dict.fromkeys((row["tenant"], row["field"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    colours = dict(zip(names, ("#1f6f8b", "#6fb1c7", "#d98324", "#efbe84", "#777777"), strict=True))
    _, axes = pyplot.subplots(figsize=(11, 4.5))
    for offset, name in enumerate(names):
        shown = [row for row in rows if row["variant"] == name]
        places = [cases.index((row["tenant"], row["field"])) + 0.16 * offset for row in shown]
        axes.bar(places, [row["requests_per_s"] for row in shown], 0.16, color=colours[name], label=name)
    axes.set_xticks([n + 0.32 for n in range(len(cases))], [f"{tenant}\n{field}" for tenant, field in cases])
    axes.set_ylabel("requests/s")
    axes.legend(frameon=False, ncols=len(names))


if __name__ == "__main__":
    main()

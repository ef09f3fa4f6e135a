"""pgrecall beside chromadb, qdrant-edge-py and langchain-postgres: the same vectors, tenants, filters, queries and run.

    python -m bench.peers [--rows 200000] [--data-dir .bench] [--rounds 5] [--seconds 0.4] [--workers 2]

The peers are installed once into DATA_DIR/venv from bench/requirements.txt and run in processes of their own
(bench/peer.py); langchain-postgres uses the same PostgreSQL. Every turn is short, and all systems take one before any
takes the next.

- `pgrecall, database`: `app.search.search` in this process, as `qdrant` is in its own: no HTTP.
- `pgrecall, HTTP` (`pgrecall serve --workers N`) and `chroma` (`chroma run`) get the same requests' bytes from the same
  load process (bench/load.py), vectors as JSON numbers; neither client library is in the way. Every system returns the
  ten rows with text and metadata.
- `chroma, own collection` holds each tenant in a collection of its own: what Chroma is good at.
- `pgrecall, as found` is `pgrecall, HTTP` where there is no filter, with the smallest `ef_search` of EF_SEARCH that finds
  no less than Chroma does: the default finds more, and takes longer for it.

The whole corpus (`all`) is for pgrecall a database with one tenant, for the others a search without a tenant.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from app import local, search, terminal
from app.database import Database
from bench import data, postgres, served, timing
from bench.data import EVERYTHING, FILTERS, TENANTS, Corpus, Narrowing
from bench.load import Load, request
from bench.peer import checksum
from bench.postgres import TOP_K, Loaded
from bench.timing import Sample

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CLIENTS = (1, 4)
ALL = "all"
WARM_UP = 20
"""Requests of each system and case before anything is measured; a slow one stops after a second."""
UNDER_MS, TIMES_QDRANT = 2.0, 3.0
"""pgrecall's database time is promised to be within this many times Qdrant's median, or under so many ms."""
LEEWAY = 0.01
"""Recall that is lower by less is as good."""
EF_SEARCH = (10, 20, 30, 40, 60, 80, 100, 150, 250)
"""Breadths of a walk to choose from."""
TIMES_CHROMA = {"none": 2.0, "key 10 %": 20.0}
"""pgrecall's requests/s over HTTP, of Chroma's, over the whole corpus: without a filter and with one on metadata."""


class Case(NamedTuple):
    """What is searched."""

    tenant: str
    filter: str


class Turn(NamedTuple):
    """A sample, and the ids found for each query that was asked."""

    sample: Sample
    ids: Mapping[int, Sequence[str]]


Ask = Callable[[int, float], Turn]
"""A turn of one system in one case: clients, seconds."""


class Peer:
    """A peer's process, loaded."""

    def __init__(self, python: Path, name: str, folder: Path, rows: int, address: str, corpus: Corpus) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [str(python), "-m", "bench.peer", name, str(folder.absolute()), str(rows), address]
        root = Path(__file__).resolve().parent.parent
        environ = os.environ | {"ANONYMIZED_TELEMETRY": "False", "PYTHONWARNINGS": "ignore"}
        environ.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environ
        )
        self.name = name
        self.loaded = self.told()
        if self.loaded["checksum"] != checksum(corpus):
            raise SystemExit(f"{name} was given other data: {self.loaded['checksum']}, not {checksum(corpus)}")

    def told(self) -> dict[str, Any]:
        """The next line it says."""
        line = (self._process.stdout or sys.stdin).readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}; why stands above")
        said: dict[str, Any] = json.loads(line)
        return said

    def turn(self, case: Case, clients: int, seconds: float) -> Turn:
        """A turn over there."""
        tenant = None if case.tenant == ALL else case.tenant
        asked = {"tenant": tenant, "filter": case.filter, "clients": clients, "seconds": seconds}
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        said = self.told()
        ids = {int(number): found for number, found in said["ids"].items()}
        return Turn(Sample(said["latencies"], said["elapsed"], said["cpu"]), ids)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def installed(data_dir: Path) -> Path:
    """The peers' Python, installed once for these requirements."""
    folder = (data_dir / "venv").absolute()
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != REQUIREMENTS.read_text():
        terminal.say(f"installing the peers into {data_dir / 'venv'} (once, a minute or two)")
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(folder / "bin/python"), "-I", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
        done.write_text(REQUIREMENTS.read_text())
    return folder / "bin/python"


@contextmanager
def chroma_server(python: Path, folder: Path, log: Path) -> Iterator[str]:
    """`chroma run` on a free port; its address."""
    port = _free_port()
    where = ("--path", str(folder.absolute()), "--host", "127.0.0.1", "--port", str(port))
    command = [str(python.with_name("chroma")), "run", *where]
    environ = os.environ | {"ANONYMIZED_TELEMETRY": "False"}
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said, env=environ) as process:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"{address}/api/v2/heartbeat", timeout=1).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"chroma run ended with status {process.returncode}; see {log}") from None
                    time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def in_process(runner: asyncio.Runner, database: Database, loaded: Loaded, case: Case) -> Ask:
    """The search as pgrecall serves it, without HTTP."""
    asked, tenant = postgres.conditions(FILTERS[case.filter]), EVERYTHING if case.tenant == ALL else case.tenant

    def ask(clients: int, seconds: float) -> Turn:
        ids: dict[int, list[str]] = {}

        async def one(number: int) -> None:
            query = loaded.corpus.queries[number]
            found = await search.search(database, loaded.settings, tenant, query, top_k=TOP_K, conditions=asked)
            ids[number] = [hit.id for hit in found.hits]

        numbers = range(len(loaded.corpus.queries))
        return Turn(runner.run(timing.measured([one] * clients, numbers, seconds)), ids)

    return ask


def over_http(load: Load, address: str, requests: Sequence[bytes], read: Callable[[Any], list[str]]) -> Ask:
    """A server under the load; `read` takes the ids from an answer."""

    def ask(clients: int, seconds: float) -> Turn:
        sample, bodies = load.turn(address, requests, clients, seconds)
        return Turn(sample, {number: read(json.loads(body)) for number, body in bodies.items()})

    return ask


def pgrecall_http(load: Load, address: str, corpus: Corpus, case: Case, **options: Any) -> Ask:
    """The server of pgrecall, asked with these options."""
    tenant = EVERYTHING if case.tenant == ALL else case.tenant
    bodies = [postgres.body(tenant, FILTERS[case.filter], embedding=q, **options) for q in corpus.queries.tolist()]
    requests = [request(f"{address}/search", body) for body in bodies]
    return over_http(load, address, requests, lambda answer: [hit["id"] for hit in answer["results"]])


def as_found(asks: Mapping[str, Ask], rivals: Mapping[int, Ask], truth: Sequence[frozenset[str]]) -> dict[str, Ask]:
    """Of `rivals`, by ef_search, the narrowest walk that finds no less than Chroma where it is good at it."""
    strongest = asks.get("chroma, own collection", asks["chroma"])

    def recall(ask: Ask) -> float:
        ids: dict[int, Sequence[str]] = {}
        for _ in range(20):
            ids |= ask(max(CLIENTS), 0.3).ids
            if len(ids) == len(truth):
                break
        return fmean(data.recall(found, truth[number]) for number, found in ids.items())

    least = recall(strongest)
    for breadth, ask in rivals.items():
        if recall(ask) >= least:
            terminal.say(f"as much as Chroma finds ({least:.3f}) takes ef_search {breadth}")
            return {"pgrecall, as found": ask}
    return {}


def chroma_http(load: Load, address: str, collection: str, corpus: Corpus, tenant: str | None, case: Case) -> Ask:
    """Chroma's server."""
    url = f"{address}/api/v2/tenants/default_tenant/databases/default_database/collections/{collection}/query"
    narrowing: Narrowing = FILTERS[case.filter]
    clauses: list[dict[str, Any]] = [{"tenant": tenant}] if tenant is not None else []
    if narrowing.doc_type is not None:
        clauses.append({"doc_type": narrowing.doc_type})
    clauses += [{key: value} for key, value in (narrowing.metadata or {}).items()]
    if narrowing.days is not None:
        clauses += [{"day": {"$gte": narrowing.days[0]}}, {"day": {"$lt": narrowing.days[1]}}]
    where = {"where": clauses[0] if len(clauses) == 1 else {"$and": clauses}} if clauses else {}
    shown = {"n_results": TOP_K, "include": ["documents", "metadatas", "distances"]} | where
    requests = [request(url, {"query_embeddings": [query], **shown}) for query in corpus.queries.tolist()]
    return over_http(load, address, requests, lambda answer: answer["ids"][0])


class Ready(NamedTuple):
    """Everything loaded and started: a turn of each system for each case, pgrecall's by ef_search, seconds of loading."""

    mixed: Loaded
    cases: dict[Case, dict[str, Ask]]
    rivals: dict[Case, dict[int, Ask]]
    took: dict[str, str]


def systems(options: Namespace, opened: ExitStack) -> Ready:
    """All of them, until `opened` closes."""
    python = installed(options.data_dir)
    server = opened.enter_context(postgres.started(options.data_dir))
    mixed = postgres.loaded(server, options.rows)
    single = postgres.loaded(server, options.rows, "single")
    corpus, folder = mixed.corpus, options.data_dir / f"peers-{options.rows}-{postgres.made_by()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    local.bootstrap(server.url(), "langchain")
    chroma = opened.enter_context(chroma_server(python, folder / "chroma", folder / "chroma.log"))
    addresses = {"qdrant": "", "chroma": chroma, "langchain": server.url(local.OWNER, "langchain")}
    peers = {}
    for name, address in addresses.items():
        peers[name] = Peer(python, name, folder / name, options.rows, address, corpus)
        opened.callback(peers[name].close)
    collections = peers["chroma"].loaded["collections"]
    load = opened.enter_context(Load())
    runner = opened.enter_context(asyncio.Runner())
    loads = {ALL: single} | dict.fromkeys(TENANTS, mixed)
    databases, bases = {}, {}
    for loaded in (mixed, single):
        databases[loaded.name] = Database(loaded.settings, loaded.service_url)
        opened.callback(lambda each: runner.run(each.close()), databases[loaded.name])
        bases[loaded.name] = opened.enter_context(served.pgrecall(loaded.service_url, options.workers)).address
    made: dict[Case, dict[str, Ask]] = {}
    rivals: dict[Case, dict[int, Ask]] = {}
    for tenant, loaded in loads.items():
        # The three rare rows are other ones in the database of one tenant: there is no common answer.
        names = [name for name in FILTERS if (tenant, name) != (ALL, "3 rows")]
        for case in (Case(tenant, name) for name in names):
            made[case] = {
                "pgrecall, database": in_process(runner, databases[loaded.name], loaded, case),
                "pgrecall, HTTP": pgrecall_http(load, bases[loaded.name], corpus, case),
                "qdrant": partial(peers["qdrant"].turn, case),
                "chroma": chroma_http(
                    load, chroma, collections["all"], corpus, None if tenant == ALL else tenant, case
                ),
                "langchain": partial(peers["langchain"].turn, case),
            }
            if tenant != ALL:
                own = chroma_http(load, chroma, collections[tenant], corpus, None, case)
                made[case]["chroma, own collection"] = own
            if case.filter == "none":
                rivals[case] = {
                    breadth: pgrecall_http(
                        load, bases[loaded.name], corpus, case, ef_search=breadth, oversampling=1, rescore=True
                    )
                    for breadth in EF_SEARCH
                }
    took = {"pgrecall": sum(mixed.took.values())} | {name: peer.loaded["loaded"] for name, peer in peers.items()}
    return Ready(mixed, made, rivals, {name: f"{seconds:.0f}" for name, seconds in took.items()})


class Seen(NamedTuple):
    """What one system did in one case with one number of clients."""

    samples: list[Sample]
    ids: dict[int, Sequence[str]]


def measure(cases: Mapping[Case, Mapping[str, Ask]], rounds: int, seconds: float) -> dict[tuple[Case, str, int], Seen]:
    """Turns of all systems, round after round."""
    seen: dict[tuple[Case, str, int], Seen] = {}
    with terminal.progress("turns") as progress:
        task = progress.add_task("measuring", total=rounds * len(cases) * len(CLIENTS))
        for number in range(rounds):
            for case, asks in cases.items():
                names = list(asks)
                for clients in CLIENTS:
                    for name in names[number % len(names) :] + names[: number % len(names)]:
                        asks[name](clients, min(seconds / 4, 0.1))  # its pages and caches, not the last one's
                        turn = asks[name](clients, seconds)
                        found = seen.setdefault((case, name, clients), Seen([], {}))
                        found.samples.append(turn.sample)
                        found.ids.update(turn.ids)
                    progress.advance(task)
    return seen


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of every system, case and number of clients (5)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of one turn (0.4)")
    parser.add_argument("--workers", type=int, default=2, help="of pgrecall's server (2)")
    options = timing.arguments(parser)
    with ExitStack() as opened:
        mixed, cases, rivals, took = systems(options, opened)
        where = timing.surroundings(mixed.service_url)
        where |= {"rows": f"{options.rows:,} of 384 dimensions", "workers": str(options.workers)}
        where["peers"] = ", ".join(REQUIREMENTS.read_text().split("\n")[1:]).strip(", ")
        where["seconds to load, 0 if loaded before"] = ", ".join(f"{name} {each}" for name, each in took.items())
        truth = {
            case: mixed.corpus.truth(None if case.tenant == ALL else case.tenant, FILTERS[case.filter], TOP_K)
            for case in cases
        }
        for case, narrow in rivals.items():
            cases[case] |= as_found(cases[case], narrow, truth[case])
        seen = measure(cases, options.rounds, options.seconds)
    results = [row(case, name, clients, found, truth[case]) for (case, name, clients), found in seen.items()]
    verdict = judged(results)
    timing.say(where)
    show(results)
    timing.say(verdict)
    timing.save(options.out, "peers", {"surroundings": where, "verdict": verdict, "results": results}, draw)


def row(case: Case, name: str, clients: int, found: Seen, truth: Sequence[frozenset[str]]) -> dict[str, Any]:
    """Figures of one system."""
    made = case._asdict() | {"system": name, "clients": clients} | timing.figures(found.samples)
    return made | {
        "recall": fmean(data.recall(ids, truth[number]) for number, ids in found.ids.items()),
        "rows": fmean(len(ids) for ids in found.ids.values()),
        "expected_rows": fmean(len(truth[number]) for number in found.ids),
    }


def judged(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Where a promise about the peers is not kept: where one is faster and finds no less."""
    by = {(row["tenant"], row["filter"], row["system"], row["clients"]): row for row in results}
    cases = list(dict.fromkeys((row["tenant"], row["filter"]) for row in results))
    slower, behind = [], []
    for tenant, name in cases:
        own, edge, chain = (by[tenant, name, s, 1] for s in ("pgrecall, database", "qdrant", "langchain"))
        if own["median_ms"] > max(UNDER_MS, TIMES_QDRANT * edge["median_ms"]):
            times = own["median_ms"] / edge["median_ms"]
            slower.append(f"{tenant} / {name} {own['median_ms']:.1f} ms, {times:.1f} × {edge['median_ms']:.1f}")
        if chain["median_ms"] < own["median_ms"] and chain["recall"] > own["recall"] - LEEWAY:
            behind.append(
                f"{tenant} / {name} langchain {chain['median_ms']:.1f} ms at {chain['recall']:.3f}, "
                f"pgrecall {own['median_ms']:.1f} at {own['recall']:.3f}"
            )
        for other in ("chroma", "chroma, own collection"):
            server, http = by.get((tenant, name, other, max(CLIENTS))), by[tenant, name, "pgrecall, HTTP", max(CLIENTS)]
            http = by.get((tenant, name, "pgrecall, as found", max(CLIENTS)), http)
            if server is None or server["recall"] <= http["recall"] - LEEWAY:
                continue
            if server["requests_per_s"] > http["requests_per_s"]:
                behind.append(
                    f"{tenant} / {name} {other} {server['requests_per_s']:.0f} requests/s at {server['recall']:.3f}, "
                    f"pgrecall {http['requests_per_s']:.0f} at {http['recall']:.3f}"
                )
    verdict = {
        f"slower than {TIMES_QDRANT:g} × Qdrant's engine and {UNDER_MS:g} ms": "\n  ".join(slower) or "nowhere",
        "behind Chroma or langchain-postgres": "\n  ".join(behind) or "nowhere",
    }
    for name, least in TIMES_CHROMA.items():
        theirs = by[ALL, name, "chroma", max(CLIENTS)]
        own = by.get((ALL, name, "pgrecall, as found", max(CLIENTS)), by[ALL, name, "pgrecall, HTTP", max(CLIENTS)])
        verdict[f"HTTP requests/s of Chroma's, {ALL} / {name} (at least {least:g})"] = (
            f"{own['requests_per_s'] / theirs['requests_per_s']:.1f}, recall {own['recall']:.3f} and {theirs['recall']:.3f}"
        )
    return verdict


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """A table per tenant."""
    by = {(row["tenant"], row["filter"], row["system"], row["clients"]): row for row in results}
    headings = [
        "recall@10",
        "rows",
        "median ms",
        "p95 ms",
        *(f"requests/s, {n} client{'s' * (n > 1)}" for n in CLIENTS),
    ]
    for tenant in dict.fromkeys(row["tenant"] for row in results):
        shown = [row for row in results if row["tenant"] == tenant and row["clients"] == CLIENTS[0]]
        terminal.table(
            f"tenant {tenant}",
            [("filter", "left"), ("system", "left"), *((name, "right") for name in headings)],
            [
                (
                    row["filter"],
                    row["system"],
                    f"{row['recall']:.3f}",
                    f"{row['rows']:.1f}/{row['expected_rows']:.0f}",
                    f"{row['median_ms']:.2f}",
                    f"{row['p95_ms']:.2f}",
                    *(f"{by[tenant, row['filter'], row['system'], n]['requests_per_s']:.0f}" for n in CLIENTS),
                )
                for row in shown
            ],
        )


COLOURS = {
    "pgrecall, database": "#1f6f8b",
    "pgrecall, HTTP": "#6fb1c7",
    "pgrecall, as found": "#8fd1a8",
    "qdrant": "#c0395b",
    "chroma": "#d98324",
    "chroma, own collection": "#efbe84",
    "langchain": "#777777",
}


def draw(pyplot: Any, record: Mapping[str, Any]) -> None:
    """Recall against median, a panel for each tenant, a mark for each filter."""
    rows = [row for row in record["results"] if row["clients"] == 1]
    tenants = list(dict.fromkeys(row["tenant"] for row in rows))
    marks = dict(zip(FILTERS, "osD^vPX", strict=True))
    figure, panels = pyplot.subplots(1, len(tenants), figsize=(2.8 * len(tenants), 5.2), sharey=True, sharex=True)
    for panel, tenant in zip(panels, tenants, strict=True):
        for row in rows:
            if row["tenant"] == tenant:
                place = (row["median_ms"], row["recall"])
                panel.scatter(*place, color=COLOURS[row["system"]], marker=marks[row["filter"]], alpha=0.8, s=36)
        panel.set_title(tenant)
        panel.set_xscale("log")
        panel.set_xlabel("median, ms, 1 client")
    panels[0].set_ylabel("recall@10")
    shapes = [pyplot.Line2D([], [], color="black", marker=mark, ls="", label=name) for name, mark in marks.items()]
    shapes += [pyplot.Line2D([], [], color=colour, marker="o", ls="", label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=shapes, ncols=len(marks), loc="lower center", frameon=False)
    figure.set_layout_engine("tight", rect=(0, 0.1, 1, 1))


if __name__ == "__main__":
    main()

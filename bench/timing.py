"""What every command here measures with and reports by: short turns, figures, the surroundings, JSON and a plot."""

import asyncio
import importlib
import importlib.util
import os
import platform
import signal
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import psycopg

from app import terminal

RESULTS = Path("docs/benchmarks")
"""Where figures and plots go, from the checkout."""

WIDTH = 150
"""Least characters in a line of a table: where the output is no terminal there would be 80."""

Query = TypeVar("Query")


class Sample(NamedTuple):
    """One turn of one variant; in seconds, `elapsed`, the client's `cpu` and that of its `server` in all."""

    latencies: list[float]
    elapsed: float
    cpu: float | None = None
    server: float | None = None


async def measured(
    asks: Sequence[Callable[[Query], Awaitable[object]]], queries: Sequence[Query], seconds: float
) -> Sample:
    """One client for each of `asks`, which asks one query after the other until the turn is over."""
    latencies: list[float] = []

    async def client(first: int, ask: Callable[[Query], Awaitable[object]]) -> None:
        number, now = first, time.perf_counter()
        while now < end:
            await ask(queries[number % len(queries)])
            before, now = now, time.perf_counter()
            latencies.append(now - before)
            number += 1

    cpu, start = time.process_time(), time.perf_counter()
    end = start + seconds
    await asyncio.gather(*(client(n * len(queries) // len(asks), ask) for n, ask in enumerate(asks)))
    return Sample(latencies, time.perf_counter() - start, time.process_time() - cpu)


def quantile(latencies: Sequence[float], share: float) -> float:
    """The latency that `share` of them stay under, in ms."""
    ordered = sorted(latencies)
    return 1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Median, p95 and throughput over all turns; the CPU per request of client and server where it is known."""
    latencies = [latency for sample in samples for latency in sample.latencies]

    def each(spent: Sequence[float | None]) -> float | None:
        return None if None in spent else 1e3 * sum(filter(None, spent)) / len(latencies)

    return {
        "median_ms": 1e3 * statistics.median(latencies),
        "p95_ms": quantile(latencies, 0.95),
        "requests_per_s": len(latencies) / sum(sample.elapsed for sample in samples),
        "client_cpu_ms": each([sample.cpu for sample in samples]),
        "server_cpu_ms": each([sample.server for sample in samples]),
        "requests": len(latencies),
    }


def surroundings(url: str, packages: Sequence[str] = ()) -> dict[str, str]:
    """Where and with what it is measured; `url` is a database with pgvector in it."""
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "select current_setting('server_version'), extversion, current_setting('shared_buffers') "
            "from pg_extension where extname = 'vector'"
        ).fetchone()
    server, extension, buffers = found or ("", "", "")
    packages = ("psycopg", "sqlalchemy", "pgvector", "numpy", *packages)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "server": f"PostgreSQL {server}, pgvector {extension}, shared_buffers {buffers}",
        "client": f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages),
    }


def arguments(parser: ArgumentParser, rows: int = 200_000) -> Namespace:
    """The command line with the options that all commands share."""
    parser.add_argument("--rows", type=int, default=rows, help=f"of the corpus ({rows:,})")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(".bench"), help="what is loaded stays here for the next command (.bench)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder for the JSON and the plot ({RESULTS})")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped
    terminal.out.width = max(terminal.out.width, WIDTH)
    return options


def say(where: Mapping[str, Any]) -> None:
    """The surroundings, above the tables."""
    for name, value in where.items():
        terminal.out.print(f"{name}: {value}", soft_wrap=True, markup=False)


def save(folder: Path, name: str, record: Mapping[str, Any], draw: Callable[[Any, Mapping[str, Any]], None]) -> None:
    """Write NAME.json, and NAME.svg by `draw`, which gets matplotlib's pyplot and the record."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    terminal.say(f"saved {path}")
    if importlib.util.find_spec("matplotlib") is None:
        terminal.say("no plot: matplotlib is missing; pip install -e '.[bench]'")
        return
    importlib.import_module("matplotlib").use("svg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.rc("svg", hashsalt=name)
    pyplot.rc("font", size=9)
    pyplot.rc("axes", grid=True)
    pyplot.rc("grid", alpha=0.3)
    draw(pyplot, record)
    pyplot.gcf().set_layout_engine(pyplot.gcf().get_layout_engine() or "tight")
    pyplot.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close("all")
    terminal.say(f"saved {folder / name}.svg")

"""`pgrecall evaluate --ann`: the search as served against the exact one, on samples of what is stored."""

import asyncio
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from app import ann, commands, evaluation, schema, statistics, tenants, terminal
from app.ann import Compared
from app.errors import BadInput
from app.settings import Settings

SHOWN = 20
"""How many tenants the table names; --json names all."""


def metric(k: int) -> str:
    """The one figure."""
    return f"recall@{k}"


def check(arguments: Namespace, config: Settings) -> dict[str, float]:
    """Search for samples both ways and show how much is lost. The metrics."""
    if arguments.tenant is not None:
        tenants.check(arguments.tenant, "--tenant")
    with schema.provided(config) as ready:
        chunks = {row["tenant_id"]: row["chunks"] for row in commands.stored(ready) if row["chunks"]}
        if arguments.tenant is not None:
            chunks = {tenant: count for tenant, count in chunks.items() if tenant == arguments.tenant}
        if not chunks:
            who = "the database" if arguments.tenant is None else f"tenant {arguments.tenant}"
            raise BadInput("--tenant", f"{who} has no chunks to sample; allowed: a tenant with documents")
        compared = asyncio.run(_compared(ready, shares(chunks, arguments.sample), arguments.k))
    document = _document(compared, chunks, arguments.k)
    if arguments.json:
        terminal.json(document)
    else:
        _show(document, arguments.k)
        if not document["scans"]["index"] + document["scans"]["completed"]:
            terminal.say(
                "every search was exact, so nothing can be lost: there are too few chunks for the index to pay (PGRECALL_EXACT_ROWS)"
            )
    metrics: dict[str, float] = document["metrics"]
    return metrics


def shares(chunks: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` divided among tenants as their chunks are, no more than each has; those too small for one get none."""
    ends = np.rint(np.cumsum(list(chunks.values())) / sum(chunks.values()) * count).astype(int).tolist()
    given = zip(chunks, ends, [0, *ends], strict=False)
    return {tenant: min(end - start, chunks[tenant]) for tenant, end, start in given if end > start}


async def _compared(config: Settings, samples: Mapping[str, int], k: int) -> list[Compared]:
    compared = []
    async with commands.opened(config) as (database, _):
        with terminal.progress("vectors") as bar:
            task = bar.add_task("search as served and exactly", total=sum(samples.values()))
            for tenant_id, count in samples.items():
                vectors = await ann.sample(database, tenant_id, count)
                async with aclosing(ann.run(database, config, tenant_id, list(vectors), k)) as results:
                    async for one in results:
                        compared.append(one)
                        bar.advance(task)
    return compared


def _document(compared: Sequence[Compared], chunks: Mapping[str, int], k: int) -> dict[str, Any]:
    recalls = np.array([[one.recall] for one in compared])
    by_tenant: dict[str, list[Compared]] = {}
    for one in compared:
        by_tenant.setdefault(one.tenant_id, []).append(one)
    return {
        "metrics": {metric(k): float(recalls.mean())},
        "intervals": {metric(k): statistics.intervals(recalls)[0]} if len(compared) > 1 else {},
        "queries": len(compared),
        "latency_ms": {
            "served": evaluation.latency([one.served_ms for one in compared]),
            "exact": evaluation.latency([one.exact_ms for one in compared]),
        },
        "scans": evaluation.scans([one.scan for one in compared]),
        "tenants": {
            tenant: {
                "chunks": chunks[tenant],
                "queries": len(some),
                metric(k): float(np.mean([one.recall for one in some])),
                "scans": evaluation.scans([one.scan for one in some]),
            }
            for tenant, some in by_tenant.items()
        },
    }


def _show(document: Mapping[str, Any], k: int) -> None:
    interval = document["intervals"].get(metric(k), "")
    terminal.table(
        f"the search as served against exact search: {document['queries']} sampled vectors",
        [("metric", "left"), ("value", "right"), ("95 % interval", "right")],
        [
            (metric(k), f"{document['metrics'][metric(k)]:.3f}", interval),
            *(
                (f"latency {way} {name}", f"{value:.1f} ms", "")
                for way, each in document["latency_ms"].items()
                for name, value in each.items()
            ),
            *((f"scans {kind}", f"{count:,}", "") for kind, count in document["scans"].items()),
        ],
    )
    if len(document["tenants"]) > 1:
        worst = sorted(document["tenants"].items(), key=lambda pair: pair[1][metric(k)])[:SHOWN]
        terminal.table(
            "tenants, lowest recall first",
            [
                ("tenant", "left"),
                ("chunks", "right"),
                ("vectors", "right"),
                (metric(k), "right"),
                ("exact scans", "right"),
            ],
            [(t, f"{e['chunks']:,}", e["queries"], f"{e[metric(k)]:.3f}", e["scans"]["exact"]) for t, e in worst],
        )

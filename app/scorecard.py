"""`pgrecall evaluate`: judged queries searched, figures shown, and a status for pipelines."""

import asyncio
import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from app import commands, evaluation, schema, terminal
from app.database import Database
from app.embedding import Embedder
from app.errors import BadInput
from app.evaluation import Collection, Judged
from app.files import Unreadable
from app.settings import Settings


def floor(text: str) -> tuple[str, float]:
    """`recall@10=0.8` as a metric's name and its least value."""
    name, _, value = text.partition("=")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if not -1 <= least <= 1:
        raise ArgumentTypeError(f"{text!r} is not allowed; allowed: METRIC=VALUE with a value from -1 to 1")
    return name, least


def evaluate(arguments: Namespace, config: Settings) -> int:
    """Search for every judged query and show the figures; 1 if one is under its floor."""
    names = evaluation.metric_names(arguments.k)
    for name, _ in arguments.fail_under:
        if name not in names:
            raise BadInput("--fail-under", f"there is no {name!r} with -k {arguments.k}; allowed: {', '.join(names)}")
    collection = evaluation.read(arguments.path, arguments.tenant)
    with schema.provided(config) as ready:
        judged, missing = asyncio.run(_judged(ready, collection, arguments.k))
    metrics = evaluation.mean_metrics(judged, arguments.k)
    report = {
        "metrics": metrics,
        "queries": len(judged),
        "latency_ms": evaluation.latency(judged),
        "missing_documents": missing,
    }
    rows = [_row(one, arguments.k) for one in judged] if arguments.per_query else []
    if arguments.json:
        terminal.json(report | ({"per_query": rows} if arguments.per_query else {}))
    else:
        _show(report, sorted(rows, key=lambda row: float(row[f"ndcg@{arguments.k}"])), arguments.path.resolve().name)
    return _compared(metrics, arguments.fail_under)


def _compared(metrics: Mapping[str, float], floors: Sequence[tuple[str, float]]) -> int:
    under = [(name, least) for name, least in floors if metrics[name] < least]
    for name, least in under:
        terminal.say(f"{name} is {metrics[name]:.6f}, under {least:g}")
    return 1 if under else 0


async def _judged(config: Settings, collection: Collection, k: int) -> tuple[list[Judged], int]:
    """The results, and how many documents the judgements want that are not there."""
    async with commands.opened(config) as (database, embedder):
        if collection.tenant_id is not None:
            await _provide(database, embedder, config, collection, collection.tenant_id)
        missing = await _missing(database, collection)
        judged = []
        with terminal.progress("queries") as bar:
            task = bar.add_task(f"search for {len(collection.questions)} queries", total=len(collection.questions))
            async with aclosing(evaluation.run(database, embedder, config, collection.questions, k)) as results:
                async for one in results:
                    judged.append(one)
                    bar.advance(task)
        return judged, missing


async def _provide(
    database: Database, embedder: Embedder, config: Settings, collection: Collection, tenant_id: str
) -> None:
    """Bring the folder's documents into their tenant; those that are there already are left as they are."""
    refused: list[Unreadable] = []
    counts = await commands.store(database, embedder, config, tenant_id, collection.drafts, refused)
    terminal.say(f"tenant {tenant_id}: {commands.summary(counts)}")
    for item in refused:
        terminal.say(f"skipped document {item.path}: {item.fault}")
    there = await evaluation.stored(database, tenant_id, [draft.id for draft in collection.drafts])
    if others := there.documents - len(there.ids):
        terminal.say(f"documents of tenant {tenant_id} that are not in the folder: {others:,}; they are searched too")


async def _missing(database: Database, collection: Collection) -> int:
    wanted: dict[str, dict[str, str]] = {}
    for question in collection.questions:
        relevant = [document for document, grade in question.grades.items() if grade > 0]
        wanted.setdefault(question.tenant_id, {}).update(dict.fromkeys(relevant, question.origin))
    missing = 0
    for tenant_id, origins in wanted.items():
        absent = sorted(origins.keys() - (await evaluation.stored(database, tenant_id, list(origins))).ids)
        missing += len(absent)
        if absent:
            terminal.say(
                f"expected documents that tenant {tenant_id} does not have: {len(absent):,}, such as {absent[0]!r} "
                f"({origins[absent[0]]}); they count as not found"
            )
    return missing


def _row(one: Judged, k: int) -> dict[str, Any]:
    question = {"id": one.question.id, "query": one.question.text, "tenant_id": one.question.tenant_id}
    expected = [document for document, grade in one.question.grades.items() if grade > 0]
    figures = evaluation.metrics(one, k) | {"milliseconds": round(one.milliseconds, 3)}
    return question | figures | {"found": list(one.found), "expected": expected}


def _show(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], source: str) -> None:
    names = list(report["metrics"])
    if rows:
        terminal.table(
            "queries, worst nDCG first",
            [("id", "left"), ("query", "left"), *((name, "right") for name in names)],
            [(row["id"], terminal.snippet(row["query"]), *(f"{row[name]:.3f}" for name in names)) for row in rows],
        )
    terminal.table(
        f"{source}: {report['queries']} queries",
        [("metric", "left"), ("value", "right")],
        [
            *((name, f"{value:.3f}") for name, value in report["metrics"].items()),
            *((f"latency {name}", f"{value:.1f} ms") for name, value in report["latency_ms"].items()),
        ],
    )

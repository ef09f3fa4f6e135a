"""`pgrecall evaluate`: judged queries searched, figures shown and saved, and a status for pipelines."""

import asyncio
import os
from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from app import (
    __version__,
    commands,
    comparison,
    evaluation,
    floors,
    ingest,
    judgements,
    report,
    rerank,
    schema,
    spotcheck,
    statistics,
    terminal,
)
from app.comparison import Comparison, Row, Saved
from app.database import Database
from app.embedding import Embedder
from app.errors import BadInput
from app.evaluation import Alternative, Judged
from app.floors import Floor
from app.judgements import Collection, Question
from app.report import Evaluation, Results
from app.search import Mode
from app.settings import Settings

TRIED = 300
"""How many queries are searched again under other settings, for the report."""


def evaluate(arguments: Namespace, config: Settings) -> int:
    """Search for every judged query and show the figures; 1 if one is under its floor."""
    k = arguments.k
    if arguments.ann:
        _check_alone(arguments)
        floors.check(arguments.fail_under, {"": [spotcheck.metric(k)]}, k)
        return _status({"": spotcheck.check(arguments, config)}, arguments.fail_under)
    modes: list[Mode] = list(dict.fromkeys(arguments.mode or evaluation.MODES))
    floors.check(arguments.fail_under, {mode: evaluation.metric_names(k, mode) for mode in modes}, k)
    if arguments.path is None:
        raise BadInput("path", "is missing; allowed: a file or folder of judged queries, or --ann to do without")
    for option in ("report", "save"):
        _check_writable(f"--{option}", getattr(arguments, option))
    collection = judgements.read(arguments.path, arguments.tenant)
    saved = _saved(arguments.compare, collection, k, modes) if arguments.compare else {}
    with schema.provided(config) as ready:
        measured = asyncio.run(_measured(ready, collection, modes, arguments))
    rows = {mode: [comparison.row(one, k) for one in each.judged] for mode, each in measured.modes.items()}
    compared: dict[str, tuple[Saved, Comparison]] = {
        mode: (saved[mode], comparison.compare(rows[mode], saved[mode].rows)) for mode in modes if mode in saved
    }
    documents = {mode: comparison.summary(each.judged, k, measured.missing) for mode, each in measured.modes.items()}
    for mode, (theirs, found) in compared.items():
        documents[mode] |= {"compared": comparison.differences(arguments.compare, theirs, found)}
    full = {
        mode: documents[mode]
        | {
            "setup": comparison.setup(config, mode, reranked=arguments.rerank),
            "per_query": [row.as_json() for row in each],
        }
        for mode, each in rows.items()
    }
    if arguments.json:
        terminal.json(_keyed(full if arguments.per_query else documents))
    else:
        if arguments.per_query:
            _show_queries(rows, k)
        _show(documents, arguments.path.resolve().name)
    if arguments.save:
        _write(arguments.save, msgspec.json.encode(_keyed(full)) + b"\n")
    if arguments.report:
        shown = _shown(arguments, config, collection, measured, rows, compared)
        _write(arguments.report, report.page(shown).encode())
    return _status({mode: each["metrics"] for mode, each in documents.items()}, arguments.fail_under)


def _check_alone(arguments: Namespace) -> None:
    """Raise BadInput for what has no meaning without judgements."""
    for option in ("path", "report", "compare", "save", "per_query", "mode", "rerank"):
        if getattr(arguments, option):
            raise BadInput("--ann", f"takes no {option.replace('_', '-')}: there are no judged queries in it")


def _status(metrics: Mapping[str, Mapping[str, float]], least: Sequence[Floor]) -> int:
    """1 if a figure is under its floor, and says which; else 0."""
    faults = list(floors.under(metrics, least))
    for fault in faults:
        terminal.say(fault)
    return 1 if faults else 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Results by mode, and how many documents the judgements want that are not there."""

    modes: dict[str, Results]
    missing: int


async def _measured(config: Settings, collection: Collection, modes: Sequence[Mode], arguments: Namespace) -> Measured:
    """The results; for a report with what it shows besides the figures."""
    k = arguments.k
    async with commands.opened(config) as (database, embedder), rerank.opened(config) as opened:
        reranker = rerank.required(opened) if arguments.rerank else None
        if collection.tenant_id is not None:
            await _provide(database, embedder, config, collection, collection.tenant_id)
        missing = await _missing(database, collection)
        judged = await _searched(
            collection.questions,
            evaluation.run(database, embedder, config, collection.questions, k, modes, reranker),
        )
        if arguments.report is None:
            return Measured({mode: Results(each) for mode, each in judged.items()}, missing)
        results: dict[str, Results] = {}
        for mode, each in judged.items():
            passages = await _passages(database, embedder, report.worst(each, k))
            alternatives = (
                await _alternatives(database, embedder, config, collection.questions, k) if mode == "vector" else ()
            )
            results[mode] = Results(each, alternatives, passages)
        return Measured(results, missing)


async def _searched(
    questions: Sequence[Question], searches: AsyncGenerator[dict[Mode, Judged], None]
) -> dict[Mode, list[Judged]]:
    """The results by mode, with a progress bar."""
    found = []
    with terminal.progress("queries") as bar:
        task = bar.add_task(f"search for {len(questions)} queries", total=len(questions))
        async with aclosing(searches):
            async for each in searches:
                found.append(each)
                bar.advance(task)
    return {mode: [each[mode] for each in found] for mode in found[0]}


async def _alternatives(
    database: Database, embedder: Embedder, config: Settings, questions: Sequence[Question], k: int
) -> list[Alternative]:
    tried = statistics.sample(questions, TRIED)
    with terminal.progress("queries") as bar:
        task = bar.add_task("search with other settings", total=len(tried))
        return await evaluation.alternatives(database, embedder, config, tried, k, partial(bar.advance, task))


async def _passages(
    database: Database, embedder: Embedder, judged: Sequence[Judged]
) -> dict[str, dict[str, evaluation.Passage]]:
    vectors = await embedder.embed([one.question.text for one in judged], "query")
    return {
        one.question.id: await evaluation.passages(
            database, one.question.tenant_id, vector, [*one.found, *one.expected[: report.EXPECTED]]
        )
        for one, vector in zip(judged, vectors, strict=True)
    }


async def _provide(
    database: Database, embedder: Embedder, config: Settings, collection: Collection, tenant_id: str
) -> None:
    """Bring the folder's documents into their tenant; those that are there already are left as they are."""
    counts = await ingest.store(database, embedder, config, tenant_id, collection.drafts)
    terminal.say(f"tenant {tenant_id}: {ingest.summary(counts)}")
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


def _saved(path: Path, collection: Collection, k: int, modes: Sequence[Mode]) -> dict[str, Saved]:
    """Those of the other run's modes that are compared. Raises BadInput where it has none of ours."""
    read = comparison.read(path, k)
    saved: dict[str, Saved] = {mode: read[mode] for mode in modes if mode in read}
    if not saved:
        raise BadInput(str(path), f"was searched by {', '.join(read)}; allowed: a run by {' or '.join(modes)}")
    wanted = {(question.id, question.text): Judged(question, {}, 0).expected for question in collection.questions}
    for each in saved.values():
        comparison.check(str(path), each.rows, wanted)
    return saved


def _keyed(documents: Mapping[str, Any]) -> Any:
    return documents if len(documents) > 1 else next(iter(documents.values()))


def _shown(
    arguments: Namespace,
    config: Settings,
    collection: Collection,
    measured: Measured,
    rows: Mapping[str, list[Row]],
    compared: Mapping[str, tuple[Saved, Comparison]],
) -> Evaluation:
    tenants = sorted({question.tenant_id for question in collection.questions})
    done = evaluation.scans([one.scan for each in measured.modes.values() for one in each.judged])
    facts = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tenant": tenants[0] if len(tenants) == 1 else f"{len(tenants)} tenants",
        "model": f"{config.model}, {config.dimensions} dimensions",
        "chunks": f"at most {config.chunk_max_tokens} tokens, overlap {config.chunk_overlap_tokens}",
        "scans": ", ".join(f"{count:,} {kind}" for kind, count in done.items() if count),
        "ef_search": str(config.ef_search),
        "exact up to": "as many rows as pays" if config.exact_rows is None else f"{config.exact_rows:,} rows",
        **({"reranked by": str(config.rerank_model)} if arguments.rerank else {}),
        "expected, not stored": f"{measured.missing:,}",
        "pgrecall": __version__,
    }
    several = len(measured.modes) > 1
    headings = [
        (
            f"Compared with {arguments.compare.name}" + (f": {mode}" if several else ""),
            _otherwise(comparison.setup(config, mode, reranked=arguments.rerank), theirs),
            c,
        )
        for mode, (theirs, c) in compared.items()
    ]
    first, *others = rows
    headings += [
        (
            f"{mode} against {first}",
            f"Of this run: other is {first}, this is {mode}.",
            comparison.compare(rows[mode], rows[first]),
        )
        for mode in others
    ]
    return Evaluation(arguments.path.resolve().name, arguments.k, facts, measured.modes, headings)


def _otherwise(mine: Mapping[str, Any], theirs: Saved) -> str:
    """What the other run was made with, as far as it differs."""
    other = [
        f"{name} {value} (here {mine[name]})" for name, value in theirs.setup.items() if mine.get(name, value) != value
    ]
    return (
        f"The other run was made with {', '.join(other)}." if other else "Both runs were made with the same settings."
    )


def _check_writable(option: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise BadInput(option, f"{str(path)!r} cannot be written; allowed: a file in a folder that exists")


def _write(path: Path, data: bytes) -> None:
    """The whole file or, where that fails, the one that was there before."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise BadInput(str(path), f"cannot be written: {error.strerror or error}") from None
    terminal.say(f"wrote {path}")


def _show_queries(rows: Mapping[str, Sequence[Row]], k: int) -> None:
    """Every query: the figures of one mode, or the nDCG of several side by side."""
    alone = next(iter(rows)) if len(rows) == 1 else None
    names = list(evaluation.metric_names(k, alone)) if alone else list(rows)
    ndcg = f"ndcg@{k}"
    lines = []
    for row, *others in zip(*rows.values(), strict=True):
        values = [row.figures[name] for name in names] if alone else [each.figures[ndcg] for each in (row, *others)]
        worth = sum(each.figures[ndcg] for each in (row, *others))
        lines.append((worth, (row.id, terminal.snippet(row.query), *(f"{value:.3f}" for value in values))))
    terminal.table(
        "queries, worst nDCG first" if alone else f"{ndcg} of each query, worst first",
        [("id", "left"), ("query", "left"), *((name, "right") for name in names)],
        [line for _, line in sorted(lines, key=lambda pair: pair[0])],
    )


def _show(documents: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """The figures: with its interval beside each where there is one mode, below it where there are several."""
    first, *others = documents.values()
    names = dict.fromkeys(name for each in documents.values() for name in each["metrics"])
    headings = [("value", "right"), ("95 % interval", "right")]
    if others:
        headings = [(mode, "right") for mode in documents]
        figures = [(name, *(_stacked(each, name) for each in documents.values())) for name in names]
    else:
        figures = [(name, f"{first['metrics'][name]:.3f}", first["intervals"].get(name, "")) for name in names]
    waits = [
        (
            f"latency {name}",
            *(f"{each['latency_ms'][name]:.1f} ms" for each in documents.values()),
            *([""] * (not others)),
        )
        for name in first["latency_ms"]
    ]
    terminal.table(f"{source}: {first['queries']} queries", [("metric", "left"), *headings], [*figures, *waits])
    for mode, document in documents.items():
        if "compared" in document:
            _show_compared(document["compared"], f"{mode} " if others else "")


def _stacked(document: Mapping[str, Any], name: str) -> str:
    if name not in document["metrics"]:
        return "–"
    interval = document["intervals"].get(name)
    return f"{document['metrics'][name]:.3f}" + (f"\n{interval}" if interval else "")


def _show_compared(compared: Mapping[str, Any], mode: str) -> None:
    headings = ("other", "this", "difference", "95 % interval")
    terminal.table(
        f"{mode}compared with {compared['other']}",
        [("metric", "left"), *((heading, "right") for heading in headings)],
        [
            (name, f"{d['other']:.3f}", f"{d['this']:.3f}", f"{d['difference']:+.4f}", _signed(d["interval"]))
            for name, d in compared["metrics"].items()
        ],
    )


def _signed(interval: statistics.Interval | None) -> str:
    return f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else ""

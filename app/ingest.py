"""`pgrecall ingest`: files, folders and standard input become the documents of a tenant."""

import asyncio
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import msgspec

from app import commands, deferral, files, loading, missing, preview, records, schema, tenants, terminal
from app.database import Database
from app.deferral import Deferred
from app.drafts import Draft
from app.embedding import Embedder
from app.errors import BadInput, BudgetSpent, PgrecallError
from app.files import Noted, Reading, Step, Unreadable
from app.indexes import Told
from app.loading import Counts, Seen
from app.meter import Meter
from app.preview import Cost
from app.settings import Settings

INTERRUPTED = 130
DEFERRED = "; its end, or the next `pgrecall ingest`, builds the vector index"


@dataclass
class Report:
    """What a run did or, with `cost`, would do."""

    counts: Counts = field(default_factory=Counts)
    skipped: list[Unreadable] = field(default_factory=list)
    notes: list[Noted] = field(default_factory=list)
    deleted: int = 0
    refused: str | None = None
    """Why what is missing was not deleted."""
    stopped: str | None = None
    """Why the run ended before everything was read."""
    cost: Cost | None = None
    meter: Meter = field(default_factory=Meter)
    price: float | None = None
    """Of a million tokens."""
    seconds: float = 0.0

    def told(self, item: Unreadable | Noted) -> None:
        """Keep it for the end, and show it now."""
        if isinstance(item, Noted):
            self.notes.append(item)
            terminal.say(f"note: {item.path} {item.note}")
        else:
            self.skipped.append(item)
            terminal.say(f"skipped {item.path}: {item.fault}")


def ingest(arguments: Namespace, config: Settings) -> int:
    """Store what is read, or say what would be stored; 1 if something had to be left out."""
    tenants.check(arguments.tenant, "--tenant")
    reading = _reading(arguments)
    files.check(arguments.path, reading)
    if arguments.load_name == "":
        raise BadInput("--as", "is empty; allowed: a name, or no --as")
    if arguments.delete_missing and not arguments.load_name:
        fault = "needs --as NAME: only documents that were ingested under a name can be told from others"
        raise BadInput("--delete-missing", fault)
    price = config.embedding_price if arguments.price is None else arguments.price
    report = Report(meter=Meter(arguments.max_tokens), price=price)
    began = time.monotonic()
    with schema.provided(config) as ready, schema.migration_url(ready) as owner_url:
        try:
            with _deferred(arguments, reading, owner_url) as defer:
                missing_indexes = asyncio.run(_run(arguments, ready, reading, report))
                if defer is not None:
                    _building(defer.build)
            if defer is None and missing_indexes and not arguments.dry_run:
                _finish(owner_url)
        except KeyboardInterrupt:
            terminal.say(_so_far("interrupted", arguments, report))
            return INTERRUPTED
        except BudgetSpent as spent:
            report.stopped = f"--max-tokens: {spent}"
        except PgrecallError:
            if report.counts.bytes:
                terminal.say(_so_far("stopped", arguments, report))
            raise
    report.seconds = time.monotonic() - began
    _show(arguments, report)
    return 1 if report.skipped or report.refused or report.stopped else 0


def _reading(arguments: Namespace) -> Reading:
    metadata = commands.json_object(arguments.metadata, "--metadata")
    marks: dict[str, Any] = {missing.MARK: arguments.load_name} if arguments.load_name else {}
    separator = {"tab": "\t", "\\t": "\t"}.get(arguments.separator, arguments.separator)
    if separator is not None and len(separator) != 1:
        raise BadInput("--separator", f"{separator!r} is not allowed; allowed: one character, or tab")
    try:
        "".encode(arguments.encoding or "utf-8")
    except LookupError:
        fault = f"{arguments.encoding!r} is not known; allowed: names such as cp1252, shift_jis, utf-16"
        raise BadInput("--encoding", fault) from None
    return Reading(
        doc_type=arguments.doc_type,
        metadata=metadata,
        marks=marks,
        prefix=arguments.prefix,
        format=arguments.format,
        encoding=arguments.encoding,
        separator=separator,
        date_from=arguments.date_from,
        mapped=records.mapping(arguments.field, arguments.other_fields),
    )


@contextmanager
def _deferred(arguments: Namespace, reading: Reading, owner_url: str) -> Iterator[Deferred | None]:
    if not arguments.defer_index or arguments.dry_run:
        yield None
        return
    with deferral.deferred(owner_url, arguments.tenant, files.total(arguments.path, reading)) as made:
        yield made


def _building(build: Callable[[Told], object]) -> None:
    with terminal.progress("%") as bar:
        task = bar.add_task("building the vector index", total=100)
        build(lambda what, share: bar.update(task, description=what, completed=100 * share))


def _finish(owner_url: str) -> None:
    """Build the index that an interrupted load has left out."""
    done: list[bool] = []
    _building(lambda told: done.append(deferral.finish(owner_url, told)))
    if not done[0]:
        terminal.say(
            "a part of the vector index is missing; searches are exact without it, but slower: run `pgrecall index` with "
            "the kind it shows as active, as the tables' owner"
        )


async def _run(arguments: Namespace, config: Settings, reading: Reading, report: Report) -> int:
    """How many parts of the vector index are missing."""
    seen = Seen() if arguments.delete_missing else None
    steps = files.drafts(arguments.path, reading)
    async with commands.opened(config) as (database, embedder):
        begun = await missing.begun(database) if arguments.delete_missing else None
        verb = "compare" if arguments.dry_run else "ingest"
        with _bar(verb, report.counts, lambda: files.total(arguments.path, reading)) as advanced:
            work = preview.preview if arguments.dry_run else partial(loading.load, meter=report.meter)
            report.cost = await work(
                database,
                embedder,
                config,
                arguments.tenant,
                steps,
                counts=report.counts,
                told=report.told,
                seen=seen,
                advanced=advanced,
            )
        if seen is not None and begun is not None:
            found = await missing.find(database, arguments.tenant, arguments.load_name, seen)
            try:
                if not arguments.force:
                    missing.check(found, read=report.counts.documents, skipped=report.counts.skipped)
            except BadInput as fault:
                report.refused = str(fault)
                found = missing.Missing([], found.of)
            if arguments.dry_run:
                report.deleted = len(found.ids)
            else:
                report.deleted = await missing.remove(database, arguments.tenant, arguments.load_name, found.ids, begun)
        return await deferral.missing(database)


async def store(
    database: Database, embedder: Embedder, config: Settings, tenant_id: str, drafts: Sequence[Draft]
) -> Counts:
    """Put the drafts with a progress bar; one over the limits is told and left out, the rest goes on."""
    report = Report()
    steps = [Step(draft, len(draft.content.encode("utf-8", "replace"))) for draft in drafts]
    with _bar("ingest", report.counts, lambda: sum(step.size for step in steps)) as advanced:
        await loading.load(
            database,
            embedder,
            config,
            tenant_id,
            steps,
            counts=report.counts,
            told=report.told,
            advanced=advanced,
        )
    return report.counts


@contextmanager
def _bar(verb: str, counts: Counts, total: Callable[[], int | None]) -> Iterator[Callable[[], None]]:
    """A bar of bytes read and stored; how many there are in all is found out meanwhile."""

    def shown() -> str:
        return f"{verb} {terminal.counted(counts.documents, 'document')}"

    with terminal.transfer() as bar:
        task = bar.add_task(shown(), total=None)
        counting = threading.Thread(target=lambda: bar.update(task, total=total()), daemon=True)
        counting.start()
        yield lambda: bar.update(task, description=shown(), completed=counts.bytes)
        counting.join(timeout=1)
        bar.update(task, description=shown(), completed=bar.tasks[0].total or counts.bytes)


def _show(arguments: Namespace, report: Report) -> None:
    counts = report.counts
    if arguments.json:
        terminal.json(_record(report))
    elif report.cost is None:
        terminal.say(
            summary(counts)
            + (f"; {terminal.counted(report.deleted, 'document')} deleted" if arguments.delete_missing else "")
        )
        terminal.say(_counters(report))
    else:
        terminal.say(_forecast(report, report.cost))
    if report.stopped:
        terminal.say(_so_far(report.stopped, arguments, report))
    if report.refused:
        terminal.say(report.refused)


def _counters(report: Report) -> str:
    """What it took."""
    meter, counts, counted = report.meter, report.counts, terminal.counted
    cost = meter.cost(report.price)
    parts = [
        f"{counted(counts.documents, 'document')}, {counts.bytes / 1e6:,.1f} MB in {report.seconds:,.1f} s",
        f"{counted(meter.texts, 'text')} of {counted(meter.tokens, 'token')} embedded"
        + ("" if cost is None else f" for {cost:,.4f}"),
        f"{counted(meter.cache_hits, 'vector')} from the cache",
        f"{counted(meter.deduplicated, 'text')} that came twice",
    ]
    if meter.retries:
        parts.append(f"{meter.retries:,} retries, {meter.rate_limited:,} of them asked for by the server")
    return "; ".join(parts)


def summary(counts: Counts) -> str:
    """What an ingest did, in a sentence."""
    return (
        f"{counts.created} created, {counts.updated} updated, {counts.unchanged} unchanged"
        + (f", {counts.skipped} skipped" if counts.skipped else "")
        + f"; chunks: {counts.embedded} embedded, {counts.reused} reused, {counts.removed} removed"
    )


def _forecast(report: Report, cost: Cost) -> str:
    counts = report.counts
    price = "" if report.price is None else f", at {report.price:g} a million {cost.price(report.price):,.4f}"
    return (
        f"nothing was written. This would create {counts.created:,} documents, update {counts.updated:,}, leave "
        f"{counts.unchanged:,} as they are, delete {report.deleted:,} and skip {counts.skipped:,}; "
        f"chunks: {cost.chunks:,} to embed ({cost.tokens:,} tokens{price}), {cost.cached:,} whose vectors are known, "
        f"{counts.reused:,} that stay"
    )


def _spelt(item: Unreadable | Noted) -> dict[str, str | None]:
    return {name: value and terminal.spelt(value) for name, value in msgspec.structs.asdict(item).items()}


def _record(report: Report) -> dict[str, Any]:
    meter = report.meter
    made = {name: value for name, value in asdict(report.counts).items() if name != "skipped"} | {
        "deleted": report.deleted,
        "refused": report.refused,
        "stopped": report.stopped,
        "seconds": round(report.seconds, 2),
        "embedding": {
            name: getattr(meter, name)
            for name in ("texts", "tokens", "cache_hits", "deduplicated", "requests", "retries", "rate_limited")
        }
        | {"cost": meter.cost(report.price)},
        "skipped": list(map(_spelt, report.skipped)),
        "notes": list(map(_spelt, report.notes)),
    }
    if report.cost is not None:
        price = None if report.price is None else report.cost.price(report.price)
        made["dry_run"] = asdict(report.cost) | {"price": price}
    return made


def _so_far(why: str, arguments: Namespace, report: Report) -> str:
    if arguments.dry_run:
        return f"{why}; nothing was written"
    stored = report.counts.created + report.counts.updated
    kept = ", nothing was deleted" if arguments.delete_missing else ""
    return (
        f"{why}: {stored:,} documents are stored whole, {report.counts.unchanged:,} were there already{kept}. "
        "The same command goes on where this one stopped" + (DEFERRED if arguments.defer_index else "")
    )

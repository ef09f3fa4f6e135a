"""`pgrecall model`: what each step of a change of the embedding model shows and asks. `change` does them."""

import asyncio
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from app import backfill, change, commands, forecast, recut, schema, spaces, terminal, weighing
from app.backfill import Filled
from app.change import Connection, Standing
from app.database import Database
from app.embedding import Embedder
from app.errors import BadInput, BudgetSpent, EmbeddingFailed, WrongSetting
from app.meter import Meter
from app.model import Provider, Recorded
from app.settings import LOCAL_DIMENSIONS, LOCAL_MODEL, OPENAI_DIMENSIONS, Settings

CATCH_UP = 32
"""Chunks written at a time once the indexes are there: each then takes the time of its place in the graph."""

SHOWN = 10
"""Chunks without a vector that are named."""


def show(arguments: Namespace, config: Settings) -> int:
    """Which models there are, and where a change stands."""
    with _operating(config, alone=False) as (_, _, connection):
        _show(arguments, change.standing(connection))
    return 0


def plan(arguments: Namespace, config: Settings) -> int:
    """What a change would take."""
    with _operating(config, alone=False) as (ready, _, connection):
        new = wanted(arguments, ready)
        found = asyncio.run(_forecast(ready, connection, new, arguments))
    if arguments.json:
        terminal.json(found._asdict())
        return 0
    terminal.table(
        f"{found.model}, {found.dimensions:,} dimensions",
        [("what", "left"), ("how much", "right")],
        [
            ("documents, in tenants", f"{found.documents:,}, {found.tenants:,}"),
            ("chunks to embed", f"{found.chunks - found.callers:,}"),
            ("vectors brought by callers", f"{found.callers:,}"),
            ("tokens (estimated)", f"{found.tokens:,}"),
            ("cost", "no --price given" if found.cost is None else f"{found.cost:,.2f}"),
            ("time for embedding", str(timedelta(seconds=round(found.seconds)))),
            ("disk until finish", f"{found.bytes / 1e6:,.0f} MB"),
            ("index", found.kind),
        ],
    )
    for note in found.notes:
        terminal.say(f"note: {note}")
    for obstacle in found.obstacles:
        terminal.say(f"in the way: {obstacle}")
    return 2 if found.obstacles else 0


async def _forecast(ready: Settings, connection: Connection, new: Recorded, arguments: Namespace) -> forecast.Forecast:
    async with commands.opened(ready):
        embedder = await asyncio.to_thread(spaces.opened, ready, new)
        try:
            return await forecast.of(connection, new, embedder, price=arguments.price, rate=arguments.rate)
        finally:
            await embedder.aclose()


def fill(arguments: Namespace, config: Settings) -> int:
    """Give every chunk a vector of the new model, build the indexes."""
    with _operating(config) as (ready, url, connection):
        filled = asyncio.run(_fill(arguments, ready, url, connection))
        stands = change.standing(connection)
    for refused in filled.refused[:SHOWN]:
        terminal.say(f"no vector for a chunk of {refused.id!r} (tenant {refused.tenant_id}): {refused.reason}")
    if len(filled.refused) > SHOWN:
        terminal.say(f"… and for {len(filled.refused) - SHOWN:,} more chunks")
    meter = filled.meter
    _show(
        arguments,
        stands,
        {
            "embedded": filled.chunks,
            "tokens": meter.tokens,
            "cost": meter.cost(arguments.price),
            "retries": meter.retries,
            "refused": len(filled.refused),
            "stopped": None if filled.stopped is None else str(filled.stopped),
        },
    )
    cost = "" if arguments.price is None else f", which cost {meter.cost(arguments.price):,.2f}"
    _say(arguments, f"{filled.chunks:,} chunks embedded, {meter.tokens:,} tokens{cost}")
    if filled.stopped is not None:
        _say(arguments, f"stopped: {filled.stopped}. Run `pgrecall model backfill` again to go on")
    return 1 if filled.stopped is not None or (stands.gaps and stands.gaps.missing) else 0


async def _fill(arguments: Namespace, ready: Settings, url: str, connection: Connection) -> Filled:
    async with commands.opened(ready) as (database, configured):
        new = change.other(connection)
        if arguments.model is not None or new is None:
            provider: Provider = "openai" if ready.uses_openai else "local"
            new = change.start(connection, wanted(arguments, ready), provider, ready.openai_base_url)
        await spaces.refresh(database)
        embedder = await spaces.of(database, ready, configured, new.model)
        filled = Filled(Meter(arguments.max_tokens))
        await _passes(arguments, connection, database, embedder, ready, filled, backfill.BATCH)
        await _cut_anew(database, configured, ready, filled)
        await _passes(arguments, connection, database, embedder, ready, filled, backfill.BATCH)
        if filled.stopped is not None:
            return filled
        connection.execute("vacuum (analyze) pgrecall_run_documents")
        with terminal.progress("%") as progress:
            task = progress.add_task("indexes", total=100)
            await asyncio.to_thread(
                change.build,
                connection,
                url,
                new,
                lambda what, share: progress.update(task, description=what, completed=100 * share),
            )
        await _passes(arguments, connection, database, embedder, ready, filled, CATCH_UP)
        return filled


async def _cut_anew(database: Database, configured: Embedder, ready: Settings, filled: Filled) -> None:
    """Documents with chunks that the new model does not read whole, into chunks that both read whole."""
    if filled.stopped is not None or not filled.too_long:
        return
    terminal.say(f"{len(filled.too_long):,} documents have chunks longer than the new model reads: they are cut anew")
    with terminal.progress("documents") as bar:
        task = bar.add_task("cut anew", total=len(filled.too_long))
        try:
            await recut.run(
                database, configured, ready, filled.meter, sorted(filled.too_long), lambda: bar.advance(task)
            )
        except (EmbeddingFailed, BudgetSpent) as error:
            filled.stopped = error


async def _passes(
    arguments: Namespace,
    connection: Connection,
    database: Database,
    embedder: Embedder,
    ready: Settings,
    filled: Filled,
    batch: int,
) -> None:
    """Fill until a pass finds nothing that could be filled, and add up what was done."""
    while filled.stopped is None:
        missing = change.gaps(connection).missing
        with terminal.progress("chunks") as bar:
            task = bar.add_task(f"embed with {embedder.model}", total=missing)
            now = await backfill.fill(
                connection,
                database,
                embedder,
                ready,
                filled.meter,
                told=lambda done, bar=bar, task=task: bar.update(task, completed=done),  # type: ignore[misc]
                rate=arguments.rate,
                batch=batch,
                callers=arguments.callers,
            )
        filled.chunks += now.chunks
        filled.refused, filled.too_long, filled.stopped = now.refused, now.too_long, now.stopped
        if not now.chunks:
            return


def compare(arguments: Namespace, config: Settings) -> int:
    """Whether the new model finds what the former one finds."""
    with _operating(config, alone=False) as (ready, _, connection):
        weighing.show(arguments, weighing.compare(arguments, ready, connection))
    return 0


def switch(arguments: Namespace, config: Settings) -> int:
    """Have the new model searched."""
    with _operating(config) as (ready, _, connection):
        weighing.check(arguments, ready, connection)
        new = change.switch(connection)
        _show(arguments, change.standing(connection))
    _say(
        arguments,
        f"searches use {new.name} now. `pgrecall model rollback` undoes it until `pgrecall model finish`; let "
        "PGRECALL_EMBEDDING_MODEL and the settings beside it follow",
    )
    return 0


def rollback(arguments: Namespace, config: Settings) -> int:
    """Have the former model searched again."""
    with _operating(config) as (_, _, connection):
        former = change.rollback(connection)
        _show(arguments, change.standing(connection))
    _say(arguments, f"searches use {former.name} again. `pgrecall model switch` or `abandon` is what can follow")
    return 0


def finish(arguments: Namespace, config: Settings) -> int:
    """Drop the former model's vectors."""
    with _operating(config) as (_, _, connection), terminal.progress("sources") as bar:
        task = bar.add_task("sources follow", total=change.behind(connection))
        former = change.finish(connection, lambda done: bar.update(task, completed=done))
        stands = change.standing(connection)
    _show(arguments, stands)
    _say(arguments, f"the vectors of {former.name} are gone")
    return 0


def abandon(arguments: Namespace, config: Settings) -> int:
    """Give the new model up."""
    with _operating(config) as (_, _, connection), terminal.progress("sources") as bar:
        task = bar.add_task("sources follow", total=change.behind(connection))
        given_up = change.abandon(connection, lambda done: bar.update(task, completed=done))
        _show(arguments, change.standing(connection))
    _say(arguments, f"the vectors of {given_up.name} are gone")
    return 0


def wanted(arguments: Namespace, config: Settings) -> Recorded:
    """The model a command line names. Raises BadInput, or WrongSetting where its length is not known."""
    name = arguments.model
    if name is None:
        raise BadInput("model", "is missing; allowed: the name of the new model")
    if name in ("local", LOCAL_MODEL):
        if arguments.dimensions not in (None, LOCAL_DIMENSIONS):
            raise BadInput(
                "--dimensions", f"{arguments.dimensions} does not fit the local model; allowed: {LOCAL_DIMENSIONS}"
            )
        return change.model_of(LOCAL_MODEL, LOCAL_DIMENSIONS, "local", None)
    dimensions = arguments.dimensions or OPENAI_DIMENSIONS.get(name)
    if dimensions is None:
        raise WrongSetting(
            f"--dimensions: is not given, and {name!r} is not known here; allowed: the length of its vectors"
        )
    return change.model_of(name, dimensions, "openai", arguments.base_url or config.openai_base_url)


@contextmanager
def _operating(config: Settings, *, alone: bool = True) -> Iterator[tuple[Settings, str, Connection]]:
    with (
        schema.provided(config) as ready,
        schema.migration_url(ready) as url,
        change.operating(url, alone=alone) as connection,
    ):
        yield ready, url, connection


def _say(arguments: Namespace, text: str) -> None:
    if not arguments.json:
        terminal.say(text)


def _show(arguments: Namespace, stands: Standing, more: dict[str, Any] | None = None) -> None:
    if arguments.json:
        gaps = stands.gaps._asdict() if stands.gaps else None
        models = [each._asdict() for each in stands.models]
        terminal.json(
            {"models": models, "chunks": stands.chunks, "gaps": gaps, "unfinished_indexes": len(stands.unfinished)}
            | (more or {})
        )
        return
    missing = stands.gaps.missing if stands.gaps else 0
    terminal.table(
        f"embedding models ({stands.chunks:,} chunks)",
        [
            ("model", "left"),
            ("dimensions", "right"),
            ("state", "left"),
            ("chunks filled", "right"),
            ("indexes", "left"),
        ],
        [
            (
                each.name,
                each.dimensions,
                each.state,
                f"{stands.chunks - (missing if each == stands.other else 0):,}" if each.state != "dropped" else "",
                f"{len(stands.unfinished)} to be built" if each == stands.other and stands.unfinished else "",
            )
            for each in stands.models
        ],
    )
    if stands.gaps and stands.gaps.callers:
        terminal.say(f"{stands.gaps.callers:,} chunks have vectors of their callers and none of {stands.other.name}")  # type: ignore[union-attr]

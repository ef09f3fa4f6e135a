"""`pgrecall model compare`, and what a switch asks of it: whether the new model finds what the former one found."""

import asyncio
from argparse import Namespace
from typing import Any

from app import change, commands, judgements, spaces, swap, terminal, trial
from app.change import Connection
from app.errors import SetupError
from app.settings import Settings
from app.trial import Side, Trial

TOLERANCE = 0.01
"""How much the mean nDCG may fall at a switch where nothing else is asked for."""


def compare(arguments: Namespace, ready: Settings, connection: Connection) -> Trial:
    """Both models on judged queries, or on sampled chunks. Raises SetupError while chunks lack a second vector."""
    if change.other(connection) is None:
        raise SetupError("no change of the embedding model is under way, there is nothing to compare")
    missing = change.gaps(connection).missing
    if missing:
        raise SetupError(f"cannot compare: {missing:,} chunks have no second vector yet: run `pgrecall model backfill`")
    return asyncio.run(_compared(arguments, ready, connection))


async def _compared(arguments: Namespace, ready: Settings, connection: Connection) -> Trial:
    collection = None if arguments.judged is None else judgements.read(arguments.judged, arguments.tenant)
    async with commands.opened(ready) as (database, embedder):
        searched = Side("documents", embedder)
        recorded = change.other(connection)
        if recorded is None:
            raise SetupError("no change of the embedding model is under way, there is nothing to compare")
        other = Side(swap.SHADOW, await spaces.of(database, ready, embedder, recorded.model))
        # After the switch the former model is the one that is not searched.
        former, new = (searched, other) if recorded.state == "filling" else (other, searched)
        with terminal.progress("queries") as bar:
            if collection is None:
                task = bar.add_task("compare", total=arguments.sample)
                return trial.sampled(connection, former, new, arguments.sample, lambda: bar.advance(task))
            task = bar.add_task("compare", total=len(collection.questions))
            return await trial.judged(
                connection, former, new, collection.questions, arguments.k, lambda: bar.advance(task)
            )


def check(arguments: Namespace, ready: Settings, connection: Connection) -> None:
    """Raise SetupError where the judged queries that were given fall by more than the tolerance."""
    if arguments.judged is None:
        return
    found = compare(arguments, ready, connection)
    fall = trial.ndcg(found)
    if fall.difference < -arguments.tolerance:
        raise SetupError(
            f"cannot switch: nDCG@{arguments.k} falls from {fall.other:.3f} to {fall.this:.3f} (95 % interval of the "
            f"difference {fall.interval}); allowed: a fall of {arguments.tolerance:g} (--tolerance)"
        )


def show(arguments: Namespace, found: Trial) -> None:
    """The figures of both."""
    if arguments.json:
        terminal.json(_document(found))
        return
    overlap = found.overlap
    rows = [
        (
            f"overlap@{trial.OVERLAP}",
            "",
            "",
            f"{overlap.mean:.3f}",
            "" if overlap.interval is None else str(overlap.interval),
        )
    ]
    if found.judged is not None:
        rows = [
            (name, f"{each.other:.3f}", f"{each.this:.3f}", f"{each.difference:+.3f}", str(each.interval or ""))
            for name, each in found.judged.differences.items()
            if name != "mean_similarity"  # of two spaces, it tells nothing
        ] + rows
    terminal.table(
        f"{overlap.queries} {'judged queries' if found.judged else 'sampled chunks'}, exact search",
        [
            ("metric", "left"),
            ("former", "right"),
            ("new", "right"),
            ("difference", "right"),
            ("95 % interval", "right"),
        ],
        rows,
    )


def _document(found: Trial) -> dict[str, Any]:
    document: dict[str, Any] = {
        f"overlap@{trial.OVERLAP}": found.overlap.mean,
        "interval": found.overlap.interval,
        "queries": found.overlap.queries,
    }
    if found.judged is not None:
        document["metrics"] = {
            name: each._asdict() for name, each in found.judged.differences.items() if name != "mean_similarity"
        }
    return document

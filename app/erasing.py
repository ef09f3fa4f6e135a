"""`pgrecall erase`: asks, erases, vacuums where that is wanted, and prints what went and what is left where."""

import asyncio
import sys
from argparse import Namespace

import psycopg

from app import commands, erasure, schema, tenants, terminal
from app.erasure import Erased
from app.errors import BadInput, PgrecallError
from app.settings import Settings


def erase(arguments: Namespace, config: Settings) -> int:
    """Erase a tenant or one of its documents. 1 where something could still be read afterwards, or was not vacuumed."""
    tenants.check(arguments.tenant, "--tenant")
    with schema.provided(config) as ready:
        erased = asyncio.run(_erase(arguments, ready))
        vacuumed, refused = _vacuum(ready) if arguments.vacuum else (None, None)
    remains = erasure.remains(erased.tenant_id, erased.id)
    if arguments.json:
        terminal.json(
            erased._asdict()
            | {"vacuum_seconds": vacuumed, "vacuum_error": refused, "remains": [each._asdict() for each in remains]}
        )
        return 0 if erased.complete and refused is None else 1
    show(erased, "erased" if any(erased.removed.values()) else None, "erase")
    if erased.put_since:
        terminal.say(f"{erased.put_since} documents were put since, which stay")
    if vacuumed is not None:
        terminal.say(f"vacuumed in {vacuumed:.1f} s")
    if refused is not None:
        terminal.say(f"not vacuumed: {refused}")
    terminal.table(
        "what is left where nobody can read it",
        [("where", "left"), ("until", "left"), ("to finish", "left")],
        [tuple(each) for each in (remains[1:] if vacuumed is not None else remains)],
    )
    return 0 if erased.complete and refused is None else 1


def show(erased: Erased, done: str | None, verb: str) -> None:
    """What went, as a table. `done`: what was done, None where there was nothing to `verb`."""
    outcome = f"{done}, nothing of it can be read any more" if done else f"there was nothing to {verb}"
    terminal.table(
        f"{'document ' + erased.id + ' of ' if erased.id else ''}tenant {erased.tenant_id}: "
        + (outcome if erased.complete else "NOT ALL IS GONE"),
        [("table", "left"), ("rows removed", "right"), ("still readable", "right")],
        [(name, f"{count:,}", erased.readable.get(name, 0)) for name, count in erased.removed.items()],
    )


def _vacuum(config: Settings) -> tuple[float | None, str | None]:
    """Seconds it took, or why it could not be: what was erased is to be told all the same."""
    try:
        with schema.migration_url(config) as url:
            return erasure.vacuum(url), None
    except (PgrecallError, psycopg.Error) as error:
        return None, str(error).strip()


async def _erase(arguments: Namespace, config: Settings) -> Erased:
    async with commands.opened(config) as (database, _):
        if not arguments.yes:
            confirm(arguments.tenant, await erasure.extent(database, arguments.tenant, arguments.id))
        if arguments.id is not None:
            return await erasure.document(database, config, arguments.tenant, arguments.id)
        return await erasure.tenant(database, config, arguments.tenant)


def confirm(tenant_id: str, count: int) -> None:
    """Raise BadInput unless somebody types the tenant's name."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise BadInput(
            "--yes", f"is missing: {terminal.counted(count, 'document')} of tenant {tenant_id} would be erased for good"
        )
    terminal.say(
        f"{terminal.counted(count, 'document')} of tenant {tenant_id} and all that came of them will be gone for good."
    )
    terminal.say("Type the tenant's name to erase:")
    if sys.stdin.readline().strip() != tenant_id:  # input() would raise where Ctrl-D is pressed
        raise BadInput("--tenant", "that was another name; nothing was erased")

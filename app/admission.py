"""`pgrecall tenant` and `pgrecall key`: who is admitted, with what limits. As the owner, like migrations."""

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from msgspec import UNSET

from app import commands, erasing, erasure, keys, registry, schema, tenants, terminal
from app.database import connect
from app.erasure import Erased
from app.errors import BadInput, NotRegistered, SetupError
from app.registry import Asked
from app.settings import Settings
from app.statements import Statement

OPTIONS = {"scopes": "--scope", "tenant_id": "--tenant", "name": "--name", "expires_at": "--days"}
MAX_DAYS = 36_500
TO_LIMIT = "--max-rows N, --tokens-per-day N, or both, none for no limit"


def create_tenant(arguments: Namespace, config: Settings) -> int:
    """Register a tenant with its limits, or set those of one that is."""
    return _put_tenant(arguments, config, new=True)


def limit_tenant(arguments: Namespace, config: Settings) -> int:
    """Set limits of a tenant that is registered; a name that is misspelt registers nobody."""
    if arguments.max_rows is UNSET and arguments.tokens_per_day is UNSET:
        raise BadInput("", f"nothing to set; allowed: {TO_LIMIT}")
    return _put_tenant(arguments, config, new=False)


def _put_tenant(arguments: Namespace, config: Settings, *, new: bool) -> int:
    name = arguments.tenant
    limits = (arguments.max_rows, arguments.tokens_per_day)
    statement = registry.put_tenant(name, *limits, spelt=lambda field: _option(field, "tenant"))
    with _owner(config) as run:
        before = run(registry.list_tenants(tenant_id=name))
        if not new and not (before and before[0]["created_at"]):
            raise BadInput("tenant", f"there is no tenant {name!r}; register it: pgrecall tenant create {name}")
        created = run(statement)[0]["created"]
        (row,) = run(registry.list_tenants(tenant_id=name))
    if arguments.json:
        terminal.json(row | {"created": created})
        return 0
    if created:
        terminal.say(f"tenant {name} is registered")
    elif limits == (UNSET, UNSET):
        terminal.say(
            f"tenant {name} was registered before and nothing is changed; its limits: pgrecall tenant limit {name}"
        )
    else:
        terminal.say(f"limits of tenant {name} are set; servers know them within {config.key_cache:g} s")
    _tenants([row])
    return 0


def list_tenants(arguments: Namespace, config: Settings) -> int:
    """Every tenant that is registered or in use."""
    with _owner(config) as run:
        rows = run(registry.list_tenants())
    if arguments.json:
        terminal.json({"tenants": rows})
    else:
        _tenants(rows)
    return 0


def delete_tenant(arguments: Namespace, config: Settings) -> int:
    """Revoke its keys, wait until no server takes them any more, erase. 1 where something could still be read afterwards."""
    name = arguments.tenant
    tenants.check(name, "tenant")
    with schema.provided(config) as ready, _owner(ready) as run:
        if not arguments.yes:
            asyncio.run(_confirm(name, ready))
        known = bool(run(registry.list_tenants(tenant_id=name)))
        revoked = run(registry.delete_tenant(name))[0]["revoked"]
        if revoked:
            time.sleep(config.key_cache)
        erased = asyncio.run(_erase(name, ready))
    if arguments.json:
        terminal.json({"revoked": revoked} | erased._asdict())
    else:
        terminal.say(f"{revoked} keys revoked")
        erasing.show(erased, "deleted" if known else None, "delete")
        terminal.say("`pgrecall erase --help` and docs/ingest.md say what VACUUM and backups still hold")
    return 0 if erased.complete else 1


async def _confirm(tenant_id: str, config: Settings) -> None:
    async with commands.opened(config) as (database, _):
        erasing.confirm(tenant_id, await erasure.extent(database, tenant_id, None))


async def _erase(tenant_id: str, config: Settings) -> Erased:
    async with commands.opened(config) as (database, _):
        return await erasure.tenant(database, config, tenant_id)


def create_key(arguments: Namespace, config: Settings) -> int:
    """Make a key and show it, once."""
    asked = Asked(
        scopes=arguments.scope,
        tenant_id=arguments.tenant,
        name=arguments.name,
        expires_at=_expiry(arguments.days),
        requests_per_minute=arguments.requests_per_minute,
        concurrent_streams=arguments.concurrent_streams,
    )
    minted = keys.mint()
    statement = registry.create_key(asked, minted, spelt=lambda name: _option(name, "--tenant"))
    with _owner(config) as run:
        try:
            (row,) = run(statement)
        except NotRegistered as error:
            raise BadInput("--tenant", f"{error}; register it: pgrecall tenant create {asked.tenant_id}") from None
    if arguments.json:
        terminal.json({"key": minted.token} | row)
    else:
        terminal.out.print(minted.token, markup=False, soft_wrap=True)
        whose = f"tenant {asked.tenant_id}" if asked.tenant_id else "all tenants, to administer them"
        until = "" if asked.expires_at is None else f", until {asked.expires_at:%Y-%m-%d %H:%M} UTC"
        terminal.say(f"for {whose}: {', '.join(asked.scopes)}{until}. It is not stored and not shown again.")
    return 0


def _expiry(days: float | None) -> datetime | None:
    if days is None:
        return None
    if not 0 < days <= MAX_DAYS:
        raise BadInput("--days", f"is {days:g}; allowed: a number above 0 to {MAX_DAYS}")
    return datetime.now(UTC) + timedelta(days=days)


def list_keys(arguments: Namespace, config: Settings) -> int:
    """Every key, or one tenant's."""
    wanted = getattr(arguments, "tenant", None)
    with _owner(config) as run:
        rows = [row for row in run(registry.list_keys()) if wanted in (None, row["tenant_id"])]
        if wanted is not None and not rows and not run(registry.list_tenants(tenant_id=wanted)):
            raise BadInput("--tenant", f"there is no tenant {wanted!r}")
    if arguments.json:
        terminal.json({"keys": rows})
        return 0
    headings = ("prefix", "tenant", "scopes", "name", "state", "last used", "requests/min", "streams")
    terminal.table(
        "keys",
        [(heading, "right" if heading in ("requests/min", "streams") else "left") for heading in headings],
        [
            (
                row["prefix"],
                row["tenant_id"] or "(all)",
                " ".join(row["scopes"]),
                row["name"] or "",
                _state(row),
                "never" if row["last_used_at"] is None else f"{row['last_used_at'].astimezone(UTC):%Y-%m-%d %H:%M}",
                _limit(row["requests_per_minute"]),
                _limit(row["concurrent_streams"]),
            )
            for row in rows
        ],
    )
    return 0


def _state(row: dict[str, Any]) -> str:
    if row["revoked_at"] is not None:
        return "revoked"
    if row["expires_at"] is None:
        return "valid"
    expired = row["expires_at"] <= datetime.now(UTC)
    return f"{'expired' if expired else 'valid until'} {row['expires_at'].astimezone(UTC):%Y-%m-%d %H:%M}"


def revoke_key(arguments: Namespace, config: Settings) -> int:
    """Have a key refused."""
    with _owner(config) as run:
        (row,) = run(registry.revoke_key(arguments.prefix))
    if arguments.json:
        terminal.json(row)
    else:
        terminal.say(f"key {row['prefix']} is revoked; servers refuse it within {config.key_cache:g} s")
    return 0


def _tenants(rows: list[dict[str, Any]]) -> None:
    headings = ("chunks", "most", "tokens today", "a day", "valid keys")
    terminal.table(
        "tenants",
        [("tenant", "left"), ("registered", "left"), *((heading, "right") for heading in headings)],
        [
            (
                row["tenant_id"],
                "no" if row["created_at"] is None else f"{row['created_at'].astimezone(UTC):%Y-%m-%d %H:%M}",
                f"{row['chunks']:,}",
                _limit(row["max_rows"]),
                f"{row['tokens_today']:,}",
                _limit(row["tokens_per_day"]),
                row["keys"],
            )
            for row in rows
        ],
    )


def _limit(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _option(field: str, tenant: str) -> str:
    return tenant if field == "tenant_id" else OPTIONS.get(field, "--" + field.replace("_", "-"))


@contextmanager
def _owner(config: Settings) -> Iterator[Any]:
    """Runs statements of the registry as the owner. Raises SetupError where the login is not the owner's."""
    with (
        nullcontext(config) if config.migration_url else schema.provided(config) as ready,
        schema.migration_url(ready) as url,
        connect(url) as connection,
    ):

        def run(statement: Statement) -> list[dict[str, Any]]:
            try:
                return registry.run_as_owner(connection, statement)
            except psycopg.errors.InsufficientPrivilege:
                raise SetupError(
                    "this login may not administer tenants and keys: set PGRECALL_MIGRATION_URL to the owner's URL"
                ) from None

        yield run

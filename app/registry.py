"""The register of tenants and keys: made, listed, limited, struck off.

All of it is done by functions of the database (revision 0010), which ask for the hash of an admin key unless it is the owner
who calls. So the statements are the same on the command line, as the owner, and behind the API, as pgrecall_app.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import psycopg
from msgspec import UNSET, UnsetType
from psycopg.rows import dict_row

from app import keys, tenants
from app.database import Database, translated
from app.drafts import check_moment, check_range, check_text
from app.errors import BadInput
from app.keys import Caller, Minted
from app.statements import Statement

MAX_LIMIT = 10**12
MAX_NAME_BYTES = 200
LIFE = timedelta(days=36_500)

LIST_KEYS = "select * from list_keys(%(by)s, %(proof)s)"
"""Every key, or those of the tenant an admin key is bound to."""

PAGE_OF_KEYS = """
select * from list_keys(%(by)s, %(proof)s)
 where %(after)s::text is null or prefix > %(after)s collate "C"
 order by prefix collate "C" limit %(limit)s
"""
"""The keys that come next by their prefixes."""

CREATE_KEY = """
select * from create_key(%(by)s, %(proof)s, %(prefix)s, %(digest)s, %(name)s, %(scopes)s::text[], %(tenant_id)s,
                         %(expires_at)s::timestamptz, %(requests_per_minute)s::bigint, %(concurrent_streams)s::bigint)
"""
"""A key of which only the hash goes in."""

REVOKE_KEY = "select * from revoke_key(%(by)s, %(proof)s, %(prefix)s)"
"""From now on it is refused, within PGRECALL_KEY_CACHE seconds everywhere."""

LIST_TENANTS = "select * from list_tenants(%(by)s, %(proof)s, %(tenant_id)s::text)"
"""Every tenant that is registered or has chunks; or one."""

PAGE_OF_TENANTS = """
select * from list_tenants(%(by)s, %(proof)s, null)
 where %(after)s::text is null or tenant_id > %(after)s collate "C"
 order by tenant_id collate "C" limit %(limit)s
"""
"""The tenants that come next by their names."""

PUT_TENANT = """
select put_tenant(%(by)s, %(proof)s, %(tenant_id)s, %(sets_rows)s, %(max_rows)s::bigint, %(sets_tokens)s,
                  %(tokens_per_day)s::bigint) as created
"""
"""Registers a tenant, sets those of its limits that are named."""

DELETE_TENANT = "select delete_tenant(%(by)s, %(proof)s, %(tenant_id)s) as revoked"
"""Strikes a tenant off and revokes its keys."""


class Asked(NamedTuple):
    """What a new key is to be."""

    scopes: Sequence[str]
    tenant_id: str | None = None
    name: str | None = None
    expires_at: datetime | None = None
    requests_per_minute: int | None = None
    concurrent_streams: int | None = None


def list_keys(by: Caller | None = None) -> Statement:
    """A row for each key, without what is secret of it: the columns of LIST_KEYS, None for never, no limit, every tenant."""
    return Statement("list keys", LIST_KEYS, _proof(by))


def page_of_keys(by: Caller | None, limit: int, after: str | None) -> Statement:
    """At most `limit` rows, as of `list_keys`, by their prefixes: those behind `after`."""
    return Statement("page of keys", PAGE_OF_KEYS, _proof(by) | {"limit": limit, "after": after})


def create_key(asked: Asked, minted: Minted, by: Caller | None = None, spelt: Callable[[str], str] = str) -> Statement:
    """One row, as of `list_keys`. `spelt`: how the caller writes the name of a field. Raises BadInput.

    When run: NotRegistered for a tenant that is not registered, NotAllowed for one that is not the admin key's.
    """
    unknown = [scope for scope in asked.scopes if scope not in keys.SCOPES]
    if unknown or not asked.scopes or len(set(asked.scopes)) < len(asked.scopes):
        what = f"{unknown[0][:40]!r} is no scope" if unknown else "is empty or names one twice"
        raise BadInput(spelt("scopes"), f"{what}; allowed: one or more of {', '.join(keys.SCOPES)}")
    if asked.tenant_id is not None:
        tenants.check(asked.tenant_id, spelt("tenant_id"))
    elif set(asked.scopes) != {"admin"}:
        raise BadInput(spelt("tenant_id"), "is missing; a key that reads or writes is one tenant's")
    if asked.name is not None:
        check_text(spelt("name"), asked.name, 1, MAX_NAME_BYTES)
    if asked.expires_at is not None:
        check_moment(spelt("expires_at"), asked.expires_at)
        now = datetime.now(UTC)
        if not now < asked.expires_at <= now + LIFE:
            raise BadInput(
                spelt("expires_at"), f"is {asked.expires_at.isoformat()}; allowed: within the next hundred years"
            )
    if asked.requests_per_minute is not None:
        check_range(spelt("requests_per_minute"), asked.requests_per_minute, 1, MAX_LIMIT)
    if asked.concurrent_streams is not None:
        check_range(spelt("concurrent_streams"), asked.concurrent_streams, 0, MAX_LIMIT)
    values = asked._asdict() | {"scopes": [*asked.scopes], "prefix": minted.prefix, "digest": minted.digest}
    return Statement("create key", CREATE_KEY, _proof(by) | values)


def revoke_key(prefix: str, by: Caller | None = None) -> Statement:
    """One row, as of `list_keys`. When run: NotRegistered where there is no such key, or it is another tenant's than the admin key's."""
    return Statement("revoke key", REVOKE_KEY, _proof(by) | {"prefix": prefix})


def list_tenants(by: Caller | None = None, tenant_id: str | None = None) -> Statement:
    """A row for each tenant, with its limits and what counts towards them; with a name at most one.

    `created_at` is None where it is in use without being registered.
    """
    return Statement("list tenants", LIST_TENANTS, _proof(by) | {"tenant_id": tenant_id})


def page_of_tenants(by: Caller | None, limit: int, after: str | None) -> Statement:
    """At most `limit` rows, as of `list_tenants`, by their names: those behind `after`."""
    return Statement("page of tenants", PAGE_OF_TENANTS, _proof(by) | {"limit": limit, "after": after})


def put_tenant(
    tenant_id: str,
    max_rows: int | UnsetType | None = UNSET,
    tokens_per_day: int | UnsetType | None = UNSET,
    by: Caller | None = None,
    spelt: Callable[[str], str] = str,
) -> Statement:
    """One row: `created`. Limits that are UNSET stay as they are, None takes one away. Raises BadInput."""
    tenants.check(tenant_id, spelt("tenant_id"))
    limits = {"max_rows": max_rows, "tokens_per_day": tokens_per_day}
    for name, limit in limits.items():
        if isinstance(limit, int):
            check_range(spelt(name), limit, 0, MAX_LIMIT)
    values = {name: None if limit is UNSET else limit for name, limit in limits.items()}
    flags = {"sets_rows": max_rows is not UNSET, "sets_tokens": tokens_per_day is not UNSET}
    return Statement("put tenant", PUT_TENANT, _proof(by) | {"tenant_id": tenant_id} | values | flags)


def delete_tenant(tenant_id: str, by: Caller | None = None) -> Statement:
    """One row: `revoked`, how many keys. Rows of the tenant elsewhere are left to an erasure."""
    return Statement("delete tenant", DELETE_TENANT, _proof(by) | {"tenant_id": tenant_id})


def _proof(by: Caller | None) -> dict[str, Any]:
    return {"by": by.prefix if by else "", "proof": by.digest if by else b""}


async def run(database: Database, statement: Statement) -> list[dict[str, Any]]:
    """In the service, as pgrecall_app. Raises NotAuthenticated where the admin key is not valid any more."""
    return await database.fetch_public(statement, apart=False)


def run_as_owner(connection: psycopg.Connection[Any], statement: Statement) -> list[dict[str, Any]]:
    """On the command line."""
    with translated():
        return connection.cursor(row_factory=dict_row).execute(statement.sql.encode(), statement.values).fetchall()

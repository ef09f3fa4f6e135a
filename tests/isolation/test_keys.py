"""Every route × no key, another tenant's, a revoked one, an expired one, one that may only read: alike in both worlds."""

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql

from app import keys, registry
from app.registry import Asked as Wanted
from tests.isolation.routes import KEYED, RECIPES, SEARCHES, Recipe
from tests.isolation.worlds import Asked, World, ask, difference, marked, serving

ADMIN: dict[tuple[str, str], Recipe] = {route: lambda _, asked=asked: [asked] for route, asked in KEYED.items()}
pytestmark = pytest.mark.long  # a minute and a half; make test has tests/api/test_keys_api.py


class Minted(NamedTuple):
    """A key that every world has, with the same secret."""

    name: str
    tenant: str
    scopes: tuple[str, ...]
    key: keys.Minted


KEYS = [
    Minted("acme's", "acme", ("read", "write"), keys.mint()),
    Minted("reading", "acme", ("read",), keys.mint()),
    Minted("revoked", "acme", ("read", "write", "admin"), keys.mint()),
    Minted("expired", "acme", ("read", "write", "admin"), keys.mint()),
    Minted("admin's", "acme", ("admin",), keys.mint()),
]
FOREIGN = Minted("umbral's", "umbral", ("read", "write", "admin"), keys.mint())
"""There only where umbral is."""
SPOILT = "pgr_aaaaaaaa_" + "a" * 32


def furnished(world: World) -> None:
    """Make the keys."""
    with psycopg.connect(world.owner, autocommit=True) as owner:
        for each in [*KEYS, *([FOREIGN] if world.shared else [])]:
            registry.run_as_owner(owner, registry.put_tenant(each.tenant))
            expires = datetime.now(UTC) + timedelta(days=1)
            registry.run_as_owner(
                owner, registry.create_key(Wanted(each.scopes, each.tenant, expires_at=expires), each.key)
            )
        spoil = sql.SQL(
            "update api_keys set {} = now() - interval '1 hour', created_at = now() - interval '2 hours' where prefix = %s"
        )
        for name, column in (("revoked", "revoked_at"), ("expired", "expires_at")):
            (prefix,) = (each.key.prefix for each in KEYS if each.name == name)
            owner.execute(spoil.format(sql.Identifier(column)), (prefix,))


def with_key(requests: list[Asked], token: str | None) -> list[Asked]:
    if token is None:
        return requests
    return [each._replace(headers={**each.headers, "Authorization": f"Bearer {token}"}) for each in requests]


def token_of(name: str) -> str:
    return next(each.key.token for each in KEYS if each.name == name)


STATES: dict[str, tuple[str | None, str, frozenset[int]]] = {
    "no key": (None, "umbral", frozenset({401})),
    "no such key": (SPOILT, "umbral", frozenset({401})),
    "revoked": (token_of("revoked"), "acme", frozenset({401})),
    "expired": (token_of("expired"), "acme", frozenset({401})),
    "wrong tenant": (token_of("acme's"), "umbral", frozenset({400, 403, 404})),
}
"""The key, the tenant that is named, and the statuses that may come back."""


@pytest.mark.parametrize("route", RECIPES | ADMIN, ids=" ".join)
async def test_a_key_opens_its_own_tenant_and_nothing_else(pair, route):
    both, _ = pair
    for world in pair:
        furnished(world)
    before = both.foreign()
    recipe = (RECIPES | ADMIN)[route]
    per_world = []
    for world in pair:
        async with serving(world.settings()) as client:
            told = {}
            for state, (token, tenant, statuses) in STATES.items():
                told[state] = await ask(client, with_key(recipe(tenant), token))
                got = {each.status for each in told[state]}
                assert got <= statuses, (state, got)
            if route[0] != "GET" and route not in SEARCHES:
                told["read-only"] = await ask(client, with_key(recipe("acme"), token_of("reading")))
                mine = [
                    each
                    for each, request in zip(told["read-only"], recipe("acme"), strict=True)
                    if request.method == route[0]
                ]
                assert {each.status for each in mine if each.status != 412} == {403}
            told["its own"] = await ask(
                client, with_key(recipe("acme"), token_of("admin's" if route in ADMIN else "acme's"))
            )
            per_world.append(told)
    assert both.foreign() == before
    for state, there in per_world[0].items():
        assert marked(there) == [], state
        assert difference(there, per_world[1][state]) == "", state

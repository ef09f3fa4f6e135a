"""Each lock holds alone: the predicates on the tenant without views and policies, and these without any one predicate.

    .venv/bin/python -m pytest tests/isolation/test_mutations.py -s

A mutant is a statement the application sends with one of its predicates `tenant_id = …` taken out. Under views and
policies none may change an answer. As a check of the check, mutants are run once more where views and policies let
everything through: there some must be seen to do something, or the test would see nothing. Not all: most statements name
the tenant more than once.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import httpx
import psycopg
import pytest

from app import isolation
from tests.conftest import cloned
from tests.isolation import mutations
from tests.isolation.mutations import Mutant
from tests.isolation.routes import RECIPES
from tests.isolation.worlds import Asked, World, ask, difference, marked, serving

READS = [route for route in RECIPES if route[0] == "GET" or route[1] in {"/search", "/search/batch", "/rag"}]
"""Routes that change nothing: their mutants share a database."""
WRITES = [route for route in RECIPES if route not in READS]

POLICIES = """
select policyname, tablename from pg_policies
 where schemaname = 'public' and (qual ~ 'pgrecall.tenant_id' or with_check ~ 'pgrecall.tenant_id')
"""
VIEWS = """
select c.relname, pg_get_viewdef(c.oid) from pg_class c
 where c.relnamespace = 'public'::regnamespace and c.relkind = 'v' and pg_get_viewdef(c.oid) ~ 'pgrecall.tenant_id'
"""
OF_TENANT = re.compile(
    r"\(?\(?(?:\w+\.)?tenant_id = current_setting\('pgrecall.tenant_id'::text, true\)\)?(?: AND )?", re.IGNORECASE
)


def opened(world: World) -> None:
    """Have views and policies let everything through, as if they were not there."""
    with psycopg.connect(world.owner, autocommit=True) as owner:
        policies, views = owner.execute(POLICIES).fetchall(), owner.execute(VIEWS).fetchall()
        assert policies
        assert views
        for name, table in policies:
            owner.execute(f"alter policy {name} on {table} using (true) with check (true)".encode())
        for name, definition in views:
            text, count = OF_TENANT.subn("true", definition)
            assert count, definition
            owner.execute(f"create or replace view {name} as {text}".encode())


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service starts although views and policies let everything through, which it refuses otherwise."""
    monkeypatch.setattr(isolation, "faults", lambda _: [])


class Trial(NamedTuple):
    """A mutant and the requests that send its statement."""

    mutant: Mutant
    requests: list[Asked]


@asynccontextmanager
async def listening(world: World) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """The application on a world, and the statements it sends."""
    heard: list[str] = []

    def hear(text: str) -> str:
        heard.append(text)
        return text

    async with serving(world.settings()) as client:
        with mutations.rewritten(hear):
            yield client, heard


async def trials(world: World, route: tuple[str, str]) -> list[Trial]:
    """Every mutant of a route: of reading ones with the one request that sends it, else with the whole recipe."""
    requests = RECIPES[route]("acme")
    found: dict[Mutant, list[Asked]] = {}
    async with listening(world) as (client, heard):
        for request in requests:
            heard.clear()
            await ask(client, [request])
            for text in dict.fromkeys(heard):
                for mutant in mutations.of(text):
                    found.setdefault(mutant, [request] if route in READS else requests)
    return [Trial(*each) for each in found.items()]


class Seen(NamedTuple):
    """What a mutant did."""

    leaked: bool
    differs: bool
    touched: bool


async def tried(world: World, trial: Trial, expected: list[object] | None) -> tuple[Seen, list[object]]:
    before = world.foreign()
    async with serving(world.settings()) as client:
        with mutations.rewritten(lambda text: trial.mutant.mutated if text == trial.mutant.text else text):
            answers = await ask(client, trial.requests)
    differs = expected is not None and answers != expected
    return Seen(bool(marked(answers)), differs, world.foreign() != before), list(answers)


@pytest.mark.parametrize("route", RECIPES, ids=" ".join)
async def test_without_views_and_policies_the_predicates_hold(pair, route):
    both, _ = pair
    opened(both)
    before = both.foreign()
    answers = []
    for world in pair:
        async with serving(world.settings()) as client:
            answers.append(await ask(client, RECIPES[route]("acme")))
    assert both.foreign() == before
    assert marked(answers[0]) == []
    assert difference(*answers) == ""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "open_",
    [False, True],
    ids=["under views and policies", "without them"],
)
async def test_a_predicate_may_be_missing(cluster, templates, answering, open_):
    counts = {"mutants": 0, "seen": 0, "leaked": 0, "touched": 0, "differing": 0}
    seen: list[str] = []
    with cloned(cluster, templates[0]) as reading:
        shared = World(cluster, reading, answering.url, True)
        if open_:
            opened(shared)
        for route in RECIPES:
            with cloned(cluster, templates[0]) as listened:
                every = await trials(World(cluster, listened, answering.url, True), route)
            assert every, route
            for trial in every:
                if route in READS:
                    async with serving(shared.settings()) as client:
                        expected = await ask(client, trial.requests)
                    result, _ = await tried(shared, trial, expected)
                else:
                    with cloned(cluster, templates[0]) as written, cloned(cluster, templates[0]) as other:
                        worlds = [World(cluster, name, answering.url, True) for name in (written, other)]
                        if open_:
                            opened(worlds[1])
                        async with serving(worlds[0].settings()) as client:
                            expected = await ask(client, trial.requests)
                        result, _ = await tried(worlds[1], trial, expected)
                counts["mutants"] += 1
                counts["leaked"] += result.leaked
                counts["touched"] += result.touched
                counts["differing"] += result.differs
                counts["seen"] += any(result)
                if any(result):
                    seen.append(f"{route} {result}\n{trial.mutant.mutated}")
    print(counts)
    if open_:
        assert counts["seen"] > counts["mutants"] / 10, counts
    else:
        assert not seen, "\n".join(seen[:3])

"""Each lock holds alone: the predicates on the tenant without views and policies, and these without any one predicate.

    .venv/bin/python -m pytest tests/isolation/test_mutations.py -s

A mutant is a statement the application sends with one of its predicates `tenant_id = …` taken out. Under views and
policies none may change an answer. As a check of the check, mutants are run once more where views and policies let
everything through: there some must be seen to do something, or the test would see nothing. Not all: most statements name
the tenant more than once.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psycopg
import pytest

from app import isolation
from app.settings import Settings
from tests.conftest import cloned
from tests.isolation import mutations
from tests.isolation.mutations import Mutant
from tests.isolation.routes import RECIPES, SEARCHES, WALKING
from tests.isolation.worlds import Asked, Told, World, ask, difference, marked, serving

READS = [route for route in RECIPES if route[0] == "GET" or route in SEARCHES]
"""Routes that change nothing: their mutants share a database."""

UNSEEN = {("GET", "/status")}
"""Routes of which no mutant is seen to do anything: of the two rows the first is taken, which is acme's."""

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


class Seen(NamedTuple):
    """What a mutant did."""

    leaked: bool
    differs: bool
    touched: bool


class Service(NamedTuple):
    """A world and the settings it is served with."""

    world: World
    walks: bool

    @property
    def settings(self) -> Settings:
        """So small a world is searched by measuring every row, unless that is forbidden."""
        return self.world.settings(**({"exact_rows": 0} if self.walks else {}))

    async def answers(self, requests: list[Asked], rewrite: Callable[[str], str]) -> list[Told]:
        """What a service just started, which remembers nothing, answers when its statements pass through `rewrite`."""
        async with serving(self.settings) as client:
            with mutations.rewritten(rewrite):
                return await ask(client, requests)

    async def trials(self, route: tuple[str, str]) -> list[Trial]:
        """Every mutant of a route: of reading ones with the requests that send it, else with the whole recipe."""
        requests = RECIPES[route]("acme")
        found: dict[Mutant, list[Asked]] = {}
        for several in [[each] for each in requests] if route in READS else [requests]:
            sent: list[str] = []

            def hear(text: str, sent: list[str] = sent) -> str:
                sent.append(text)
                return text

            await self.answers(several, hear)
            for text in dict.fromkeys(sent):
                for mutant in mutations.of(text):
                    found.setdefault(mutant, []).extend(several)
        return [Trial(*each) for each in found.items()]

    async def tried(self, trial: Trial, expected: list[Told]) -> Seen:
        before, sent = self.world.foreign(), []

        def mutate(text: str) -> str:
            if text != trial.mutant.text:
                return text
            sent.append(text)
            return trial.mutant.mutated

        answers = await self.answers(trial.requests, mutate)
        assert sent, trial
        return Seen(bool(marked(answers)), answers != expected, self.world.foreign() != before)


CASES = [
    *(pytest.param(route, False, id=" ".join(route)) for route in RECIPES),
    *(pytest.param(route, True, id=f"{' '.join(route)} by the index") for route in WALKING),
]


@pytest.mark.parametrize(("route", "walks"), CASES)
async def test_without_views_and_policies_the_predicates_hold(pair, route, walks):
    both, _ = pair
    opened(both)
    before = both.foreign()
    answers = [await Service(world, walks).answers(RECIPES[route]("acme"), lambda text: text) for world in pair]
    assert both.foreign() == before
    assert marked(answers[0]) == []
    assert difference(*answers) == ""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("open_", [False, True], ids=["under views and policies", "without them"])
@pytest.mark.parametrize(("route", "walks"), CASES)
async def test_a_predicate_may_be_missing(cluster, templates, answering, route, walks, open_):
    counts = dict.fromkeys(("mutants", "seen", "leaked", "touched", "differing"), 0)
    seen: list[str] = []

    @contextlib.contextmanager
    def service() -> Iterator[Service]:
        with cloned(cluster, templates[0]) as name:
            world = World(cluster, name, answering.url, True)
            if open_:
                opened(world)
            yield Service(world, walks)

    with service() as listened:
        trials = await listened.trials(route)
    assert trials
    with service() as shared:
        expected: dict[str, list[Told]] = {}
        for trial in trials:
            asked = repr(trial.requests)
            if asked not in expected:
                expected[asked] = await shared.answers(trial.requests, lambda text: text)
            with contextlib.nullcontext(shared) if route in READS else service() as used:
                result = await used.tried(trial, expected[asked])
            counts["mutants"] += 1
            counts["leaked"] += result.leaked
            counts["touched"] += result.touched
            counts["differing"] += result.differs
            counts["seen"] += any(result)
            if any(result):
                seen.append(f"{route} {result}\n{trial.mutant.mutated}")
    print(route, walks, open_, counts)
    if open_:
        assert counts["seen"] or route in UNSEEN, counts
    else:
        assert not seen, "\n".join(seen[:3])

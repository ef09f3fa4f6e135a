"""Each lock holds alone: the predicates on the tenant without views and policies, and these without any one predicate.

    .venv/bin/python -m pytest tests/isolation/test_mutations.py -s

A mutant is a statement the application sends with one of its predicates `tenant_id = …` taken out. Under views and
policies none may change an answer. As a check of the check, mutants are run once more where views and policies let
everything through: there some must be seen to do something, or the test would see nothing. Not all: most statements name
the tenant more than once.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import psycopg
import pytest

from app import isolation
from app.settings import Settings
from tests.conftest import cloned
from tests.isolation import mutations
from tests.isolation.commands import FILTERED, READING
from tests.isolation.commands import RECIPES as COMMANDS
from tests.isolation.mutations import Mutant
from tests.isolation.routes import RECIPES, SEARCHES, WALKING
from tests.isolation.worlds import Asked, Told, World, ask, difference, marked, serving

Runs = tuple[tuple[str, ...], ...]

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


@pytest.fixture
def made(cluster, templates, answering):
    """Makes a world that is shared; `open_`: without what views and policies hold."""

    @contextlib.contextmanager
    def _made(*, open_: bool) -> Iterator[World]:
        with cloned(cluster, templates[0]) as name:
            world = World(cluster, name, answering.url, True)
            if open_:
                opened(world)
            yield world

    return _made


class Trial(NamedTuple):
    """A mutant and the requests that send its statement."""

    mutant: Mutant
    requests: list[Asked]


class Seen(NamedTuple):
    """What a mutant did."""

    leaked: bool
    differs: bool
    touched: bool


def counted(what: object, tally: list[tuple[Seen, str]]) -> list[str]:
    """Print what the mutants did, and return those that did something."""
    counts = {name: sum(getattr(found, name) for found, _ in tally) for name in Seen._fields}
    seen = [f"{what} {found}\n{text}" for found, text in tally if any(found)]
    print(what, {"mutants": len(tally), "seen": len(seen)} | counts)
    return seen


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
async def test_a_predicate_may_be_missing(made, route, walks, open_):
    tally: list[tuple[Seen, str]] = []

    @contextlib.contextmanager
    def service() -> Iterator[Service]:
        with made(open_=open_) as world:
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
            tally.append((result, trial.mutant.mutated))
    seen = counted((route, walks, open_), tally)
    assert (seen or route in UNSEEN) if open_ else not seen, "\n".join(seen[:3])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_views_and_policies_the_predicates_of_commands_hold(pair, run, command):
    both, alone = pair
    opened(both)
    before = both.foreign()
    for arguments in COMMANDS[command]:
        given = run(both, command, arguments)
        assert marked([given]) == []
        assert difference(given, run(alone, command, arguments)) == "", arguments
    assert both.foreign() == before


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("command", "open_"),
    [
        pytest.param(command, open_, id=f"{command}, {'without' if open_ else 'under'} views and policies")
        for command in COMMANDS
        for open_ in (False, True)
        if open_ or command not in FILTERED
    ],
)
def test_a_predicate_may_be_missing_in_a_command(made, run, command, open_):
    tally: list[tuple[Seen, str]] = []

    def said(world: World, several: Runs, change: Mapping[str, str], sent: list[str]) -> list[object]:
        """What the command says while statements are changed; `sent` learns all there are."""

        def rewrite(text: str) -> str:
            sent.append(text)
            return change.get(text, text)

        with mutations.rewritten(rewrite):
            return [run(world, command, arguments) for arguments in several]

    runs = COMMANDS[command]
    trials: dict[Mutant, Runs] = {}
    expected: dict[Runs, list[object]] = {}
    with made(open_=open_) as shared:
        for several in [(each,) for each in runs] if command in READING else [tuple(runs)]:
            sent: list[str] = []
            expected[several] = said(shared, several, {}, sent)
            for mutant in dict.fromkeys(each for text in sent for each in mutations.of(text)):
                trials.setdefault(mutant, several)
        for mutant, several in trials.items():
            with contextlib.nullcontext(shared) if command in READING else made(open_=open_) as world:
                before = world.foreign()
                sent = []
                told = said(world, several, {mutant.text: mutant.mutated}, sent)
                assert mutant.text in sent, mutant
                found = Seen(bool(marked(told)), told != expected[several], world.foreign() != before)
            tally.append((found, f"{mutant.mutated}\n{difference(told, expected[several])}"))
    assert trials
    seen = counted((command, open_), tally)
    assert seen if open_ else not seen, "\n".join(seen[:3])

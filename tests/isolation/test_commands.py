"""Every command of the command line: what names a tenant says nothing of another, and touches nothing of it."""

import argparse

import pytest

from app.arguments import parser
from tests.isolation.commands import RECIPES
from tests.isolation.routes import QUESTION
from tests.isolation.worlds import MARK, difference

ACROSS: dict[str, list[tuple[str, ...]]] = {
    "queue": [("--json",)],
    "status": [("--json",)],
    "index": [("--json",)],
    "settings": [("--json",)],
    "migrate": [("--check", "--json")],
    "roles": [()],
    "model": [("--json",)],
    "embed": [(QUESTION, "--json")],
    "analyst": [("nobody", "--tenant", "acme")],
    "model plan": [("other-model", "--dimensions", "64", "--json")],
}
"""The operator's, who sees that tenants are there, how many documents they have and what went wrong: no documents."""

OTHERWISE: dict[str, str] = {
    "serve": "its routes are the matrix of test_routes.py",
    "tenant": "the owner's, of all tenants at once; prints names and counts (tests/cli/test_admission.py)",
    "tenant create": "the owner's (tests/cli/test_admission.py)",
    "tenant limit": "the owner's (tests/cli/test_admission.py)",
    "tenant list": "the owner's, of all tenants at once; prints names and counts",
    "tenant delete": "an erasure, which is run here, and keys (tests/cli/test_admission.py)",
    "key": "the owner's, of all tenants at once; prints no key (tests/cli/test_admission.py)",
    "key create": "the owner's (tests/cli/test_admission.py)",
    "key list": "the owner's, of all tenants at once; prints no key",
    "key revoke": "the owner's (tests/cli/test_admission.py)",
    "sql": "psql as an analyst, whose rights are the matrix of test_sql.py",
    "demo": "serves a database of its own",
    "model backfill": "the owner's, of all tenants at once; prints counts (tests/cli/test_model_change.py)",
    "model compare": "prints figures of all tenants at once (tests/cli/test_model_change.py)",
    "model switch": "the owner's, of all tenants at once; prints figures",
    "model rollback": "the owner's, of all tenants at once",
    "model finish": "the owner's, of all tenants at once",
    "model abandon": "the owner's, of all tenants at once",
}
"""Commands that are not run here, and why."""


def leaves(made: argparse.ArgumentParser, name: str = "") -> set[str]:
    """Every command and step that can be run."""
    found = {name} if made.get_default("run") else set()
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each, below in action.choices.items():
                found |= leaves(below, f"{name} {each}".strip())
    return found


def test_every_command_has_a_recipe_or_a_reason():
    known = RECIPES.keys() | ACROSS.keys() | OTHERWISE.keys()
    made = parser()
    assert leaves(made) == known
    (commands,) = (each for each in made._actions if isinstance(each, argparse._SubParsersAction))
    below = commands.add_parser("novel").add_subparsers()
    below.add_parser("step").set_defaults(run=print)
    assert leaves(made) - known == {"novel step"}


@pytest.mark.parametrize("command", RECIPES)
def test_a_command_that_names_a_tenant_tells_and_touches_nothing_of_another(pair, run, command):
    both, alone = pair
    before = both.foreign()
    for arguments in RECIPES[command]:
        given = run(both, command, arguments)
        assert given[0] in (0, 1, 2), given
        assert MARK not in str(given[1:]).lower().replace(f'"{MARK}"', ""), arguments
        assert difference(given, run(alone, command, arguments)) == "", arguments
    assert both.foreign() == before


@pytest.mark.parametrize("command", ACROSS)
def test_an_operators_command_shows_no_document(pair, run, command):
    both, _ = pair
    before = both.foreign()
    for arguments in ACROSS[command]:
        given = run(both, command, arguments)
        assert given[0] in (0, 1, 2), given
        assert MARK not in str(given[1:]).lower().replace(f"refused {MARK}", ""), arguments
    assert both.foreign() == before

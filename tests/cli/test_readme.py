"""The README's commands give what the README shows, and the SQL of the documentation runs."""

import json
import re
import subprocess

import httpx
import psycopg
import pytest

from tests.cli.test_commands import serving

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path, kind):
    return [text for language, text in BLOCK.findall(path.read_text()) if language == kind]


def same(shown, given):
    """Equal but for moments, and for similarities in the third digit (processors round differently)."""
    if isinstance(shown, dict):
        assert shown.keys() == given.keys()
        return all(key == "created_at" or same(value, given[key]) for key, value in shown.items())
    if isinstance(shown, list):
        return len(shown) == len(given) and all(map(same, shown, given))
    if isinstance(shown, float):
        return abs(shown - given) < 0.02
    return shown == given


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("readme") / "pg") as (process, address):
        yield address, tmp_path_factory
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def asked(served, request):
    """Every curl of the README run in order: (shown, given)."""
    address, _ = served
    readme = request.config.rootpath / "README.md"
    pairs = []
    for block in blocks(readme, "console"):
        command, _, shown = block.removeprefix("$ ").partition("\n{")
        if command.startswith("curl"):
            done = subprocess.run(
                ["bash", "-c", command.replace("http://127.0.0.1:8000", address)],
                capture_output=True,
                text=True,
                check=True,
            )
            pairs.append((json.loads("{" + shown), json.loads(done.stdout)))
    return pairs


def test_every_curl_gives_what_the_readme_shows(asked):
    assert len(asked) == 3
    for shown, given in asked:
        assert same(shown, given), given


@pytest.mark.parametrize("page", ["README.md", "docs/schema.md"])
def test_the_sql_of_the_documentation_runs_as_the_analyst(asked, served, root, page):
    address, factory = served
    others = [
        ("faq/invoice", "Invoices are sent on the first of each month."),
        ("faq/twin", "Invoices are sent on the first of each month."),
    ]
    for identity, content in others:
        body = {"tenant_id": "acme", "content": content, "metadata": {"lang": "en"}}
        httpx.put(f"{address}/documents/{identity}", json=body, timeout=30).raise_for_status()
    statements = [s for s in blocks(root / page, "sql") if not s.startswith("grant")]
    assert statements
    folder = next(path for path in factory.getbasetemp().glob("readme*/pg/postgres"))
    with psycopg.connect(f"host={folder} user=analyst dbname=pgrecall", autocommit=True) as analyst:
        for statement in statements:
            assert analyst.execute(statement).fetchall(), statement


def test_the_readme_is_short_enough_to_read_and_its_links_lead_somewhere(root):
    text = (root / "README.md").read_text()
    assert len(text.splitlines()) < 200
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / target).exists(), target


def test_the_readme_names_only_commands_that_exist(root):
    makefile = (root / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", (root / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

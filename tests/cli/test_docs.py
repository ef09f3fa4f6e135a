"""The documentation's commands give what the documentation shows: each page in a shell of its own, with its own database.

A block `console` holds commands after `$ ` and what each prints, errors included; `…` stands for what is left out. Moments
and durations may differ, and similarities in the third digit (processors round differently). Not run here: `make`, which
installs, and what needs Docker; tests/unit/test_containers.py holds docs/containers.md to Dockerfile and compose.yaml.
"""

import contextlib
import io
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time

import httpx
import psycopg
import pytest
from psycopg import sql

from app import embedded, local, schema
from app.asgi import create_app
from app.settings import Settings
from tests.conftest import NEEDS_CONTRIB, PATIENCE, passwords, started_copy
from tests.openai_server import CHAT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^`([\w.]+)`[^\n]*:\n\n```json\n(.*?)^```", re.MULTILINE | re.DOTALL)
VARIES = re.compile(
    r"(?P<moment>\d{4}-\d\d-\d\dT[\d:.]+Z)|(?P<took>[\d.]+ ms|(?<=\"p\d\d\":)[\d.]+|(?<=seconds\": )[\d.]+|(?<=seconds=)[\d.]+)|(?P<number>-?\d+\.\d+)|(?P<left_out>…)"
)
PATTERNS = {"moment": r"\S+?Z", "took": r"[\d.]+(?: ms)?", "number": r"(-?\d+\.\d+)", "left_out": r"(?s:.*?)"}
FOLDED = re.MULTILINE | re.DOTALL
PROGRESS = re.compile(
    r"^(?:(?:ingest|compare) \d+ documents?|search for \d+ queries|search with other settings|search as served and exactly"
    r"|embed with \S+|building \S+|indexes|compare|sources follow) .*\n",
    re.MULTILINE,
)
ADDRESS = "http://127.0.0.1:8000"


def blocks(text, language):
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def commands(text):
    """Every command of a page and what it is said to print."""
    found = []
    for block in blocks(text, "console"):
        lines = iter(block.splitlines())
        for line in lines:
            if line.startswith("$ "):
                command = line.removeprefix("$ ")
                while unfinished(command):
                    command += "\n" + next(lines)
                found.append((command, []))
            else:
                found[-1][1].append(line)
    return [(command, "\n".join(shown)) for command, shown in found]


def unfinished(command):
    try:
        shlex.split(command)
    except ValueError:
        return True
    return command.endswith("\\")


def same(shown, given):
    """Whether that is what was printed. Tables are as wide as their widest duration."""
    shown, given = (re.sub(r"[ ━─]+", " ", text).replace(" \n", "\n").strip() for text in (shown, given))
    pattern, numbers, end = "", [], 0
    for varying in VARIES.finditer(shown):
        pattern += re.escape(shown[end : varying.start()]) + PATTERNS[varying.lastgroup]
        numbers += [float(varying[0])] if varying.lastgroup == "number" else []
        end = varying.end()
    found = re.fullmatch(pattern + re.escape(shown[end:]), given)
    return found is not None and all(
        abs(expected - float(got)) < 0.02 for expected, got in zip(numbers, found.groups(), strict=True)
    )


class Shell:
    """Runs a page's commands in order in a folder of its own; what one exports, the next ones see.

    `places` are addresses and names of the page and those that stand in for them here, the longer ones first.
    """

    def __init__(self, root, folder):
        self.folder = folder
        self.places = {}
        self.server = None
        (folder / ".venv/bin").mkdir(parents=True)
        command = folder / ".venv/bin/pgrecall"
        command.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m app "$@"\n')
        command.chmod(0o755)
        command = folder / ".venv/bin/alembic"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m alembic -c {root}/alembic.ini "$@"\n')
        command.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PGRECALL_", "OPENAI_", "DATABASE_"))}
        search = f"{folder}/.venv/bin{os.pathsep}{embedded.binaries()}{os.pathsep}{os.environ['PATH']}"
        exported = {**kept, "PATH": search, "COLUMNS": "100"}
        (folder / "exported").write_text("".join(f"export {k}={shlex.quote(v)}\n" for k, v in exported.items()))

    def run(self, command):
        """Its exit status, and what it printed in the page's words."""
        for there, here in self.places.items():
            command = command.replace(there, here)
        if re.search(r"\bpgrecall serve\b", command):
            return 0, self._said(self._serve(command))
        script = f". ./exported\n{command}\nstatus=$?\nexport -p > exported\nexit $status"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env={},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        return done.returncode, self._said(done.stdout)

    def stop(self):
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGTERM)
            self.server.wait(timeout=PATIENCE)
            self.server = None

    def _said(self, text):
        for there, here in self.places.items():
            text = text.replace(here, there)
        return PROGRESS.sub("", text)

    def _serve(self, command):
        self.stop()
        log = self.folder / "served"
        with log.open("w") as sink:
            self.server = subprocess.Popen(
                ["bash", "-c", f". ./exported\n{command} --port 0"],
                cwd=self.folder,
                env={},
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        while (found := re.search(r"serving on (http://\S+),.*\n", log.read_text())) is None:
            assert self.server.poll() is None, log.read_text()
            time.sleep(0.05)
        self.places[ADDRESS] = found[1]
        return found[0]


@pytest.fixture
def shell(root, tmp_path, ready_data):
    made = Shell(root, tmp_path)
    # One embedded server for the page, up for as long as it is read, rather than one for each command.
    with started_copy(ready_data, tmp_path / ".pgrecall"):
        yield made
        made.stop()


@pytest.fixture
def bare_shell(root, tmp_path):
    """With an embedded server that has no database yet: its first command makes one for the model of its choice."""
    made = Shell(root, tmp_path)
    with contextlib.closing(embedded.start(tmp_path / ".pgrecall", durable=False)):
        yield made
        made.stop()


def check(shell, text):
    """Run every command of a page that can run here; what is shown must have been printed, and what fails be shown."""
    for name, content in FILE.findall(text):
        (shell.folder / name).write_text(content)
    ran = 0
    for command, shown in commands(text):
        if command.startswith("docker "):
            continue
        status, given = shell.run(command)
        assert not shown or same(shown, given), f"$ {command}\n{given}"
        assert status == 0 or shown, f"$ {command}\n{given}"
        ran += 1
    assert ran


@pytest.mark.parametrize("page", ["api", "filters", "ingest", "keys", "settings"])
def test_the_commands_of_a_page_give_what_it_shows(shell, root, page):
    check(shell, (root / f"docs/{page}.md").read_text())


def test_the_readmes_commands_give_what_it_shows_on_a_postgresql_of_ones_own_too(shell, root, cluster, contrib):
    if not contrib:
        pytest.skip(NEEDS_CONTRIB)
    (shell.folder / "docs").mkdir()
    shutil.copy(root / "docs/schema.md", shell.folder / "docs")  # one page will do
    name = f"test_{secrets.token_hex(6)}"
    logins = owner, service = f"{name}_owner", f"{name}_service"
    shell.places = {
        "postgresql://postgres@db/postgres": shlex.quote(cluster.admin),
        "postgresql://postgres@db/app": shlex.quote(cluster.url(name)),
        "postgresql://app_owner@db/app": shlex.quote(cluster.url(name, owner)),
        "postgresql://app_service@db/app": shlex.quote(cluster.url(name, service)),
        "DATABASE app ": f"DATABASE {name} ",
        "app_owner": owner,
        "app_service": service,
    }
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        for login in logins:
            admin.execute(sql.SQL("create role {} login").format(sql.Identifier(login)))
        passwords(cluster, *logins)
        try:
            check(shell, (root / "README.md").read_text())
            ready = httpx.get(f"{shell.places[ADDRESS]}/health/ready").json()
            assert ready["status"] == "ready"
        finally:
            shell.stop()
            admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
            for login in logins:
                admin.execute(sql.SQL("drop role {}").format(sql.Identifier(login)))


def test_a_database_of_an_older_release_is_migrated_as_the_page_on_deploying_shows(shell, root, cluster, contrib):
    if not contrib:
        pytest.skip(NEEDS_CONTRIB)
    name = f"test_{secrets.token_hex(6)}"
    local.bootstrap(cluster.admin, name)
    passwords(cluster)
    shell.places = {
        "postgresql://app_owner@db/app": shlex.quote(cluster.url(name, local.OWNER)),
        "postgresql://app_service@db/app": shlex.quote(cluster.url(name, local.SERVICE)),
    }
    shell.places |= {
        "postgresql://postgres@db/app": shlex.quote(cluster.url(name)),
        "DATABASE app ": f"DATABASE {name} ",
    }
    schema.migrate(Settings(migration_url=cluster.url(name, local.OWNER)), "0005")
    try:
        check(shell, (root / "docs/deploy.md").read_text())
    finally:
        shell.stop()
        with psycopg.connect(cluster.admin, autocommit=True) as admin:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def test_a_server_of_ones_own_embeds_searches_and_answers_as_the_page_on_models_shows(bare_shell, root, openai):
    shell = bare_shell
    openai.models = {"granite-embedding:278m", "bge-m3", "llama3.1", "BAAI/bge-reranker-v2-m3"}
    openai.only_dimensions = 768
    openai.answer = "Open Settings, choose Security [Source 1] and press Reset [Source 7]."
    shell.places = {"http://localhost:11434/v1": openai.url, "http://localhost:8001/v1": openai.url}
    page = (root / "docs/models.md").read_text()
    check(shell, page)
    _, said = shell.run(next(command for command, _ in commands(page) if "curl -sN" in command))
    for answer in (said, *(shell.run(command)[1] for command, _ in commands(page) if "pgrecall ask" in command)):
        assert "[Source 1]" in answer
        assert "[Source 7]" not in answer
    assert {call.headers["authorization"] for call in openai.calls} == {"Bearer none"}
    assert {call.body["model"] for call in openai.chat_calls} == {"llama3.1"}
    assert all("max_tokens" in call.body for call in openai.calls if call.path == CHAT)
    readme = (root / "README.md").read_text()
    settings = [command for command, _ in commands(page) if command.startswith("export ")]
    assert len(settings) == 3
    assert all(f"    {command}\n" in readme for command in settings)


def test_the_page_on_changing_the_model_shows_what_each_step_prints(shell, root, openai):
    openai.only_dimensions = 768
    shell.places = {"http://localhost:11434/v1": openai.url}
    check(shell, (root / "docs/model-change.md").read_text())


def test_the_page_on_evaluation_shows_what_is_measured(shell, root):
    page = (root / "docs/evaluation.md").read_text()
    for name in ("scifact", "cranfield"):  # the collections are not here; something of the same layout is
        folder = shell.folder / "beir" / name
        folder.mkdir(parents=True)
        (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "Otters", "text": "They eat fish."}\n')
        (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "what do otters eat"}\n')
        (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    check(shell, page)


def test_every_route_is_on_the_pages_about_the_api_and_keys(root):
    app = create_app(Settings(database_url="postgresql://u@h/d"))
    routes = {
        (method, route.path.split("{")[0])
        for route in app.routes
        for method in getattr(route, "methods", ())
        if method not in {"OPTIONS", "HEAD"} and not route.path.startswith("/docs")
    }
    shown = set()
    pages = "".join((root / f"docs/{page}.md").read_text() for page in ("api", "keys"))
    for command, _ in commands(pages):
        if found := re.search(rf"{ADDRESS}([^?' ]*)", command):
            method = re.search(r"-X (\w+)", command)
            path = re.sub(r"^(/documents/(?!stream$)|/tenants/|/admin/\w+/).*", r"\1", found[1])
            shown.add((method[1] if method else "POST" if " -d '{" in command else "GET", path))
    assert routes <= shown
    assert len(routes) == 21


def test_the_sql_of_the_documentation_runs_as_the_analyst(shell, root):
    shell.run("pgrecall serve")
    twin = "Invoices are sent on the first of each month."
    contents = {"faq/password": "Open Settings and reset your password.", "faq/invoice": twin, "faq/twin": twin}
    for identity, content in contents.items():
        body = {"tenant_id": "acme", "content": content, "metadata": {"lang": "en"}}
        httpx.put(f"{shell.places[ADDRESS]}/documents/{identity}", json=body, timeout=PATIENCE).raise_for_status()
    url = re.search(r"'(postgresql://analyst@[^']+)'", shell.run("pgrecall status --json")[1])[1]
    pages = [(root / page).read_text() for page in ("README.md", "docs/schema.md")]
    statements = [statement for page in pages for statement in blocks(page, "sql")]
    with psycopg.connect(url.replace("analyst@", "postgres@"), autocommit=True) as admin:
        admin.execute("create role jane login")
        (grant,) = (statement for statement in statements if statement.startswith("grant"))
        admin.execute(grant)
    for login in ("analyst", "jane"):
        with psycopg.connect(url.replace("analyst@", f"{login}@"), autocommit=True) as analyst:
            for statement in statements:
                assert statement == grant or analyst.execute(statement).fetchall(), statement


def test_the_tour_in_sql_gives_what_it_shows(shell, root):
    page = (root / "docs/sql.md").read_text()
    shutil.copytree(root / "samples", shell.folder / "samples")
    (shell.folder / "nearest.sql").write_text(re.search(r"`nearest.sql`:\n\n```text\n(.*?)^```", page, FOLDED)[1])
    check(shell, page)
    url = shell.run("pgrecall sql --print-url")[1].strip()
    queries = re.findall(r"^```sql\n(.*?)^```\n\n```text\n(.*?)^```", page, FOLDED)
    assert len(queries) == len(blocks(page, "sql"))
    for query, shown in queries:
        done = subprocess.run(
            [shutil.which("psql", path=embedded.binaries()), "-X", "-c", query, url],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert same(shown, done.stdout), query + done.stdout + done.stderr
    (recipe,) = blocks(page, "python")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(recipe, {"url": url})
    assert same(re.search(r"It says:\n\n```text\n(.*?)^```", page, FOLDED)[1], said.getvalue())


def test_the_readme_is_short_enough_to_read(root):
    assert len((root / "README.md").read_text().splitlines()) < 200


def test_every_link_of_the_documentation_leads_somewhere(root):
    for page in [root / "README.md", *root.glob("docs/*.md")]:
        for target, anchor in re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), (page, target)
            headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings]


def test_the_readme_names_only_commands_that_exist(root):
    makefile = (root / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)", (root / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

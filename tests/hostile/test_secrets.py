"""Keys and passwords with a mark in them: whatever is run, and whatever fails, the mark is nowhere to be read."""

import base64
import logging
import traceback
from urllib.parse import quote

import pytest
from rich.pretty import pretty_repr

from app import settings as environment
from app import telemetry
from app.__main__ import main
from app.asgi import create_app
from app.settings import SECRET, Settings
from tests.api.conftest import opened
from tests.conftest import DIMENSIONS

MARK = "mArK7f3Q"
PASSWORD = f"p@{MARK}/w:d"
KEY = f"sk-{MARK}-key"
BEARER = f"pgr_{MARK}_bearer"
WRONG = [
    f"postgresql://user:{MARK}x/y@127.0.0.1:1/d",
    f"postgresql://user:{MARK}@127.0.0.1:port/d",
    f"postgresql://user:{MARK}@[::1/d",
    f"postgresql://user:{MARK}\u2100@127.0.0.1:1/d",
    f"postgresql://user:{MARK}%zz@127.0.0.1:1/d",
    f"postgresql://127.0.0.1:1/d?user=u&password={MARK}",
    f"postgresql://127.0.0.1:1/d?user=u&password={MARK}&nonsense=1",
    f"postgresql://user:{MARK}@nowhere.invalid/d",
    f"postgres://user:{MARK}#hash@127.0.0.1:1/d",
    f"mysql://user:{MARK}@127.0.0.1/d",
    f"postgresql+psycopg://user:{MARK}@127.0.0.1:1/d",
]


def assert_unmarked(*texts):
    for text in texts:
        assert MARK not in text, text[max(0, text.index(MARK) - 200) :][:400]
        for secret in (KEY, BEARER, f"user:{PASSWORD}"):
            coded = base64.b64encode(secret.encode()).decode().rstrip("=")
            assert coded[2:-2] not in text


def marked(url, openai_url):
    """The environment of a service whose every secret has the mark. Tests log in without a password, so any will do."""
    scheme, _, rest = url.partition("://")
    user, _, place = rest.rpartition("@")
    return {
        "DATABASE_URL": f"{scheme}://{user.partition(':')[0]}:{quote(PASSWORD, safe='')}@{place}",
        "OPENAI_API_KEY": KEY,
        "PGRECALL_OTHER_API_KEY": KEY + "2",
        "PGRECALL_RERANK_KEY": KEY + "3",
        "PGRECALL_RERANK_URL": openai_url,
        "PGRECALL_RERANK_MODEL": "ranker",
        "OPENAI_BASE_URL": openai_url,
        "PGRECALL_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
        "PGRECALL_CHAT_MODEL": "gpt-test",
        "PGRECALL_LOG_LEVEL": "debug",
        "PGRECALL_EMBEDDING_RETRIES": "0",
    }


@pytest.fixture
def run(monkeypatch, capfd):
    def _run(environ, *arguments):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        status = main(list(arguments))
        return status, *capfd.readouterr()

    return _run


@pytest.mark.parametrize("key", ["", "another"], ids=["key accepted", "key refused and echoed"])
def test_no_command_shows_a_secret(run, settings, openai, owner, tmp_path, key):
    openai.key = key or None
    file = tmp_path / "otters.md"
    file.write_text("Otters swim in rivers.")
    environ = marked(settings.database_url, openai.url)
    statuses = {}
    for command in (
        ("settings",),
        ("settings", "--json"),
        ("status",),
        ("migrate", "--check"),
        ("migrate",),
        ("roles",),
        ("ingest", str(file), "--tenant", "acme"),
        ("search", "otters", "--tenant", "acme", "--rerank"),
        ("search", "otters", "--tenant", "acme", "--json"),
        ("ask", "otters?", "--tenant", "acme"),
        ("embed", "otters"),
        ("queue", "--tenant", "acme"),
        ("retry", "--tenant", "acme", "--all"),
        ("analyst", "reader", "--tenant", "acme"),
        ("tenant", "create", "acme"),
        ("tenant", "list"),
        ("key", "create", "--tenant", "acme", "--scope", "read"),
        ("key", "list"),
        ("index",),
        ("model",),
        ("model", "plan", "text-embedding-3-large"),
        ("erase", "--tenant", "acme", "--yes"),
    ):
        try:
            status, out, err = run(environ, *command)
        except SystemExit:
            raise AssertionError(command) from None
        statuses[" ".join(command[:1])] = status
        assert_unmarked(out, err)
        assert "Traceback" not in err
    if key:
        assert statuses["search"] == 2
        assert "OPENAI_API_KEY" in err or statuses["ask"] == 2
    for (table,) in owner.execute(
        "select oid::regclass::text from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
    ).fetchall():
        assert_unmarked(*(row for (row,) in owner.execute(f"select t::text from {table} t").fetchall()))


@pytest.mark.parametrize("url", WRONG)
def test_no_wrong_address_shows_its_password(run, url):
    for command in (("status",), ("settings",), ("migrate", "--check"), ("search", "x", "--tenant", "t")):
        status, out, err = run({"DATABASE_URL": url, "PGRECALL_LOG_LEVEL": "debug"}, *command)
        assert_unmarked(out, err)
        assert status == 2 or (command == ("settings",) and not url.startswith("mysql"))
    status, out, err = run({"DATABASE_URL": ""}, "roles", "--apply", "--login", "x", "--url", url)
    assert_unmarked(out, err)
    assert status == 2


@pytest.mark.parametrize(
    "password", [quote(PASSWORD, safe=""), PASSWORD, f"{MARK}?#"], ids=["quoted", "slash", "query"]
)
def test_no_model_is_recorded_with_a_password_in_its_address(run, settings, owner_url, openai, owner, password):
    address = openai.url.replace("://", f"://user:{password}@")
    environ = {
        "DATABASE_URL": settings.database_url,
        "PGRECALL_MIGRATION_URL": owner_url,
        "PGRECALL_EMBEDDING_DIMENSIONS": str(DIMENSIONS),
        "PGRECALL_LOG_LEVEL": "debug",
    }
    for step in ("plan", "backfill"):
        for base_url, given in ((openai.url, ("--base-url", address)), (address, ())):
            command = ("model", step, "text-embedding-3-large", "--dimensions", "32", *given)
            status, out, err = run(environ | {"OPENAI_BASE_URL": base_url}, *command)
            assert_unmarked(out, err)
            said = "has a user or a password in it" if given or "?" not in address else "OPENAI_BASE_URL: "
            assert (status, said in err) == (2, True), err
    assert owner.execute("select count(*) from embedding_models").fetchone() == (1,)
    assert openai.calls == []


def test_settings_may_be_printed():
    secret = dict.fromkeys(SECRET, KEY)
    urls = {
        name: WRONG[0]
        for name in Settings.__struct_fields__
        if "url" in name and not name.startswith(("openai", "rerank"))
    }
    shown = Settings(**secret, **urls, openai_base_url=f"http://user:{PASSWORD}@127.0.0.1/v1")

    def failing(config):
        raise ValueError("something")

    try:
        failing(shown)
    except ValueError as error:
        trace = traceback.TracebackException(ValueError, error, error.__traceback__.tb_next, capture_locals=True)
    assert_unmarked(repr(shown), str(shown), f"{shown}", pretty_repr(shown), "".join(trace.format()))
    assert "database_url=" in repr(shown)


def test_every_secret_setting_is_known_as_one():
    """A new key, password or token has to be listed in SECRET, or carry its secret inside of a URL."""
    suspicious = {name for name in Settings.__struct_fields__ if name.endswith(("key", "token", "secret", "password"))}
    assert suspicious == SECRET


async def test_no_request_shows_a_secret(settings, openai, owner, capfd, monkeypatch):
    for name, value in marked(settings.database_url, openai.url).items():
        monkeypatch.setenv(name, value)
    answers = []
    async with opened(create_app(environment.read())) as client:
        bearer = {"Authorization": f"Bearer {BEARER}"}
        body = {"tenant_id": "acme", "content": "Otters swim."}
        asked = {"tenant_id": "acme", "question": "Who swims?"}
        for key in (None, "another"):
            openai.key = key
            requests = (
                client.put("/documents/a", json=body | {"content": f"Otters {key}."}, headers=bearer),
                client.post(
                    "/search", json={"tenant_id": "acme", "query": f"swims {key}", "rerank": True}, headers=bearer
                ),
                client.post("/rag", json=asked, headers=bearer),
                client.post("/rag", json=asked | {"stream": True}, headers=bearer),
                client.get("/documents", params={"tenant_id": "acme"}, headers=bearer),
                client.get("/documents", params={"tenant_id": "acme", "limit": "x"}, headers=bearer),
                client.get("/nowhere", headers=bearer),
                client.post("/search", content=b"{", headers=bearer | {"Content-Type": "application/json"}),
                client.get("/health/ready", headers=bearer | {"Cookie": f"key={BEARER}"}),
                client.get("/docs/openapi.json", headers=bearer),
            )
            answers += [await each for each in requests]
        openai.key = None
        owner.execute("alter table documents rename to documents_gone")
        answers.append(await client.post("/search", json={"tenant_id": "acme", "embedding": [1.0] * DIMENSIONS}))
        owner.execute("alter table documents_gone rename to documents")
        rows = owner.execute(
            "select application_name, query from pg_stat_activity where datname = current_database()"
        ).fetchall()
    assert_unmarked(*(f"{each.headers} {each.text}" for each in answers))
    assert_unmarked(*(str(row) for row in rows))
    assert {each.status_code for each in answers} >= {200, 201, 400, 404, 502}
    out, err = capfd.readouterr()
    assert "level=debug" in err
    assert_unmarked(out, err)


def test_a_log_blots_what_libraries_say(capfd):
    config = Settings(database_url=f"postgresql://u:{quote(PASSWORD, safe='')}@h/d", openai_api_key=KEY)
    telemetry.set_up(config)
    logging.getLogger("any").error("%s %s %s", KEY, PASSWORD, quote(PASSWORD, safe=""), exc_info=ValueError(KEY))
    assert_unmarked(*capfd.readouterr())

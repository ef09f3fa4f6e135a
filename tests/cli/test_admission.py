"""`pgrecall tenant` and `pgrecall key`."""

import json
import re

import psycopg
import pytest

from app import keys, local, server
from app.settings import Settings


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setenv("PGRECALL_KEY_CACHE", "0.1")


def test_a_tenant_and_its_keys_from_beginning_to_end(run, tmp_path):
    status, _, err = run("key", "create", "--tenant", "acme", "--scope", "read")
    assert (status, "register it: pgrecall tenant create acme" in err) == (2, True)
    status, out, _ = run("tenant", "create", "acme", "--max-rows", "10", "--json")
    made = json.loads(out)
    assert (status, made["created"], made["max_rows"], made["tokens_per_day"]) == (0, True, 10, None)
    _, out, _ = run("tenant", "create", "acme", "--tokens-per-day", "5", "--json")
    assert (json.loads(out)["created"], json.loads(out)["max_rows"], json.loads(out)["tokens_per_day"]) == (
        False,
        10,
        5,
    )
    _, out, _ = run("tenant", "create", "acme", "--max-rows", "none", "--json")
    assert json.loads(out)["max_rows"] is None
    _, out, err = run("tenant", "create", "acme")
    assert "registered before and nothing is changed; its limits: pgrecall tenant limit acme" in err
    assert "acme" in out
    status, out, err = run("tenant", "limit", "acme", "--tokens-per-day", "1234")
    assert (status, "1,234" in out, "servers know them within 0.1 s" in err) == (0, True, True)
    _, out, _ = run("tenant", "limit", "acme", "--tokens-per-day", "none", "--json")
    assert json.loads(out)["tokens_per_day"] is None

    status, out, err = run("key", "create", "--tenant", "acme", "--scope", "read", "--scope", "write", "--days", "1")
    assert status == 0
    assert re.fullmatch(keys.PATTERN, out.strip())
    assert "not shown again" in err
    status, out, _ = run("key", "create", "--scope", "admin", "--name", "ops", "--json")
    ops = json.loads(out)
    assert (ops["tenant_id"], ops["scopes"], ops["key"][4:12]) == (None, ["admin"], ops["prefix"])

    listed = json.loads(run("key", "list", "--json")[1])["keys"]
    assert [each["tenant_id"] for each in listed] == [None, "acme"]
    assert len(json.loads(run("key", "list", "--tenant", "acme", "--json")[1])["keys"]) == 1
    status, _, err = run("key", "list", "--tenant", "nobody")
    assert (status, "--tenant: there is no tenant 'nobody'" in err) == (2, True)
    shown = run("key", "list")[1] + run("key")[1] + run("tenant")[1] + run("tenant", "list")[1]
    assert ops["prefix"] in shown
    assert ops["key"][13:] not in shown

    status, _, err = run("key", "revoke", ops["prefix"])
    assert (status, "within 0.1 s" in err) == (0, True)
    assert run("key", "revoke", ops["prefix"])[0] == 0
    status, _, err = run("key", "revoke", "aaaaaaaa")
    assert (status, "there is no key 'aaaaaaaa'" in err) == (2, True)

    (tmp_path / "a.txt").write_text("A text.")
    assert run("ingest", tmp_path, "--tenant", "acme")[0] == 0
    status, _, err = run("tenant", "delete", "acme")
    assert (status, "--yes: is missing: 1 document of tenant acme" in err) == (2, True)
    status, out, _ = run("tenant", "delete", "acme", "--yes", "--json")
    gone = json.loads(out)
    assert (status, gone["revoked"], gone["complete"], gone["removed"]["sources"]) == (0, 1, True, 1)
    assert json.loads(run("tenant", "list", "--json")[1]) == {"tenants": []}
    assert "tenant acme: there was nothing to delete" in " ".join(run("tenant", "delete", "acme", "--yes")[1].split())
    assert all(each["revoked_at"] for each in json.loads(run("key", "list", "--json")[1])["keys"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tenant", "create", "a b"], "tenant: 'a b' is not allowed"),
        (["key", "create", "--scope", "read"], "--tenant: is missing"),
        (
            ["key", "create", "--tenant", "t", "--scope", "read", "--scope", "read"],
            "--scope: is empty or names one twice",
        ),
        (["key", "create", "--scope", "admin", "--days", "0"], "--days: is 0; allowed"),
        (["key", "create", "--scope", "admin", "--days", "nan"], "--days: is nan; allowed"),
        (["tenant", "delete", "a b", "--yes"], "tenant: 'a b' is not allowed"),
        (["tenant", "limit", "nobody", "--max-rows", "1"], "tenant: there is no tenant 'nobody'; register it"),
        (["tenant", "limit", "nobody"], "nothing to set; allowed: --max-rows N"),
    ],
)
def test_refusals_name_the_option(run, arguments, words):
    status, _, err = run(*arguments)
    assert (status, words in err) == (2, True), err


def test_only_the_owner_makes_keys(run, monkeypatch, data_dir):
    run("tenant", "create", "acme")
    database = local.start(Settings(data_dir=str(data_dir)))
    try:
        monkeypatch.setenv("DATABASE_URL", database.service_url)
        for arguments in (["key", "list"], ["tenant", "create", "other"], ["key", "create", "--scope", "admin"]):
            status, _, err = run(*arguments)
            assert (status, "set PGRECALL_MIGRATION_URL to the owner's URL" in err) == (2, True), err
        monkeypatch.setenv("PGRECALL_MIGRATION_URL", database.owner_url)
        assert run("key", "list")[0] == 0
        # The owner's URL is enough, and where it is not, no other database is taken for it.
        monkeypatch.delenv("DATABASE_URL")
        assert run("tenant", "create", "owners")[0] == 0
        with psycopg.connect(database.owner_url) as owner:
            assert owner.execute("select count(*) from tenants where tenant_id = 'owners'").fetchone() == (1,)
        for arguments in (["tenant", "delete", "owners", "--yes"], ["search", "x", "--tenant", "owners"], ["status"]):
            status, _, err = run(*arguments)
            assert (status, "DATABASE_URL is not set and PGRECALL_MIGRATION_URL is" in err) == (2, True), err
    finally:
        database.close()


def test_an_open_address_is_refused_until_there_is_a_key(run, monkeypatch, data_dir):
    served = []
    monkeypatch.setattr(server, "serve", lambda *_, **given: served.append(given["host"]) or 0)
    with_keys = json.loads(run("key", "list", "--json")[1])["keys"]
    if not with_keys:
        status, _, err = run("serve", "--host", "0.0.0.0")
        assert (status, "pgrecall key create" in err, served) == (2, True, [])
        assert run("serve", "--host", "0.0.0.0", "--insecure")[0] == 0
        run("key", "create", "--scope", "admin")
    assert run("serve", "--host", "0.0.0.0")[0] == 0
    assert served[-1] == "0.0.0.0"

"""Keys over HTTP: who is let in, as whom, and that nothing else is."""

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from msgspec.structs import replace

from app import keys, registry
from app.asgi import create_app
from app.errors import NotAllowed, NotAuthenticated
from app.registry import Asked
from app.statements import Statement
from tests.api.test_documents_api import assert_problem
from tests.conftest import PATIENCE

CACHED = 0.4


@asynccontextmanager
async def served(settings, **changes):
    """The application and a client of it, both ends of its life in one task."""
    app = create_app(replace(settings, **{"key_cache": CACHED, **changes}))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
        client.app = app
        yield client


def as_owner(owner, statement):
    rows = registry.run_as_owner(owner, statement)
    return rows[0] if rows else None


def make(owner, *scopes, tenant="acme", **asked):
    """A key's headers; its tenant is registered on the way."""
    minted = keys.mint()
    if tenant is not None:
        as_owner(owner, registry.put_tenant(tenant))
    as_owner(owner, registry.create_key(Asked(scopes=scopes, tenant_id=tenant, **asked), minted))
    return {"Authorization": f"Bearer {minted.token}"}


def prefix(headers):
    return headers["Authorization"][11:19]


ROUTES = [
    ("PUT", "/documents/a", "write", {"json": {"content": "text"}}),
    ("POST", "/documents", "write", {"json": {"documents": [{"id": "b", "content": "text"}]}}),
    (
        "POST",
        "/documents/stream",
        "write",
        {"content": b'{"id": "c", "content": "text"}\n', "headers": {"Content-Type": "application/x-ndjson"}},
    ),
    ("GET", "/documents/a", "read", {}),
    ("GET", "/documents", "read", {}),
    ("GET", "/status", "read", {}),
    ("POST", "/search", "read", {"json": {"query": "text"}}),
    ("POST", "/search/batch", "read", {"json": {"searches": [{"query": "text"}, {"query": "more"}]}}),
    ("POST", "/rag", "read", {"json": {"question": "text?"}}),
    ("POST", "/queue/retry", "write", {"json": {"all": True}}),
    ("DELETE", "/documents/b", "write", {}),
    ("DELETE", "/documents", "write", {"params": {"doc_type": "none"}}),
]


async def ask(client, route, headers=None, tenant=None):
    """Call a route; `tenant` is named wherever the route takes one."""
    method, path, _, given = route
    given = {**given, "headers": {**given.get("headers", {}), **(headers or {})}}
    if tenant is not None and "json" in given:
        named = {"tenant_id": tenant}
        body = given["json"]
        searches = body.get("searches")
        given["json"] = {"searches": [each | named for each in searches]} if searches else body | named
    elif tenant is not None:
        given["params"] = {**given.get("params", {}), "tenant_id": tenant}
    return await client.request(method, path, **given)


def test_the_routes_of_these_tests_are_all_there_are(settings):
    served = {
        (method, path.replace("{document_id}", "a"))
        for path, item in create_app(settings).openapi_schema.to_schema()["paths"].items()
        for method in map(str.upper, item)
        if not path.startswith(("/health", "/admin", "/tenants"))
    }
    assert served == {(method, path.replace("documents/b", "documents/a")) for method, path, *_ in ROUTES}


async def test_with_a_key_no_tenant_need_be_named_and_another_is_refused(settings, owner):
    key, other = make(owner, "read", "write"), make(owner, "read", "write", tenant="other")
    async with served(settings) as client:
        for route in ROUTES:
            answer = await ask(client, route, key)
            assert answer.status_code < 300, (route, answer.text)
            assert (await ask(client, route, key, tenant="acme")).status_code in {200, 201, 404}
            refused = assert_problem(await ask(client, route, key, tenant="other"), 403)
            # Not a word that depends on whether there is such a tenant.
            nowhere = assert_problem(await ask(client, route, key, tenant="nowhere"), 403)
            assert refused == nowhere
        assert (await client.get("/documents", headers=key)).json()["documents"]
        assert (await client.get("/documents", headers=other)).json()["documents"] == []
        assert owner.execute("select distinct tenant_id from sources").fetchall() == [("acme",)]


async def test_named_twice_in_a_query_or_spelt_otherwise_is_refused(settings, owner):
    key = make(owner, "read")
    async with served(settings) as client:
        for query in (
            "tenant_id=acme&tenant_id=other",
            "tenant_id=other&tenant_id=acme",
            "tenant_id=acme&tenant_id=acme",
        ):
            assert_problem(await client.get(f"/documents?{query}", headers=key), 400)
        for query in ("%74enant_id=other", "tenant_id=", "tenant_id=%61cme2", "tenant_id=acme%00", "tenant_id=%FF"):
            assert (await client.get(f"/documents?{query}", headers=key)).status_code in {400, 403}, query
        assert (await client.get("/documents?%74enant_id=%61cme", headers=key)).status_code == 200
        # What is decoded is what is compared with the key, whichever of two names others would take.
        typed = key | {"Content-Type": "application/json"}
        for named, status in (("acme", "other"), 403), (("other", "acme"), 200), (("other", "\\u0061cme"), 200):
            body = '{{"tenant_id": "{}", "query": "x", "tenant_id": "{}"}}'.format(*named).encode()
            assert (await client.post("/search", content=body, headers=typed)).status_code == status, named
        for odd in ("limit=5;tenant_id=other", "a=1&tenant_id=other", "tenant_id"):
            assert (await client.get(f"/documents?{odd}", headers=key)).status_code in {400, 403}, odd
        batch = {"searches": [{"query": "x"}, {"query": "x", "tenant_id": "other"}]}
        problem = assert_problem(await client.post("/search/batch", json=batch, headers=key), 403)
        assert problem["detail"].startswith("searches[1].tenant_id: ")


async def test_a_scope_is_what_a_key_has_and_not_more(settings, owner):
    allowed = {scope: make(owner, scope) for scope in keys.SCOPES}
    async with served(settings) as client:
        for route in ROUTES:
            for scope, key in allowed.items():
                answer = await ask(client, route, key)
                if scope != route[2]:
                    assert f"scope {route[2]}" in assert_problem(answer, 403)["detail"]
                else:
                    assert answer.status_code not in {401, 403}, (route, answer.text)
        assert_problem(await client.delete("/tenants/acme", headers=allowed["write"]), 403)
        assert_problem(await client.delete("/tenants/other", headers=allowed["admin"]), 403)
        assert (await client.delete("/tenants/acme", headers=allowed["admin"])).status_code == 200


async def test_none_unknown_revoked_expired_and_wrong_keys_are_told_the_same(settings, owner):
    good, revoked = make(owner, "read", "write"), make(owner, "read")
    expired = make(owner, "read", expires_at=datetime.now(UTC) + timedelta(seconds=0.3))
    as_owner(owner, registry.revoke_key(prefix(revoked)))
    await asyncio.sleep(0.3)
    wrong = {"Authorization": good["Authorization"][:-1] + ("a" if good["Authorization"][-1] != "a" else "b")}
    unknown = {"Authorization": f"Bearer {keys.mint().token}"}
    bad = [{}, unknown, revoked, expired, wrong, {"Authorization": "Bearer x"}, {"Authorization": "Basic eA=="}]
    async with served(settings) as client:
        for route in [*ROUTES, ("DELETE", "/tenants/acme", "admin", {})]:
            answers = [await ask(client, route, headers) for headers in bad]
            told = {(a.status_code, a.text, a.headers["www-authenticate"]) for a in answers}
            assert told == {(401, answers[0].text, 'Bearer realm="pgrecall"')}, route
        assert assert_problem(answers[0], 401)["detail"] == keys.REFUSED
        assert owner.execute("select count(*) from sources").fetchone() == (0,)
        for path in ("/health/live", "/health/ready", "/docs", "/docs/openapi.json", "/docs/assets/swagger-ui.css"):
            assert (await client.get(path)).status_code == 200, path


async def test_revoking_and_expiry_take_effect_within_the_time_keys_are_remembered(settings, owner):
    key = make(owner, "read")
    async with served(settings, key_cache=60.0) as client:
        status, seconds = 401, 0.5
        while status != 200:  # a busy machine may take longer than a key lasts to let it in
            seconds *= 2
            short = make(owner, "read", expires_at=datetime.now(UTC) + timedelta(seconds=seconds))
            status = (await client.get("/status", headers=short)).status_code
        await asyncio.sleep(seconds)
        assert (await client.get("/status", headers=short)).status_code == 401
    async with served(settings) as client:
        assert (await client.get("/status", headers=key)).status_code == 200
        as_owner(owner, registry.revoke_key(prefix(key)))
        await asyncio.sleep(CACHED + 0.05)
        assert (await client.get("/status", headers=key)).status_code == 401


@pytest.mark.parametrize("how", ["revoked", "tenant deleted", "first key made"])
async def test_a_stream_that_goes_on_stores_nothing_more_once_its_key_is_refused(settings, owner, how):
    key = {} if how == "first key made" else make(owner, "write")
    admin = {} if how == "first key made" else make(owner, "admin", tenant=None)
    headers = {"Content-Type": "application/x-ndjson", **key}
    async with served(settings) as client:

        async def body():
            yield b'{"id": "a", "content": "text"}\n'
            async with asyncio.timeout(PATIENCE):
                while owner.execute("select count(*) from sources").fetchone() != (1,):  # noqa: ASYNC110  the server's
                    await asyncio.sleep(0.01)
            if how == "revoked":
                as_owner(owner, registry.revoke_key(prefix(key)))
            elif how == "tenant deleted":
                assert (await client.delete("/admin/tenants/acme", headers=admin)).status_code == 200
            else:
                make(owner, "read")
            await asyncio.sleep(CACHED + 0.05)
            yield b'{"id": "b", "content": "text"}\n'

        answer = await client.post("/documents/stream?tenant_id=acme", content=body(), headers=headers)
    first, second, summary = map(json.loads, answer.text.splitlines())
    assert (first["status"], second["status"], second["error"]["status"]) == ("created", "failed", 401)
    assert (summary["done"], summary["stopped"]["detail"]) == (False, keys.REFUSED)
    assert owner.execute("select count(*) from sources where id = 'b'").fetchone() == (0,)


async def test_a_remembered_key_asks_the_database_nothing_and_a_wrong_one_always(settings, owner, monkeypatch):
    key = make(owner, "read")
    async with served(settings, key_cache=60.0) as client:
        asked = []
        database = client.app.state.service.database
        fetch = database.fetch_public

        async def counted(statement, **options):
            asked.append(statement.name)
            return await fetch(statement, **options)

        monkeypatch.setattr(database, "fetch_public", counted)
        answers = await asyncio.gather(*(client.get("/status", headers=key) for _ in range(20)))
        assert {each.status_code for each in answers} == {200}
        assert asked == ["find key", "use key"]
        for _ in range(3):
            await client.get("/status", headers=key)
        assert len(asked) == 2
        # The prefix is known and remembered; that tells a guesser nothing, not even by the time it takes.
        for token in (f"{key['Authorization'][7:20]}{'x' * 32}", f"pgr_unknown1_{'x' * 32}"):
            assert (await client.get("/status", headers={"Authorization": f"Bearer {token}"})).status_code == 401
        assert asked[2:] == ["find key", "find key"]


async def test_a_flood_of_wrong_keys_is_looked_up_one_by_one_until_there_were_too_many(settings, owner, monkeypatch):
    monkeypatch.setattr(keys, "WRONG_AT_ONCE", 20)
    monkeypatch.setattr(keys, "WRONG_A_SECOND", 0)
    key, newcomer = make(owner, "read"), make(owner, "read")
    flood = [{"Authorization": f"Bearer {keys.mint().token}"} for _ in range(60)]
    async with served(settings, key_cache=0.0) as client:
        assert (await client.get("/status", headers=key)).status_code == 200
        database = client.app.state.service.database
        fetch = database.fetch_public
        looked_up, under_way = [], []

        async def watched(statement, **options):
            if statement.name != "find key" or statement.values["prefix"] == prefix(key):
                return await fetch(statement, **options)
            looked_up.append(statement.values["prefix"])
            under_way.append(statement.values["prefix"])
            assert len(under_way) == 1
            rows = await fetch(statement, **options)
            under_way.pop()
            return rows

        monkeypatch.setattr(database, "fetch_public", watched)
        answers = await asyncio.gather(*(client.get("/status", headers=each) for each in [*flood, *[key] * 10]))
        wrong, valid = answers[: len(flood)], answers[len(flood) :]
        assert [each.status_code for each in wrong] == [401] * 20 + [429] * 40
        assert {each.status_code for each in valid} == {200}, "each of them asks the database, and is not kept out"
        assert len(looked_up) == 20
        problem = assert_problem(wrong[-1], 429)
        assert (problem["type"], wrong[-1].headers["retry-after"]) == ("urn:pgrecall:problem:limit-reached", "1")
        # A valid key that this process has not seen cannot be told from a wrong one, until it is looked up.
        assert (await client.get("/status", headers=newcomer)).status_code == 429
        monkeypatch.setattr(keys, "WRONG_A_SECOND", 1e9)
        assert (await client.get("/status", headers=newcomer)).status_code == 200
        assert (await client.get("/status", headers=flood[-1])).status_code == 401


async def test_last_use_is_written_down_beside_the_request(settings, owner):
    key = make(owner, "read")
    async with served(settings) as client:
        assert (await client.get("/status", headers=key)).status_code == 200
        async with asyncio.timeout(PATIENCE):
            while owner.execute("select last_used_at from api_keys").fetchone() == (None,):  # noqa: ASYNC110  another process
                await asyncio.sleep(0.01)


async def test_the_first_key_closes_a_running_server_for_good_and_the_log_says_so(settings, owner, caplog):
    caplog.set_level(logging.INFO, "app.keys")
    async with served(settings) as client:
        logging.getLogger().addHandler(caplog.handler)
        assert (await client.get("/status", params={"tenant_id": "acme"})).status_code == 200
        assert "has a key now" not in caplog.text
        key = make(owner, "read")
        # Whoever brings a key is looked up at once; who brings none, after the time in which nothing is looked at.
        assert (await client.get("/status", headers=key)).status_code == 200
        assert (await client.get("/status", params={"tenant_id": "acme"})).status_code == 401
        owner.execute("delete from api_keys")
        await asyncio.sleep(CACHED + 0.05)
        assert (await client.get("/status", params={"tenant_id": "acme"})).status_code == 401
        assert caplog.text.count("has a key now") == 1
    async with served(settings, auth="keys") as client:
        assert (await client.get("/status", params={"tenant_id": "acme"})).status_code == 401


@pytest.mark.parametrize(
    ("address", "auth", "status"),
    [
        ("127.0.0.1", "auto", 200),
        ("::1", "auto", 200),
        ("::ffff:127.0.0.1", "auto", 200),
        ("10.1.2.3", "auto", 401),
        ("::ffff:10.1.2.3", "auto", 401),
        ("fe80::1%eth0", "auto", 401),
        ("10.1.2.3", "insecure", 200),
    ],
)
async def test_without_keys_only_this_machine_is_served_whatever_server_runs_the_application(
    settings, address, auth, status
):
    async with served(settings, auth=auth) as client:
        inner = client.app

        async def moved(scope, receive, send):
            await inner({**scope, "server": (address, 8000)}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=moved), base_url="http://test") as there:
            answer = await there.get("/status", params={"tenant_id": "acme"})
            assert answer.status_code == status
            assert status == 200 or "key create" in answer.json()["detail"]


async def test_open_mode_is_announced_and_only_then(settings, owner, capsys):
    async with served(settings):
        assert "open mode" in capsys.readouterr().err
    make(owner, "read")
    async with served(settings):
        assert "open mode" not in capsys.readouterr().err


async def test_the_openapi_document_says_what_keys_are_for(client):
    document = (await client.get("/docs/openapi.json")).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if path.startswith("/health"):
                assert "security" not in operation
                assert "401" not in operation["responses"]
                continue
            ((scopes,),) = (each.values() for each in operation["security"])
            assert set(scopes) <= set(keys.SCOPES), (path, method)
            assert {"401", "403", "429"} <= set(operation["responses"]), (path, method)
            assert "Retry-After" in operation["responses"]["429"]["headers"]
            assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
            assert "RateLimit" in operation["responses"]["429"]["headers"]
            for status in {"200", "201", "202", "429"} & set(operation["responses"]):
                assert "RateLimit-Policy" in operation["responses"][status]["headers"], (path, method)
            named = [p for p in operation.get("parameters", []) if p["name"] == "tenant_id" and p["in"] == "query"]
            assert not any(p.get("required") for p in named)
    for name in ("SearchRequest", "RagRequest", "PutDocument", "PutDocuments", "Retry"):
        shown = document["components"]["schemas"][name]
        assert "tenant_id" not in shown.get("required", [])
        assert "default" not in shown["properties"]["tenant_id"]


class TestTheDatabase:
    """What the service's own role can do about keys, whatever the application forgets."""

    async def test_it_reads_and_writes_no_keys(self, owner, database):
        make(owner, "read")
        for statement in (
            "select * from api_keys",
            "select key_hash from api_keys",
            "update api_keys set revoked_at = null",
            "insert into api_keys (prefix, key_hash, scopes) values ('aaaaaaaa', 'x', '{admin}')",
            "delete from api_keys",
            "select * from tenants",
            "delete from key_streams",
            "select admin_tenant('', '')",
        ):
            with pytest.raises(Exception, match="permission denied"):
                await database.fetch_public(Statement("forbidden", statement, {}))

    async def test_it_administers_nothing_without_the_hash_of_a_valid_admin_key(self, owner, database):
        reader, bound, free = make(owner, "read"), make(owner, "admin"), make(owner, "admin", tenant=None)

        def caller(headers, digest=None):
            token = headers["Authorization"][7:]
            return keys.Caller(token[4:12], digest or keys.digest(token), None, frozenset())

        def every(by):
            asked = Asked(scopes=["read"], tenant_id="acme")
            return [
                registry.list_keys(by),
                registry.list_tenants(by),
                registry.put_tenant("novel", by=by),
                registry.create_key(asked, keys.mint(), by),
                registry.revoke_key(prefix(reader), by),
                registry.delete_tenant("acme", by),
            ]

        for by in (None, caller(reader), caller(free, bytes(32))):
            for statement in every(by):
                with pytest.raises(NotAuthenticated):
                    await registry.run(database, statement)
        for index, statement in enumerate(every(caller(bound))):
            if index in (2, 5):
                with pytest.raises(NotAllowed):
                    await registry.run(database, statement)
            else:
                await registry.run(database, statement)
        of_all = registry.create_key(Asked(scopes=["admin"]), keys.mint(), caller(bound))
        with pytest.raises(NotAllowed):
            await registry.run(database, of_all)
        for statement in every(caller(free)):
            await registry.run(database, statement)
        assert owner.execute("select count(*) from api_keys where revoked_at is null").fetchone() == (1,)
        as_owner(owner, registry.revoke_key(prefix(free)))
        with pytest.raises(NotAuthenticated):
            await registry.run(database, registry.list_keys(caller(free)))

    def test_functions_have_a_fixed_path_and_are_not_public(self, owner):
        names = "'keys_in_use', 'find_key', 'use_key', 'hold_streams', 'take_tokens', 'admin_tenant', 'list_keys', 'create_key', 'revoke_key', 'list_tenants', 'put_tenant', 'delete_tenant'"
        rows = owner.execute(
            "select proname, proconfig, proacl::text from pg_proc where pronamespace = 'public'::regnamespace "
            f"and (prosecdef or proname in ({names}))"
        ).fetchall()
        assert len(rows) >= 12
        for name, config, rights in rows:
            assert config == ["search_path=pg_catalog, public, pg_temp"], name
            assert "{=" not in rights, name
            assert ",=" not in rights, name

"""Readiness, problems, OpenAPI and the request id."""

import re

import httpx
import psycopg
import pytest
from msgspec.structs import replace

from app import roles, search, telemetry
from app.asgi import create_app
from app.errors import ModelMismatch, SetupError, Unsafe
from app.settings import Settings
from tests.api.test_documents_api import assert_problem
from tests.conftest import passwords


async def test_ready_names_revision_and_model_and_asks_no_model(client, openai):
    response = await client.get("/health/ready")
    assert response.status_code == 200
    assert response.json() == {
        "revision": "0002",
        "embedding_model": "text-embedding-3-small",
        "embedding_dimensions": 64,
        "status": "ready",
    }
    assert openai.calls == []
    assert (await client.get("/health/live")).json() == {"status": "live"}


async def test_on_an_old_schema_the_service_lives_but_is_not_ready_until_it_is_migrated(settings, owner):
    owner.execute("update pgrecall_revision set version_num = '0000'")
    app = create_app(settings)
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client,
    ):
        assert (await client.get("/health/live")).status_code == 200
        assert "pgrecall migrate" in assert_problem(await client.get("/health/ready"), 503)["detail"]
        assert_problem(await client.post("/search", json={"tenant_id": "acme", "query": "x"}), 503)
        owner.execute("update pgrecall_revision set version_num = '0002'")
        assert (await client.get("/health/ready")).status_code == 200
        assert (await client.post("/search", json={"tenant_id": "acme", "query": "x"})).status_code == 200


async def test_a_newer_schema_is_fine(settings, owner):
    owner.execute("update pgrecall_revision set version_num = '9999'")
    app = create_app(settings)
    async with app.lifespan():
        assert (await app.state.service.check()).revision == "9999"


async def test_without_a_database_the_service_starts_and_says_so(settings):
    app = create_app(replace(settings, database_url="postgresql://nobody@127.0.0.1:9/none"))
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client,
    ):
        assert (await client.get("/health/live")).status_code == 200
        response = await client.get("/health/ready")
        assert_problem(response, 503)
        assert "127.0.0.1" not in response.text


@pytest.mark.parametrize("change", [{"embedding_dimensions": 32}, {"embedding_model": "text-embedding-3-large"}])
async def test_another_model_than_recorded_is_refused_at_start(settings, change):
    with pytest.RaisesGroup(
        pytest.RaisesExc(
            ModelMismatch, match=r"holds vectors of text-embedding-3-small with 64 dimensions.*pgrecall migrate"
        )
    ):
        async with create_app(replace(settings, **change)).lifespan():
            pass


@pytest.mark.parametrize(
    ("sabotage", "mend", "message"),
    [
        ("alter table documents disable row level security", None, "ENABLE ROW LEVEL SECURITY"),
        ("drop policy app_sources on sources", None, "policy is missing"),
    ],
)
async def test_start_up_refuses_when_tenants_are_not_kept_apart(settings, owner, sabotage, mend, message):
    owner.execute(sabotage)
    with pytest.RaisesGroup(pytest.RaisesExc(Unsafe, match=message)):
        async with create_app(settings).lifespan():
            pass


async def test_start_up_refuses_a_login_that_cannot_drop_its_rights(settings, cluster, database_name):
    outsider = f"outsider_{database_name}"
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(f"create role {outsider} login")
        passwords(cluster, outsider)
        try:
            refused = replace(settings, database_url=cluster.url(database_name, outsider))
            with pytest.RaisesGroup(pytest.RaisesExc(Unsafe, match="pgrecall roles --apply")):
                async with create_app(refused).lifespan():
                    pass
        finally:
            admin.execute(f"drop role {outsider}")


def test_without_database_url_the_factory_says_what_to_do():
    with pytest.raises(SetupError, match="pgrecall serve"):
        create_app(Settings())


async def test_unknown_routes_and_methods_are_problems(client):
    assert_problem(await client.get("/nowhere"), 404)
    assert_problem(await client.patch("/search"), 405)


async def test_an_unexpected_error_is_a_problem_without_its_words(client, monkeypatch):
    async def broken(*_, **__):
        raise RuntimeError("secret inner detail")

    monkeypatch.setattr(search, "search", broken)
    response = await client.post("/search", json={"tenant_id": "acme", "query": "x"})
    assert_problem(response, 500)
    assert "secret" not in response.text


async def test_no_text_of_a_document_reaches_the_log(client, owner, app, capsys):
    telemetry.set_up(app.state.service.settings)
    owner.execute("alter table sources add constraint staged check (title is not null)")
    body = {"tenant_id": "acme", "content": "MARKED document text"}
    assert_problem(await client.put("/documents/a", json=body), 500)
    owner.execute("revoke insert on sources from pgrecall_app")
    assert_problem(await client.put("/documents/a", json=body), 500)
    logged = capsys.readouterr().err
    assert "staged" in logged
    assert "MARKED" not in logged


async def test_a_database_fault_is_a_problem_without_the_drivers_words(client, owner):
    owner.execute("alter table sources rename column content to hidden_column")
    response = await client.put("/documents/a", json={"tenant_id": "acme", "content": "text"})
    assert_problem(response, 500)
    assert "hidden_column" not in response.text


@pytest.mark.parametrize(("given", "kept"), [("abc-123", True), ("x" * 129, False), ("bad id", False)])
async def test_the_request_id_goes_in_and_out(client, given, kept):
    response = await client.get("/health/live", headers={"X-Request-ID": given})
    assert (response.headers["x-request-id"] == given) is kept
    assert response.headers["x-request-id"]
    assert (await client.get("/nowhere")).headers["x-request-id"]


class TestOpenAPI:
    """The document and its page."""

    async def test_every_route_has_a_summary_examples_and_problems(self, client):
        document = (await client.get("/docs/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        operations = {
            (path, method): operation for path, item in document["paths"].items() for method, operation in item.items()
        }
        assert set(operations) == {
            ("/documents", "get"),
            ("/documents", "post"),
            ("/documents", "delete"),
            ("/documents/{document_id}", "get"),
            ("/documents/{document_id}", "put"),
            ("/documents/{document_id}", "delete"),
            ("/search", "post"),
            ("/rag", "post"),
            ("/health/live", "get"),
            ("/health/ready", "get"),
        }
        for (path, method), operation in operations.items():
            assert operation["summary"], path
            assert operation.get("description"), (path, method)
            if "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["schema"]["examples"], (path, method)
            good = next(r for status, r in operation["responses"].items() if status.startswith("2"))
            for content in good.get("content", {}).values():
                assert content.get("examples"), (path, method)
            if not path.startswith("/health/live"):
                errors = [r for status, r in operation["responses"].items() if status.startswith(("4", "5"))]
                assert errors, (path, method)
                assert all("application/problem+json" in r["content"] for r in errors)

    async def test_the_page_loads_nothing_from_elsewhere(self, client):
        page = await client.get("/docs")
        assert page.status_code == 200
        loaded = re.findall(r"(?:src|href)=[\"']([^\"']+)", page.text)
        assert loaded
        for address in loaded:
            assert address.startswith("/docs/"), address
            assert (await client.get(address)).status_code == 200


def test_a_login_that_forgets_to_drop_its_rights_has_none(cluster, database_name, owner):
    login = f"forgetful_{database_name}"
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'a', 'x')")
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(f"create role {login} login")
        try:
            passwords(cluster, login)
            for statement in roles.statements(login):
                admin.execute(statement.encode())
            with psycopg.connect(cluster.url(database_name, login), autocommit=True) as forgetful:
                for statement in (
                    "select * from sources",
                    "delete from sources",
                    "update sources set content = 'y'",
                    "insert into sources (tenant_id, id, content) values ('evil', 'b', 'x')",
                    "select * from tenant_sources",
                ):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        forgetful.execute(statement)
                forgetful.execute("set role pgrecall_worker")
                assert forgetful.execute("select count(*) from sources").fetchone() == (1,)
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    forgetful.execute("delete from sources")
        finally:
            admin.execute(f"drop role {login}")


async def test_start_up_refuses_a_login_that_inherits_the_workers_rights(settings, cluster, database_name):
    login = f"heir_{database_name}"
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(f"create role {login} login")
        try:
            passwords(cluster, login)
            admin.execute(f"grant pgrecall_app, pgrecall_worker to {login}")
            refused = replace(settings, database_url=cluster.url(database_name, login))
            with pytest.RaisesGroup(pytest.RaisesExc(Unsafe, match="has the rights of pgrecall_worker")):
                async with create_app(refused).lifespan():
                    pass
            for statement in roles.statements(login):
                admin.execute(statement.encode())
            async with create_app(refused).lifespan():
                pass
        finally:
            admin.execute(f"drop role {login}")


def test_the_apps_role_sees_nothing_without_a_tenant(settings, owner):
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'a', 'x')")
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("select set_config('role', %s, true)", (roles.APP,))
        for table in (
            *("sources", "documents", "embedding_cache", "document_terms", "term_statistics", "collection_statistics"),
            *("tenant_sources", "tenant_documents", "tenant_document_terms", "tenant_term_statistics"),
        ):
            assert connection.execute(f"select count(*) from {table}").fetchone() == (0,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("insert into sources (tenant_id, id, content) values ('acme', 'b', 'x')")


def test_the_apps_role_cannot_write_another_tenants_row(settings, owner):
    owner.execute("insert into sources (tenant_id, id, content) values ('umbra', 'a', 'x')")
    with psycopg.connect(settings.database_url) as connection:
        connection.execute(
            "select set_config('role', %s, true), set_config('pgrecall.tenant_id', 'acme', true)", (roles.APP,)
        )
        assert connection.execute("update sources set content = 'stolen'").rowcount == 0
        assert connection.execute("delete from sources").rowcount == 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("insert into sources (tenant_id, id, content) values ('umbra', 'b', 'x')")


def test_the_login_itself_has_no_rights_of_its_own(settings, owner):
    with psycopg.connect(settings.database_url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("select * from sources")


def test_an_analyst_reads_the_tenants_that_were_granted(cluster, database_name, owner):
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'a', 'x'), ('umbra', 'a', 'x')")
    owner.execute("insert into analyst_tenants values ('analyst', 'acme')")
    with psycopg.connect(cluster.url(database_name, "analyst"), autocommit=True) as analyst:
        assert analyst.execute("select tenant_id from sources").fetchall() == [("acme",)]
        analyst.execute("select set_config('pgrecall.tenant_id', 'umbra', false)")
        assert analyst.execute("select tenant_id from sources").fetchall() == [("acme",)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            analyst.execute("delete from sources")
        owner.execute("insert into analyst_tenants values ('analyst', '*')")
        assert analyst.execute("select count(*) from sources").fetchone() == (2,)

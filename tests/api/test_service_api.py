"""Readiness, problems, OpenAPI and the request id."""

import gzip
import json
import re

import httpx
import psycopg
import pytest
from msgspec.structs import replace

from app import roles, schema, search, telemetry
from app.api import problems
from app.asgi import create_app
from app.errors import ModelMismatch, SetupError, Unsafe
from app.settings import Settings
from tests.api.test_documents_api import assert_problem
from tests.conftest import passwords


async def test_ready_names_revision_and_model_and_asks_no_model(client, openai, settings):
    response = await client.get("/health/ready")
    assert response.status_code == 200
    assert response.json() == {
        "revision": schema.head(),
        "embedding_model": "text-embedding-3-small",
        "embedding_dimensions": 64,
        "replica": None,
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
        owner.execute("update pgrecall_revision set version_num = %s", (schema.REQUIRED,))
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
        ("drop policy app_sources on sources", None, "policy app_sources on sources is missing"),
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
    for path, allowed in (
        ("/search", "OPTIONS, POST"),
        ("/documents", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("/documents/a%2Fb", "DELETE, GET, HEAD, OPTIONS, PUT"),
        ("/health/live", "GET, HEAD, OPTIONS"),
    ):
        refused = await client.patch(path)
        assert_problem(refused, 405)
        offered = await client.options(path, params={"any": "thing"})
        assert (offered.status_code, offered.content) == (204, b"")
        assert offered.headers["allow"] == refused.headers["allow"] == allowed


async def test_head_answers_as_get_without_the_body(client):
    await client.put("/documents/a", json={"tenant_id": "acme", "content": "text"})
    for path in (
        "/health/ready",
        "/documents?tenant_id=acme",
        "/documents/a?tenant_id=acme",
        "/nowhere",
        "/search",
        "/docs",
    ):
        read, head = await client.get(path), await client.head(path)
        for answer in (read, head):
            del answer.headers["x-request-id"]
        assert (head.status_code, head.headers, head.content) == (read.status_code, read.headers, b"")


async def test_a_missing_table_says_what_to_run(client, owner):
    owner.execute("alter table sources rename to sources_later")
    owner.execute("drop view tenant_sources cascade")
    problem = assert_problem(await client.get("/documents", params={"tenant_id": "acme"}), 503)
    assert "pgrecall migrate" in problem["detail"]


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


async def test_what_a_path_does_not_take_is_answered_with_what_it_does(client):
    assert "there is no such path" in (await client.get("/nowhere")).json()["detail"]
    refused = await client.put("/documents/", json={"tenant_id": "acme", "content": "Its id was empty."})
    assert_problem(refused, 405)
    assert "allowed: DELETE, GET, OPTIONS, POST" in refused.json()["detail"]


async def test_a_compressed_body_is_refused_by_its_name(client):
    for method, path in (("POST", "/search"), ("PUT", "/documents/a"), ("POST", "/documents/stream?tenant_id=acme")):
        kind = "application/x-ndjson" if "stream" in path else "application/json"
        headers = {"Content-Encoding": "gzip", "Content-Type": kind}
        refused = await client.request(method, path, content=gzip.compress(b'{"tenant_id": "acme"}'), headers=headers)
        assert_problem(refused, 415)
        assert refused.headers["accept-encoding"] == "identity"
        assert "Content-Encoding: 'gzip' is not taken" in refused.json()["detail"]


KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def violations(document, schema, value, path="$"):
    """Where a value is not as its JSON Schema says, for the keywords these schemas use; a field not shown is one, too."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for word in ("oneOf", "anyOf"):
        if word in schema and all(list(violations(document, each, value, path)) for each in schema[word]):
            yield f"{path} is none of {word}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, KINDS[kind]) for kind in kinds):
        yield f"{path} is no {kinds}"
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{path} is {value!r}"
    inner = []
    if isinstance(value, dict) and "properties" in schema:
        yield from (f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value)
        yield from (f"{path}.{name} is not documented" for name in value if name not in schema["properties"])
        inner = [(schema["properties"].get(name, {}), each, f".{name}") for name, each in value.items()]
    if isinstance(value, list) and "items" in schema:
        inner = [(schema["items"], each, f"[{index}]") for index, each in enumerate(value)]
    for schema_of, each, step in inner:
        yield from violations(document, schema_of, each, path + step)


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
            ("/documents/stream", "post"),
            ("/queue/retry", "post"),
            ("/status", "get"),
            ("/documents/{document_id}", "get"),
            ("/documents/{document_id}", "put"),
            ("/documents/{document_id}", "delete"),
            ("/tenants/{tenant_id}", "delete"),
            ("/admin/tenants", "get"),
            ("/admin/tenants", "post"),
            ("/admin/tenants/{tenant_id}", "delete"),
            ("/admin/keys", "get"),
            ("/admin/keys", "post"),
            ("/admin/keys/{prefix}", "delete"),
            ("/search", "post"),
            ("/search/batch", "post"),
            ("/rag", "post"),
            ("/health/live", "get"),
            ("/health/ready", "get"),
        }
        for (path, method), operation in operations.items():
            assert operation["summary"], path
            assert operation.get("description"), (path, method)
            if "requestBody" in operation:
                (body,) = operation["requestBody"]["content"].values()
                assert body.get("examples") or body["schema"].get("examples"), (path, method)
            good = next(r for status, r in operation["responses"].items() if status.startswith("2"))
            for content in good.get("content", {}).values():
                assert content.get("examples"), (path, method)
            if not path.startswith("/health/live"):
                errors = [r for status, r in operation["responses"].items() if status.startswith(("4", "5"))]
                assert errors, (path, method)
                assert all("application/problem+json" in r["content"] for r in errors)
            if not path.startswith("/health"):
                assert set(operation["responses"]) >= {"400", "413", "421", "500", "503", "504", "507"}, (path, method)
                assert "Retry-After" in operation["responses"]["503"]["headers"]
                # Nothing is embedded before these two answer.
            silent = path in {"/documents/stream", "/queue/retry"} or path.startswith("/admin")
            upstream = set() if silent else {"502"}
            assert ({"408", "415", *upstream} <= set(operation["responses"])) is ("requestBody" in operation)

    async def test_ranges_etags_and_the_stream_are_documented(self, client):
        document = (await client.get("/docs/openapi.json")).json()
        schemas = document["components"]["schemas"]
        for request in ("SearchRequest", "RagRequest"):
            shown = schemas[request]["properties"]
            assert (shown["top_k"]["minimum"], shown["top_k"]["maximum"]) == (1, 100)
            assert (shown["threshold"]["minimum"], shown["threshold"]["maximum"]) == (-1, 1)
        limit = next(p for p in document["paths"]["/documents"]["get"]["parameters"] if p["name"] == "limit")
        assert {"minimum": 1, "maximum": 1_000}.items() <= limit["schema"].items()
        assert {"field", "faults"} <= set(schemas["Problem"]["properties"])
        one = document["paths"]["/documents/{document_id}"]
        for method, statuses, conditions in (
            ("get", {"200", "304"}, {"If-None-Match"}),
            ("put", {"200", "201", "202"}, {"If-Match", "If-None-Match"}),
            ("delete", set(), {"If-Match"}),
        ):
            responses = one[method]["responses"]
            assert {status for status, r in responses.items() if "ETag" in r.get("headers", {})} == statuses
            assert {p["name"] for p in one[method]["parameters"] if p["in"] == "header"} == conditions
            assert ("404" in responses, "412" in responses) == (method != "put", method != "get")
        stream = document["paths"]["/rag"]["post"]["responses"]["200"]["content"]["text/event-stream"]
        for event in ("sources", "usage", "error", "[DONE]"):
            assert event in stream["schema"]["description"]
        assert stream["examples"]["answer"]["value"].endswith("data: [DONE]\n\n")

    async def test_every_object_says_what_it_is_and_which_fields_it_has(self, client):
        document = (await client.get("/docs/openapi.json")).json()
        schemas = document["components"]["schemas"]
        assert [name for name, schema in schemas.items() if not schema.get("description")] == []
        assert re.findall(r'"oneOf": \[\{[^{}]*\}\]', json.dumps(document)) == []
        # None is made up, as Litestar would: those there are are whole requests and answers of ours.
        assert "examples" not in json.dumps([schema["properties"] for schema in schemas.values()])
        given = [
            next(iter(operation["requestBody"]["content"].values()))["schema"]
            for item in document["paths"].values()
            for operation in item.values()
            if "requestBody" in operation
        ]
        requests = set(re.findall(r"schemas/(\w+)", json.dumps(given)))
        while inner := set(re.findall(r"schemas/(\w+)", json.dumps([schemas[name] for name in requests]))) - requests:
            requests |= inner
        assert requests >= {"SearchRequest", "PutDocuments", "Item", "Reranking", "CreateKey"}
        for name in requests:
            assert schemas[name]["additionalProperties"] is False, name
            silent = [field for field, schema in schemas[name]["properties"].items() if not schema.get("description")]
            assert silent == [], name
        for name in ("Hit", "Scan", "Stored", "KeyShown", "TenantShown", "Ready"):
            assert set(schemas[name]["required"]) == set(schemas[name]["properties"]), name
        assert set(schemas["SearchResponse"]["properties"]) - set(schemas["SearchResponse"]["required"]) == {"explain"}

    async def test_every_example_is_as_its_schema_says(self, client):
        document = (await client.get("/docs/openapi.json")).json()
        seen = 0
        for path, item in document["paths"].items():
            for method, operation in item.items():
                for part in (operation.get("requestBody", {}), *operation["responses"].values()):
                    for kind, content in part.get("content", {}).items():
                        schema = content["schema"]
                        (schema,) = schema.get("allOf", [schema])
                        examples = [each["value"] for each in content.get("examples", {}).values()]
                        for example in examples + content["schema"].get("examples", []):
                            seen += 1
                            assert list(violations(document, schema, example)) == [], (method, path, kind)
        assert seen > 100

    def test_every_problem_stands_in_the_page_on_the_api(self, root):
        rows = re.findall(r"^\| ([\d, ]+) \| (`[^|]+`) \|", (root / "docs/api.md").read_text(), re.MULTILINE)
        statuses: dict[str, set[int]] = {}
        for given, names in rows:
            for name in re.findall(r"`([a-z-]+)`", names):
                statuses.setdefault(f"urn:pgrecall:problem:{name}", set()).update(map(int, given.split(", ")))
        assert statuses.keys() == problems.TYPES.keys()
        assert [urn for urn, status in problems.TYPES.items() if status not in statuses[urn]] == []

    async def test_answers_are_as_documented(self, client, openai):
        document = (await client.get("/docs/openapi.json")).json()
        put = {"tenant_id": "acme", "content": "Garden birds sleep.", "metadata": {"a": [1, {"b": None}]}}
        asked = {"tenant_id": "acme"}
        one = "/documents/{document_id}"
        openai.answer = "Yes [Source 1]."
        calls = [
            ("put", one, {"json": put}, 201),
            ("put", one, {"json": put}, 200),
            ("put", one, {"json": put | {"tenant_id": ""}}, 400),
            ("put", one, {"json": put, "headers": {"If-Match": '"1"'}}, 412),
            ("put", one, {"content": b"{}"}, 415),
            ("put", one, {"json": put | {"doc_type": "x" * 129}}, 413),
            ("get", one, {"params": asked}, 200),
            ("get", one, {"params": asked, "headers": {"If-None-Match": "*"}}, 304),
            ("get", one, {"params": {"tenant_id": "nobody"}}, 404),
            ("get", one, {}, 400),
            ("get", "/documents", {"params": asked}, 200),
            ("post", "/documents", {"json": asked | {"documents": [{"id": "b", "content": "x"}]}}, 200),
            ("post", "/documents", {"json": asked | {"documents": [{"id": 5}]}}, 400),
            ("post", "/search", {"json": asked | {"query": "birds"}}, 200),
            ("post", "/search", {"json": asked | {"query": "birds", "top_k": "1"}}, 400),
            ("post", "/rag", {"json": asked | {"question": "birds?"}}, 200),
            ("post", "/rag", {"json": asked | {"question": "birds?", "stream": True}}, 200),
            ("delete", one, {"params": asked}, 200),
            ("delete", "/tenants/{tenant_id}", {}, 200),
            ("delete", "/documents", {"params": asked}, 400),
            ("delete", "/documents", {"params": asked | {"doc_type": "none"}}, 200),
            ("get", "/health/live", {}, 200),
            ("get", "/health/ready", {}, 200),
        ]
        for method, path, given, status in calls:
            answer = await client.request(
                method.upper(), path.replace("{document_id}", "a").replace("{tenant_id}", "gone"), **given
            )
            assert answer.status_code == status, (method, path, answer.text)
            documented = document["paths"][path][method]["responses"][str(status)]
            for name in documented.get("headers", {}):
                # Those are of keys with a limit, and here is none.
                assert name in answer.headers or name.startswith("RateLimit"), (method, path, name)
            if "content" in documented:
                kind = answer.headers["content-type"].partition(";")[0]
                schema = documented["content"][kind]["schema"]
                said = answer.text if kind == "text/event-stream" else answer.json()
                assert list(violations(document, schema, said)) == [], (method, path, status)
            else:
                assert answer.content == b""

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
            "embedding_claims",
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

"""The document routes: what they take, what they answer, what they refuse."""

import json
import re
from urllib.parse import quote

import pytest

TEXT = "To reset your password, open Settings and choose Security. Then confirm by mail."


async def put(client, document_id="faq/1", **changes):
    body = {"tenant_id": "acme", "content": TEXT} | changes
    return await client.put(f"/documents/{quote(document_id, safe='')}", json=body)


def assert_problem(response, status, *, field=None):
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    body = response.json()
    assert body["status"] == status
    assert body["type"].startswith("urn:pgrecall:problem:")
    assert body["title"]
    assert body["detail"]
    assert "psycopg" not in response.text
    assert "sqlalchemy" not in response.text.lower()
    if field is not None:
        assert body["field"] == field
    return body


async def test_put_says_created_then_unchanged_then_updated(client):
    first = await put(client, metadata={"lang": "en"})
    assert first.status_code == 201
    assert re.fullmatch(r'"1-[0-9a-f]+"', first.headers["etag"])
    assert first.json() == {
        "id": "faq/1",
        "status": "created",
        "version": 1,
        "chunks": {"embedded": 1, "reused": 0, "removed": 0},
        "state": "ready",
    }
    again = await put(client, metadata={"lang": "en"})
    assert (again.status_code, again.json()["status"]) == (200, "unchanged")
    labelled = await put(client, metadata={"lang": "de"})
    assert (labelled.status_code, labelled.json()["status"], labelled.json()["chunks"]["embedded"]) == (
        200,
        "updated",
        0,
    )


@pytest.mark.parametrize(
    "document_id",
    [
        "plain",
        "a/b/c",
        "a//b",
        "/leading",
        "trailing/",
        "../up",
        "./x",
        "...",
        "with space",
        "ünïcödé/文档",
        "50%",
        "a?b#c",
        "a+b",
        "'; drop",
    ],
)
async def test_ids_of_any_kind_work_on_every_route(client, document_id):
    assert (await put(client, document_id)).status_code == 201
    path = f"/documents/{quote(document_id, safe='')}"
    read = await client.get(path, params={"tenant_id": "acme"})
    assert (read.status_code, read.json()["id"], read.json()["content"]) == (200, document_id, TEXT)
    listed = (await client.get("/documents", params={"tenant_id": "acme"})).json()
    assert [d["id"] for d in listed["documents"]] == [document_id]
    found = await client.post("/search", json={"tenant_id": "acme", "query": "password"})
    assert [hit["id"] for hit in found.json()["results"]] == [document_id]
    assert (await client.delete(path, params={"tenant_id": "acme"})).status_code == 200
    assert_problem(await client.get(path, params={"tenant_id": "acme"}), 404)


async def test_slashes_may_stand_as_they_are(client):
    await put(client, "guide/intro.md")
    read = await client.get("/documents/guide/intro.md", params={"tenant_id": "acme"})
    assert read.json()["id"] == "guide/intro.md"


async def test_an_id_that_is_not_utf8_is_refused(client):
    assert_problem(await client.get("/documents/%ff", params={"tenant_id": "acme"}), 400, field="id")


@pytest.mark.parametrize("path", ["/documents/a%00b", "/documents/" + "x" * 513])
async def test_an_id_that_cannot_exist_is_refused_on_every_route(client, path):
    for request in (client.get, client.delete):
        assert_problem(await request(path, params={"tenant_id": "acme"}), 413 if "x" in path else 400, field="id")


@pytest.mark.parametrize("moment", ["0002-01-01T00:00:00+00:00", "9998-12-31T23:59:59Z"])
async def test_the_first_and_the_last_moment_allowed_can_be_read_back(client, moment):
    assert (await put(client, created_at=moment)).status_code == 201
    read = await client.get("/documents/faq%2F1", params={"tenant_id": "acme"})
    assert read.json()["created_at"].replace("+00:00", "Z") == moment.replace("+00:00", "Z")


async def test_get_returns_the_whole_text_and_the_places_of_its_chunks(client):
    text = " ".join(f"Sentence {n} says something about the number {n} and its friends." for n in range(120))
    await put(client, content=text, title="Numbers", doc_type="note", created_at="2024-05-01T10:00:00+02:00")
    body = (await client.get("/documents/faq/1", params={"tenant_id": "acme"})).json()
    assert body["content"] == text
    assert body["title"] == "Numbers"
    assert body["created_at"] in ("2024-05-01T08:00:00Z", "2024-05-01T08:00:00+00:00")
    assert body["state"] == "ready"
    assert body["chunk_count"] == len(body["chunks"]) > 1
    assert [c["chunk_index"] for c in body["chunks"]] == list(range(len(body["chunks"])))
    assert body["chunks"][0]["start_offset"] == 0


async def test_a_batch_is_all_or_nothing_and_names_the_item(client):
    good = {"id": "good", "content": "fine"}
    response = await client.post(
        "/documents", json={"tenant_id": "acme", "documents": [good, {"id": "bad", "content": " "}]}
    )
    assert_problem(response, 400, field="documents[1].content")
    alone = await client.post("/documents", json={"tenant_id": "acme", "documents": [{"id": "bad", "content": " "}]})
    assert_problem(alone, 400, field="documents[0].content")
    for bad, field in (({"id": "bad"}, "content"), (good | {"lang": "en"}, "lang"), (good | {"id": 1}, "id")):
        response = await client.post("/documents", json={"tenant_id": "acme", "documents": [good, bad]})
        assert_problem(response, 400, field=f"documents[1].{field}")
    assert (await client.get("/documents", params={"tenant_id": "acme"})).json() == {"documents": [], "next": None}
    response = await client.post("/documents", json={"tenant_id": "acme", "documents": [good]})
    assert response.status_code == 200
    assert response.json()["documents"][0]["status"] == "created"


async def test_a_batch_has_at_most_1000_items(client):
    items = [{"id": f"d{n}", "content": "x"} for n in range(1_001)]
    body = assert_problem(
        await client.post("/documents", json={"tenant_id": "acme", "documents": items}), 400, field="documents"
    )
    assert "1 to 1,000" in body["detail"]
    assert_problem(await client.post("/documents", json={"tenant_id": "acme", "documents": []}), 400, field="documents")


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"content": ""}, 400, "content"),
        ({"content": "a\0b"}, 400, "content"),
        ({"content": "\u200b \ufeff\u2060"}, 400, "content"),
        ({"content": 5}, 400, "content"),
        ({"content": None}, 400, "content"),
        ({"metadata": []}, 400, "metadata"),
        ({"metadata": {"k": "\0"}}, 400, "metadata.k"),
        ({"metadata": {"k": "x" * 64_000}}, 413, "metadata"),
        ({"doc_type": "x" * 129}, 413, "doc_type"),
        ({"created_at": "2020-01-01T00:00:00"}, 400, "created_at"),
        ({"created_at": "yesterday"}, 400, "created_at"),
        ({"created_at": 253402300800}, 400, "created_at"),
        ({"embedding": [1e18] * 64}, 400, "embedding"),
        ({"embedding": [1e-30] * 64}, 400, "embedding"),
        ({"created_at": "0001-01-01T00:00:00+14:00"}, 400, "created_at"),
        ({"created_at": "9999-12-31T23:59:59-12:00"}, 400, "created_at"),
        ({"embedding": [1.0]}, 400, "embedding"),
        ({"embedding": ["x"]}, 400, "embedding[0]"),
        ({"embedding": [0.0] * 64}, 400, "embedding"),
        ({"embedding": [1e300] * 64}, 400, "embedding[0]"),
        ({"tenant_id": "no spaces"}, 400, "tenant_id"),
        ({"tenant_id": ""}, 400, "tenant_id"),
        ({"tenant_id": "x" * 129}, 400, "tenant_id"),
        ({"contant": "misspelt"}, 400, "contant"),
    ],
)
async def test_bad_input_is_a_problem_that_names_the_field_and_nothing_is_written(client, owner, change, status, field):
    assert_problem(await put(client, **change), status, field=field)
    assert owner.execute("select count(*) from sources").fetchone() == (0,)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"tenant_id": "acme"}',
        b'{"tenant_id": "acme", "content": NaN}',
        b'{"tenant_id": "acme", "content": "x", "embedding": [NaN]}',
        b'{"tenant_id": "acme", "content": "\xff"}',
        b'{"tenant_id": "acme", "content": "x", "metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"tenant_id": "acme", "content": "\\ud800"}',
        b'{"tenant_id": "acme", "content": "x", "metadata": {"k": "\\udc00"}}',
    ],
)
async def test_bodies_that_are_no_document_are_refused(client, owner, body):
    response = await client.put("/documents/a", content=body, headers={"content-type": "application/json"})
    assert_problem(response, 400)
    assert owner.execute("select count(*) from sources").fetchone() == (0,)


async def test_a_text_over_10_mb_and_a_body_over_the_limit_are_413(client):
    assert (
        "10,000,000" in assert_problem(await put(client, content="word " * 2_000_001), 413, field="content")["detail"]
    )
    assert_problem(await put(client, content="x" * 16_000_001), 413)


async def test_too_many_tokens_for_one_request_are_413(client, app):
    body = assert_problem(await put(client, content="alpha beta gamma. " * 90_000), 413)
    assert "PGRECALL_REQUEST_TOKENS" in body["detail"]


PATH = "/documents/faq%2F1"
TENANT = {"tenant_id": "acme"}


async def test_if_match_guards_put_and_delete(client):
    first = (await put(client)).headers["etag"]

    async def write(content, if_match, path=PATH):
        return await client.put(path, json=TENANT | {"content": content}, headers={"If-Match": if_match})

    second = (await write("two", first)).headers["etag"]
    assert second.startswith('"2-')
    for stale in (first, f"W/{second}", '"2"', "W/" + first, f'{first}, "other"'):
        assert_problem(await write("three", stale), 412)
        assert_problem(await client.delete(PATH, params=TENANT, headers={"If-Match": stale}), 412)
    for nowhere in (first, "*"):
        assert_problem(await write("new", nowhere, "/documents/new"), 412)
    for wrong in ("banana", "2", "", second + second, "*, *", f"w/{second}", '"open'):
        assert_problem(await write("three", wrong), 400, field="If-Match")
    assert (await write("two", second)).json()["status"] == "unchanged"
    assert (await write("three", f'"x", , {second}')).json()["version"] == 3
    assert (await write("four", "*")).json()["version"] == 4
    fourth = (await client.get(PATH, params=TENANT)).headers["etag"]
    assert (await client.delete(PATH, params=TENANT, headers={"If-Match": fourth})).status_code == 200


async def test_an_etag_does_not_outlive_its_document(client):
    first = (await put(client)).headers["etag"]
    await client.delete(PATH, params=TENANT)
    assert (await put(client)).json()["version"] == 1
    assert_problem(await client.delete(PATH, params=TENANT, headers={"If-Match": first}), 412)


async def test_if_none_match_saves_a_read_and_guards_a_creation(client):
    etag = (await put(client)).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other",{etag}', "*"):
        read = await client.get(PATH, params=TENANT, headers={"If-None-Match": known})
        assert (read.status_code, read.content, read.headers["etag"]) == (304, b"", etag)
    read = await client.get(PATH, params=TENANT, headers={"If-None-Match": '"1"'})
    assert (read.status_code, read.headers["etag"]) == (200, etag)
    assert_problem(await client.get(PATH, params=TENANT, headers={"If-None-Match": "1"}), 400, field="If-None-Match")
    create = {"json": TENANT | {"content": "x"}, "headers": {"If-None-Match": "*"}}
    assert_problem(await client.put(PATH, **create), 412)
    assert (await client.put("/documents/new", **create)).status_code == 201


async def test_pages_are_keyset_and_filters_apply(client):
    items = [
        {"id": f"d{n:02}", "content": f"text {n}", "metadata": {"n": n}, "doc_type": "even" if n % 2 == 0 else "odd"}
        for n in range(7)
    ]
    await client.post("/documents", json={"tenant_id": "acme", "documents": items})
    first = (await client.get("/documents", params={"tenant_id": "acme", "limit": 3})).json()
    assert [d["id"] for d in first["documents"]] == ["d00", "d01", "d02"]
    assert "content" not in first["documents"][0]
    second = (await client.get("/documents", params={"tenant_id": "acme", "limit": 3, "after": first["next"]})).json()
    third = (await client.get("/documents", params={"tenant_id": "acme", "limit": 3, "after": second["next"]})).json()
    assert ([d["id"] for d in third["documents"]], third["next"]) == (["d06"], None)
    filters = {"tenant_id": "acme", "doc_type": "even", "metadata": json.dumps({"n": {"$gt": 2}})}
    assert [d["id"] for d in (await client.get("/documents", params=filters)).json()["documents"]] == ["d04", "d06"]
    both = {"tenant_id": "acme", "doc_type": ["even", "odd"]}
    assert len((await client.get("/documents", params=both)).json()["documents"]) == 7


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1_001}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"metadata": "{"}, "metadata"),
        ({"metadata": '{"$foo": 1}'}, None),
        ({"created_after": "soon"}, "created_after"),
        ({"created_after": "2020-01-01T00:00:00"}, "created_after"),
        ({"created_after": "253402300800"}, None),
        ({"service": "x"}, "service"),
        ({"after": "\0"}, "after"),
        ({"created_befor": "2020-01-01T00:00:00Z"}, "created_befor"),
        ({"tenant_id": ["acme", "umbra"]}, "tenant_id"),
    ],
)
async def test_bad_parameters_are_named(client, params, field):
    assert_problem(await client.get("/documents", params={"tenant_id": "acme"} | params), 400, field=field)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"state": "done"}, "state: is 'done'; allowed: 'pending', 'ready', 'failed'"),
        ({"limit": "ten"}, "limit: is 'ten'; allowed: a whole number from 1 to 1,000"),
        ({"limit": ""}, "limit: is ''; allowed: a whole number from 1 to 1,000"),
        ({"state": ""}, "state: is ''; allowed: 'pending', 'ready', 'failed'"),
        (
            {"created_before": "2026-01-01T00:00:00 02:00"},
            "created_before: has a blank before its time zone; allowed: + written as %2B",
        ),
    ],
)
async def test_what_a_parameter_may_be_is_said(client, params, said):
    refused = await client.get("/documents", params={"tenant_id": "acme"} | params)
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith(said)


@pytest.mark.parametrize(
    ("query", "field"), [("doc_type=%ff", "doc_type"), ("after=%ed%a0%80", "after"), ("%ff=1", None)]
)
async def test_a_query_that_is_not_utf8_is_refused(client, query, field):
    await put(client, "a", doc_type="\ufffd")
    for method in ("GET", "DELETE"):
        refused = await client.request(method, f"/documents?tenant_id=acme&{query}")
        assert "is not UTF-8" in assert_problem(refused, 400, field=field)["detail"]
    assert (await client.get("/documents/a", params={"tenant_id": "acme"})).status_code == 200


async def test_a_misspelt_filter_deletes_nothing(client):
    await put(client, doc_type="t1")
    params = {"tenant_id": "acme", "doc_type": "t1", "created_befor": "2000-01-01T00:00:00Z"}
    assert_problem(await client.delete("/documents", params=params), 400, field="created_befor")
    assert (await client.get("/documents/faq%2F1", params={"tenant_id": "acme"})).status_code == 200


async def test_a_body_that_does_not_say_it_is_json_is_refused(client):
    body = b'{"tenant_id": "acme", "content": "x"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert_problem(await client.put("/documents/a", content=body, headers={"content-type": kind}), 415)


async def test_the_tenant_is_required_everywhere(client):
    assert_problem(await client.get("/documents"), 400, field="tenant_id")
    assert_problem(await client.get("/documents/a"), 400, field="tenant_id")
    assert_problem(await client.delete("/documents/a"), 400, field="tenant_id")
    assert_problem(await client.post("/search", json={"query": "x"}), 400, field="tenant_id")


async def test_delete_by_filter_needs_one_and_counts(client):
    items = [{"id": f"d{n}", "content": f"text {n}", "metadata": {"n": n}} for n in range(5)]
    await client.post("/documents", json={"tenant_id": "acme", "documents": items})
    assert_problem(await client.delete("/documents", params={"tenant_id": "acme"}), 400)
    response = await client.delete("/documents", params={"tenant_id": "acme", "metadata": '{"n": {"$in": [1, 2]}}'})
    assert response.json() == {"deleted": 2}


async def test_a_failing_embedder_is_a_502_without_its_words(client, openai, owner):
    openai.fail("status", status=400, times=20)
    assert_problem(await put(client), 502)
    assert owner.execute("select count(*) from sources").fetchone() == (0,)


async def test_one_tenant_never_sees_the_others_document(client):
    await put(client)
    not_theirs = await client.get("/documents/faq%2F1", params={"tenant_id": "umbra"})
    not_there = await client.get("/documents/faq%2F1", params={"tenant_id": "nobody"})
    assert assert_problem(not_theirs, 404)["detail"].replace("umbra", "x") == assert_problem(not_there, 404)[
        "detail"
    ].replace("nobody", "x")
    assert_problem(await client.delete("/documents/faq%2F1", params={"tenant_id": "umbra"}), 404)
    assert (await client.post("/search", json={"tenant_id": "umbra", "query": "password"})).json()["results"] == []


async def test_a_deletion_says_what_went_that_it_is_gone_and_what_is_left_where(client):
    await client.put(PATH, json=TENANT | {"content": "Otters eat fish.", "metadata": {}})
    told = (await client.delete(PATH, params=TENANT)).json()
    assert (told["complete"], told["put_since"], set(told["readable"].values())) == (True, 0, {0})
    assert told["removed"] == {"document_terms": 1, "embedding_cache": 1, "documents": 1, "sources": 1}
    assert any("VACUUM" in each["finish"] for each in told["remains"])
    assert any("backups" in each["where"] for each in told["remains"])


async def test_a_tenant_is_erased_and_may_be_erased_again(client):
    for name in ("a", "b"):
        await client.put(f"/documents/{name}", json=TENANT | {"content": f"The {name} of otters."})
    told = (await client.delete("/tenants/acme")).json()
    assert (told["tenant_id"], told["id"], told["complete"]) == ("acme", None, True)
    assert told["removed"]["sources"] == told["removed"]["embedding_cache"] == 2
    assert told["removed"]["term_statistics"] > 0
    assert (await client.get("/documents", params=TENANT)).json()["documents"] == []
    again = (await client.delete("/tenants/acme")).json()
    assert (again["complete"], set(again["removed"].values())) == (True, {0})
    assert_problem(await client.delete("/tenants/a%20b"), 400, field="tenant_id")

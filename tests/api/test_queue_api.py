"""Puts that do not wait, over HTTP: 202, ETags, states, status, retry."""

import pytest

from app import embedding
from app.database import Database
from app.worker import Worker


@pytest.fixture
def drain(settings):
    async def _drain():
        database, embedder = Database(settings, settings.database_url), embedding.open_embedder(settings)
        await Worker(database, embedder, settings, once=True).run()
        await database.close()
        await embedder.aclose()

    return _drain


async def put(client, document_id="a", content="Otters swim.", wait="false", headers=None, **fields):
    body = {"tenant_id": "acme", "content": content} | fields
    return await client.put(f"/documents/{document_id}", params={"wait": wait}, json=body, headers=headers)


async def get(client, document_id="a", headers=None):
    return await client.get(f"/documents/{document_id}", params={"tenant_id": "acme"}, headers=headers)


async def test_a_put_that_does_not_wait_is_accepted_and_read_back_as_pending(client, openai):
    answer = await put(client, "faq/a b", title="T")
    assert answer.status_code == 202
    assert answer.json() == {
        "id": "faq/a b",
        "status": "created",
        "version": 1,
        "chunks": {"embedded": 0, "reused": 0, "removed": 0},
        "state": "pending",
    }
    assert openai.embedding_calls == []
    read = await get(client, "faq/a b")
    assert (read.json()["state"], read.json()["content"], read.json()["chunks"]) == ("pending", "Otters swim.", [])
    assert read.headers["ETag"] == answer.headers["ETag"]


async def test_an_etag_told_while_pending_still_serves_writers_and_shows_readers_that_it_is_ready(client, drain):
    told = (await put(client)).headers["ETag"]
    assert (await get(client, headers={"If-None-Match": told})).status_code == 200
    await drain()
    read = await get(client, headers={"If-None-Match": told})
    assert (read.status_code, read.json()["state"]) == (200, "ready")
    assert (await get(client, headers={"If-None-Match": read.headers["ETag"]})).status_code == 304
    assert (await put(client, content="x", headers={"If-None-Match": told})).status_code == 412
    assert (await put(client, content="x", headers={"If-Match": '"9-9.pending"'})).status_code == 412
    assert (await put(client, content="Badgers dig.", headers={"If-Match": told})).status_code == 202
    assert (await put(client, content="Lynx hunt.", headers={"If-Match": told})).status_code == 412
    removed = await client.delete("/documents/a", params={"tenant_id": "acme"}, headers={"If-Match": told})
    assert removed.status_code == 412


async def test_what_is_ready_already_is_not_put_again(client, drain):
    assert (await put(client, wait="true")).status_code == 201
    again = await put(client)
    assert (again.status_code, again.json()["status"], again.json()["state"]) == (200, "unchanged", "ready")


async def test_a_batch_that_does_not_wait(client, drain):
    items = [{"id": f"d{n}", "content": f"text {n}"} for n in range(3)]
    body = {"tenant_id": "acme", "documents": items}
    answer = await client.post("/documents", params={"wait": "false"}, json=body)
    assert answer.status_code == 202
    assert [item["state"] for item in answer.json()["documents"]] == ["pending"] * 3
    listed = await client.get("/documents", params={"tenant_id": "acme", "state": "pending", "limit": 2})
    assert ([d["id"] for d in listed.json()["documents"]], listed.json()["next"]) == (["d0", "d1"], "d1")
    await drain()
    assert (await client.post("/documents", params={"wait": "false"}, json=body)).status_code == 200
    listed = await client.get("/documents", params={"tenant_id": "acme", "state": "ready"})
    assert len(listed.json()["documents"]) == 3
    body["documents"].append({"id": "d9", "content": " "})
    refused = await client.post("/documents", params={"wait": "false"}, json=body)
    assert (refused.status_code, "documents[3].content" in refused.text) == (400, True)


async def test_a_document_that_is_given_up_says_why_and_is_tried_again_on_demand(client, drain, openai):
    openai.poison = "poison"
    await put(client, content="poison")
    await drain()
    read = await get(client)
    assert (read.json()["state"], "refuses this text" in read.json()["error"]) == ("failed", True)
    assert read.headers["ETag"].endswith('.failed"')
    status = (await client.get("/status", params={"tenant_id": "acme"})).json()
    assert status == {
        "tenant_id": "acme",
        "documents": 1,
        "chunks": 0,
        "pending": 0,
        "failed": 1,
        "oldest_pending_seconds": None,
        "ready_last_minute": 0,
        "ready_last_hour": 0,
    }
    openai.poison = None
    retried = await client.post("/queue/retry", json={"tenant_id": "umbra", "all": True})
    assert retried.json() == {"retried": 0}
    retried = await client.post("/queue/retry", json={"tenant_id": "acme", "ids": ["a"]})
    assert (retried.status_code, retried.json()) == (200, {"retried": 1})
    status = (await client.get("/status", params={"tenant_id": "acme"})).json()
    assert (status["pending"], status["oldest_pending_seconds"] >= 0) == (1, True)
    await drain()
    assert (await get(client)).json()["state"] == "ready"


@pytest.mark.parametrize(
    "body", [{}, {"ids": ["a"], "all": True}, {"ids": []}, {"ids": [""]}, {"ids": ["a"] * 1001}, {"ids": ["a\0"]}]
)
async def test_what_to_try_again_has_to_be_said(client, body):
    answer = await client.post("/queue/retry", json={"tenant_id": "acme"} | body)
    assert answer.status_code in (400, 413)
    assert "ids" in answer.json()["detail"]


async def test_a_state_that_does_not_exist_is_refused(client):
    answer = await client.get("/documents", params={"tenant_id": "acme", "state": "lost"})
    assert answer.status_code == 400

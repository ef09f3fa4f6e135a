"""A server that was started before a change of the embedding model goes on through it."""

import asyncio
import json
from contextlib import ExitStack

import pytest
from msgspec.structs import replace

from app import change, completion, jobs, pending
from app.drafts import Draft
from app.errors import EmbeddingFailed, SetupError
from app.outcomes import Outcome
from tests.conftest import DIMENSIONS
from tests.database.test_models import CATS, HERONS, LENGTH, NEW, OTTERS, Steps, abandon, steps, vectors
from tests.openai_server import OpenAIServer, embedding

__all__ = ["steps"]
ALL = (CATS, HERONS, OTTERS)


@pytest.fixture
def settings(settings):
    """Of a service that soon gives a server up."""
    return replace(settings, embedding_retries=0)


async def put(client, name, content, **fields):
    answer = await client.put(f"/documents/{name}", json={"tenant_id": "acme", "content": content, **fields})
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


async def best(client, **fields):
    answer = await client.post("/search", json={"tenant_id": "acme", "top_k": 1, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"][0]["id"]


async def test_a_server_serves_through_a_change_without_being_started_anew(client, steps: Steps, owner):
    for name, text in zip(("cats", "herons", "otters"), ALL, strict=True):
        await put(client, name, text)
    await steps.prepare()
    await put(client, "herons", HERONS, doc_type="bird")
    assert await best(client, query="what do otters eat") == "otters"
    await steps.switch()
    for mode in ("vector", "hybrid", "text"):
        assert await best(client, query="what do otters eat", mode=mode) == "otters"
    batch = await client.post(
        "/search/batch", json={"searches": [{"tenant_id": "acme", "query": text, "top_k": 1} for text in ALL]}
    )
    assert [each["results"][0]["id"] for each in batch.json()["answers"]] == ["cats", "herons", "otters"]
    answer = await client.post("/rag", json={"tenant_id": "acme", "question": "when do cats hunt"})
    assert answer.json()["sources"][0]["id"] == "cats"
    assert vectors(owner) == [(text, LENGTH, True) for text in ALL]
    await steps.rollback()
    answer = await client.post("/rag", json={"tenant_id": "acme", "question": "when do cats hunt"})
    assert answer.json()["sources"][0]["id"] == "cats"
    assert await best(client, query="what do otters eat", explain="analyze") == "otters"
    await steps.switch()
    await steps.finish()
    ready = (await client.get("/health/ready")).json()
    assert (ready["embedding_model"], ready["embedding_dimensions"]) == (NEW, LENGTH)
    assert (await put(client, "herons", HERONS, doc_type="bird"))["status"] == "unchanged"


async def test_vectors_of_callers_have_the_length_of_the_model_that_is_searched_now(client, steps: Steps):
    old, new = (embedding(OTTERS, length).tolist() for length in (DIMENSIONS, LENGTH))
    await put(client, "otters", OTTERS)
    await steps.prepare()
    assert await best(client, embedding=old) == "otters"
    await steps.switch()
    # The first that this server sees of the new length is a vector of a caller's.
    assert await best(client, embedding=new) == "otters"
    refused = await client.post("/search", json={"tenant_id": "acme", "embedding": old})
    assert (refused.status_code, refused.json()["field"]) == (400, "embedding")
    assert f"allowed: {LENGTH}" in refused.json()["detail"]
    await put(client, "own", "A text of its own.", embedding=new)
    with pytest.raises(SetupError, match="cannot rollback: 1 chunks have vectors that their callers brought"):
        await steps.rollback()
    await client.delete("/documents/own", params={"tenant_id": "acme"})
    await steps.rollback()
    refused = await client.put("/documents/own", json={"tenant_id": "acme", "content": "x", "embedding": new})
    assert (refused.status_code, refused.json()["field"]) == (400, "embedding")


async def test_many_requests_at_once_are_answered_while_the_switch_happens(client, steps: Steps):
    for name, text in zip(("cats", "herons", "otters"), ALL, strict=True):
        await put(client, name, text)
    await steps.prepare()
    done = asyncio.Event()

    async def keep_asking():
        count = 0
        while not done.is_set():
            assert await best(client, query=OTTERS, mode=("vector", "hybrid")[count % 2]) == "otters"
            count += 1
        return count

    asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
    try:
        for step in (steps.switch, steps.rollback, steps.switch):
            await step()
            await asyncio.sleep(0.3)
    finally:
        done.set()
        counts = await asyncio.gather(*asking)
    assert min(counts) > 0
    steps.run(lambda connection: change.finish(connection, lambda _: None))


async def test_callers_say_which_model_their_vectors_are_of(client, steps: Steps, owner):
    text = "A text of its own."
    old, new = (embedding(text, length).tolist() for length in (DIMENSIONS, LENGTH))
    former = {"embedding": old, "embedding_model": "text-embedding-3-small"}
    latter = {"embedding": new, "embedding_model": NEW}
    await put(client, "own", text, **former)
    assert await best(client, **former) == "own"

    async def refused(path, **fields):
        body = {"tenant_id": "acme", **fields}
        answer = await (client.put(path, json=body) if path.startswith("/doc") else client.post(path, json=body))
        assert (answer.status_code, answer.json()["field"]) == (400, "embedding_model"), answer.text
        return answer.json()["detail"]

    assert "allowed: text-embedding-3-small" in await refused("/documents/own", content=text, **latter)
    assert "without an embedding" in await refused("/documents/own", content=text, embedding_model=NEW)
    assert "allowed: text-embedding-3-small" in await refused("/search", **latter)
    await steps.prepare()
    with pytest.raises(SetupError, match='put them again with "embedding_model": "text-embedding-3-large"'):
        await steps.switch()
    assert "is not searched: allowed where" in await refused("/documents/own", content="Another text.", **latter)
    assert "is not searched: allowed where" in await refused("/documents/none", content=text, **latter)
    assert await put(client, "own", text, **latter) == {
        "id": "own",
        "status": "unchanged",
        "version": 1,
        "chunks": {"embedded": 0, "reused": 1, "removed": 0},
    } | {"state": "ready"}
    assert vectors(owner) == [(text, DIMENSIONS, True)]
    assert vectors(owner, "pgrecall_run_documents") == [(text, LENGTH, True)]
    await steps.switch()
    assert "allowed: text-embedding-3-large" in await refused("/search", **former)
    assert await best(client, **latter) == "own"
    # Both in turn, so that a rollback stays possible.
    await put(client, "own", "Another text of its own.", **latter)
    with pytest.raises(SetupError, match="cannot rollback: 1 chunks have vectors"):
        await steps.rollback()
    await put(client, "own", "Another text of its own.", **former)
    await steps.rollback()
    assert await best(client, **former) == "own"


async def test_vectors_of_one_length_are_told_apart_by_the_name_callers_give(client, steps: Steps):
    text = "A text of its own."
    vector = embedding(text, DIMENSIONS).tolist()
    await put(client, "own", text, embedding=vector)
    steps.start(change.model_of("another-model", DIMENSIONS, "openai", steps.new.base_url))
    await steps.fill()
    await put(client, "own", text, embedding=vector, embedding_model="another-model")
    await steps.switch()
    body = {"tenant_id": "acme", "embedding": vector, "embedding_model": "text-embedding-3-small"}
    answer = await client.post("/search", json=body)
    assert (answer.status_code, answer.json()["field"]) == (400, "embedding_model")
    assert await best(client, embedding=vector, embedding_model="another-model") == "own"


async def search(client):
    return (await client.post("/search", json={"tenant_id": "acme", "query": "who eats fish"})).status_code == 200


async def ask(client):
    answer = await client.post("/rag", json={"tenant_id": "acme", "question": "when do cats hunt"})
    return answer.status_code == 200


async def store(client):
    body = {"tenant_id": "acme", "content": "A text that is new."}
    return (await client.put("/documents/new", json=body)).status_code == 201


async def stream(client):
    line = json.dumps({"id": "new", "content": "A text that is new."})
    headers = {"Content-Type": "application/x-ndjson"}
    answer = await client.post("/documents/stream", params={"tenant_id": "acme"}, content=line, headers=headers)
    return '"created"' in answer.text


@pytest.mark.parametrize("act", [search, ask, store, stream])
async def test_a_rollback_from_a_model_whose_server_died_reaches_a_server_that_was_started_before(
    client, steps: Steps, openai, act
):
    await put(client, "otters", OTTERS)
    with OpenAIServer() as dying:
        steps.start(steps.new._replace(base_url=dying.url))
        await steps.fill()
        await steps.switch()
        assert await best(client, query=OTTERS) == "otters"
        assert dying.embedded[-1] == OTTERS
    # Something else each time: vectors that are known need no server.
    answer = await client.post("/search", json={"tenant_id": "acme", "query": "what is in the river"})
    assert (answer.status_code, answer.headers["content-type"]) == (502, "application/problem+json")
    await steps.rollback()
    assert await act(client)
    steps.run(abandon)
    assert await best(client, query="what do otters eat") == "otters"
    assert openai.embedded[-1] == "what do otters eat"


async def test_a_worker_follows_a_rollback_from_a_model_whose_server_died(client, steps: Steps, owner):
    await put(client, "otters", OTTERS)
    with OpenAIServer() as dying:
        steps.start(steps.new._replace(base_url=dying.url))
        await steps.fill()
        await steps.switch()
        assert (await steps.find(OTTERS))[0] == NEW
    await steps.rollback()
    body = {"tenant_id": "acme", "content": CATS}
    assert (await client.put("/documents/cats", params={"wait": "false"}, json=body)).status_code == 202
    claimed = [completion.Claimed(Draft("cats", CATS), 1)]
    (outcome,) = await completion.complete(steps.database, steps.embedder, steps.settings, "acme", claimed)
    assert isinstance(outcome, Outcome)
    assert vectors(owner) == [(text, DIMENSIONS, True) for text in (CATS, OTTERS)]


async def test_a_worker_blames_no_document_when_the_server_of_the_new_model_died(client, steps: Steps, owner):
    await put(client, "otters", OTTERS)
    with OpenAIServer() as dying:
        steps.start(steps.new._replace(base_url=dying.url))
        await steps.fill()
        await steps.switch()
        assert (await steps.find(OTTERS))[0] == NEW
    body = {"tenant_id": "acme", "content": CATS}
    assert (await client.put("/documents/cats", params={"wait": "false"}, json=body)).status_code == 202
    limits = {"lease": 60.0, "documents": 1, "size": 10_000, "largest": 10_000, "suspects": False}
    claims = await pending.claim(steps.database, "acme", "one", **limits)
    counts = jobs.Counts()
    tools = jobs.Tools(steps.database, steps.embedder, steps.settings, "one")
    assert isinstance(await jobs.work(tools, counts, "acme", claims, seconds=0.0), EmbeddingFailed)
    assert counts.parked == 0
    state = owner.execute("select state, attempts from sources where id = 'cats'").fetchone()
    assert state == ("pending", 0)


@pytest.mark.parametrize("dies", [True, False])
async def test_the_same_model_on_another_server_is_asked_there(client, steps: Steps, owner, dies):
    await put(client, "otters", OTTERS)
    with OpenAIServer() as second, ExitStack() as stack:
        first = stack.enter_context(OpenAIServer())
        steps.start(steps.new._replace(base_url=first.url))
        await steps.fill()
        await put(client, "cats", CATS)
        assert first.embedded[-1] == CATS
        if dies:
            stack.close()
        steps.run(abandon)
        steps.start(steps.new._replace(base_url=second.url))
        await put(client, "herons", HERONS)
        # Where the first one answered, its vector is as good.
        assert (HERONS in second.embedded) is dies
        assert vectors(owner, "pgrecall_run_documents") == [(HERONS, LENGTH, True)]
        asked = len(first.calls)
        await steps.fill()
        await steps.switch()
        assert await best(client, query="what do otters eat") == "otters"
        assert second.embedded[-1] == "what do otters eat"
        assert len(first.calls) == asked


async def test_a_failure_that_no_other_model_mends_is_told(client, steps: Steps, openai):
    await put(client, "otters", OTTERS)
    openai.fail(status=503)
    answer = await client.post("/search", json={"tenant_id": "acme", "query": "what do otters eat"})
    assert answer.status_code == 502
    assert len(openai.embedding_calls) == 2
    assert await best(client, query="what do otters eat") == "otters"

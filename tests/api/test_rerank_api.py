"""The third stage: candidates ordered by a reranker behind a real HTTP server, and what becomes of its failures."""

import logging

import pytest
from msgspec.structs import replace

from app.asgi import create_app
from tests.api.test_documents_api import assert_problem
from tests.openai_server import RERANK

CONTENTS = {f"d{n}": f"Otters in river number {n} eat fish, and {'herons ' * n}watch." for n in range(8)}


def by_herons(_, text):
    """The more herons the better, from a logit below 0 upwards, as some servers give them."""
    return text.count("herons") - 3.5


@pytest.fixture
def settings(settings, openai):
    openai.relevance = by_herons
    return replace(
        settings, rerank_url=openai.url, rerank_model="bge-reranker", rerank_key="rk-secret", embedding_timeout=3.0
    )


@pytest.fixture
async def stored(client):
    items = [{"id": name, "content": text} for name, text in CONTENTS.items()]
    response = await client.post("/documents", json={"tenant_id": "acme", "documents": items})
    assert response.status_code < 300, response.text


async def ask(client, path="/search", **options):
    body = {"tenant_id": "acme", "query": "otters eat fish", "top_k": 3, "rerank": True} | options
    return await client.post(path, json={name: value for name, value in body.items() if value is not None})


async def found(client, **options):
    response = await ask(client, **options)
    assert response.status_code == 200, response.text
    return response.json()["results"]


async def test_hits_are_ordered_by_the_rerankers_score_and_keep_their_others(client, stored, openai):
    plain = {hit["id"]: hit for hit in await found(client, rerank=False, top_k=8)}
    hits = await found(client)
    assert [hit["id"] for hit in hits] == ["d7", "d6", "d5"]
    assert [hit["rerank_score"] for hit in hits] == [3.5, 2.5, 1.5]
    assert all(hit | {"rerank_score": None} == plain[hit["id"]] for hit in hits)
    (call,) = openai.rerank_calls
    assert call.headers["authorization"] == "Bearer rk-secret"
    assert set(call.body) == {"model", "query", "documents", "top_n"}
    assert (call.body["model"], call.body["query"], call.body["top_n"]) == ("bge-reranker", "otters eat fish", 8)
    assert sorted(call.body["documents"]) == sorted(CONTENTS.values())


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
async def test_the_candidates_are_the_best_of_each_mode(client, stored, openai, mode):
    before = await found(client, mode=mode, rerank=False, top_k=4)
    after = await found(client, mode=mode, rerank={"candidates": 4}, top_k=2)
    best = sorted(before, key=lambda hit: -by_herons("", hit["content"]))[:2]
    assert [hit["id"] for hit in after] == [hit["id"] for hit in best]
    assert len(openai.rerank_calls[-1].body["documents"]) == 4
    await found(client, mode=mode, rerank={"candidates": 1}, top_k=5)
    assert len(openai.rerank_calls[-1].body["documents"]) == 5


async def test_equal_scores_keep_the_order_of_the_search(client, stored, openai):
    openai.relevance = lambda *_: 0.5
    plain = await found(client, rerank=False, top_k=8)
    assert [hit["id"] for hit in await found(client, top_k=8)] == [hit["id"] for hit in plain]


async def test_the_threshold_is_cosine_similarity_still(client, stored, openai):
    plain = await found(client, rerank=False, top_k=8)
    least = plain[3]["similarity"]
    assert {hit["id"] for hit in await found(client, threshold=least, top_k=8)} == {hit["id"] for hit in plain[:4]}
    assert await found(client, threshold=1.0) == []
    assert len(openai.rerank_calls) == 1  # nothing found, nothing asked


async def test_documents_are_grouped_before_and_likeness_counts_after(client, openai):
    long = " ".join(f"Sentence {n} says that otters eat fish beside herons." for n in range(60))
    await client.put("/documents/long", json={"tenant_id": "acme", "content": long})
    await client.put("/documents/short", json={"tenant_id": "acme", "content": "Otters eat fish."})
    grouped = await found(client, group_by="id", top_k=2, rerank={"candidates": 2})
    assert [hit["id"] for hit in grouped] == ["long", "short"]
    assert [hit["id"] for hit in await found(client, top_k=2)] == ["long", "long"]
    diverse = await found(client, top_k=2, diversity=0.9)
    assert [hit["id"] for hit in diverse] == ["long", "short"]
    assert diverse[0]["rerank_score"] > diverse[1]["rerank_score"]


async def test_a_vector_may_stand_beside_the_question_the_reranker_reads(client, stored, openai):
    vector = [1.0] + [0.0] * 63
    assert len(await found(client, embedding=vector)) == 3
    assert len(openai.embedding_calls) == 1  # of the documents
    problem = assert_problem(await ask(client, query=None, embedding=vector), 400)
    assert problem["field"] == "query"


async def test_explain_says_how_long_reranking_took(client, stored, openai):
    openai.fail("hang", path=RERANK, seconds=0.2)
    told = (await ask(client, explain=True)).json()["explain"]["milliseconds"]
    assert list(told) == ["embedding", "database", "reranking", "rest"]
    assert told["reranking"] >= 200


async def test_answers_and_batches_are_reranked_too(client, stored, openai):
    answer = (await ask(client, "/rag", query=None, question="otters eat fish", rerank={"candidates": 8})).json()
    assert [source["id"] for source in answer["sources"]] == ["d7", "d6", "d5"]
    one = {"tenant_id": "acme", "query": "otters eat fish", "top_k": 1}
    searches = [one | {"rerank": True}, one]
    answers = (await client.post("/search/batch", json={"searches": searches})).json()["answers"]
    assert answers[0]["results"][0]["id"] == "d7"
    assert [each["results"][0]["rerank_score"] for each in answers] == [3.5, None]
    searches[1] = one | {"rerank": {"candidates": 0}}
    problem = assert_problem(await client.post("/search/batch", json={"searches": searches}), 400)
    assert problem["field"] == "searches[1].rerank.candidates"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"kind": "rerank_missing"}, "gave 7 scores for 8 texts"),
        ({"kind": "rerank_index"}, "gave 8 scores for 8 texts, not one for each"),
        ({"kind": "rerank_twice"}, "gave 8 scores for 8 texts, not one for each"),
        ({"kind": "rerank_nan"}, "something other than scores; is PGRECALL_RERANK_URL right?"),
        ({"kind": "truncated"}, "something other than scores"),
        ({"kind": "hang", "seconds": 30}, "gave no answer within 3 s, retries included (PGRECALL_EMBEDDING_TIMEOUT)"),
        ({"kind": "cut", "times": 3}, "cannot be reached or hangs up; look at PGRECALL_RERANK_URL"),
        ({"status": 401}, "status 401: it does not accept the key; look at PGRECALL_RERANK_KEY"),
        ({"status": 404}, "look at PGRECALL_RERANK_MODEL and PGRECALL_RERANK_URL"),
        ({"status": 422}, "fewer candidates or smaller chunks may fit"),
        ({"status": 429, "headers": {"Retry-After": "60"}}, "gave no answer within 3 s"),
        ({"status": 500, "headers": {"Retry-After": "0.01"}, "times": 3}, "status 500"),
    ],
)
async def test_what_the_reranker_gets_wrong_is_a_502_that_says_so(client, stored, openai, caplog, fault, said):
    openai.fail(**{"path": RERANK} | fault)
    with caplog.at_level(logging.WARNING):
        problem = assert_problem(await ask(client), 502)
    assert problem["type"] == "urn:pgrecall:problem:rerank-failed"
    assert said in problem["detail"]
    for secret in ("upstream secret detail", "rk-secret"):
        assert secret not in caplog.text + str(problem)
    assert len(openai.rerank_calls) <= 3
    assert len(await found(client)) == 3  # and the next search goes through


async def test_a_reranker_that_recovers_is_asked_again(client, stored, openai):
    openai.fail(status=503, path=RERANK, headers={"Retry-After": "0.01"}, times=2)
    assert len(await found(client)) == 3
    assert len(openai.rerank_calls) == 3


@pytest.mark.parametrize(
    ("value", "field", "allowed"),
    [
        ({"candidates": 101}, "rerank.candidates", "1 to 100"),
        ({"candidate": 10}, "rerank.candidate", "candidates"),
        ("yes", "rerank", "true or false or an object"),
    ],
)
async def test_what_is_no_such_option_is_refused_by_name(client, openai, value, field, allowed):
    problem = assert_problem(await ask(client, rerank=value), 400)
    assert problem["field"] == field
    assert allowed in problem["detail"]
    assert openai.calls == []


class TestWithout:
    @pytest.fixture
    def app(self, settings):
        return create_app(replace(settings, rerank_url=None, rerank_model=None, rerank_key=None))

    @pytest.mark.parametrize("path", ["/search", "/rag"])
    async def test_a_reranker_that_is_not_configured_is_named(self, client, openai, path):
        asked = {"query": None, "question": "otters?"} if path == "/rag" else {}
        problem = assert_problem(await ask(client, path, **asked), 400)
        assert problem["field"] == "rerank"
        assert "PGRECALL_RERANK_URL and PGRECALL_RERANK_MODEL" in problem["detail"]
        assert openai.calls == []

"""POST /search: filters, thresholds, limits and honest answers."""

from contextlib import AsyncExitStack

import psycopg
import pytest
from msgspec.structs import replace

from tests.api.test_documents_api import assert_problem


@pytest.fixture
async def corpus(client):
    documents = [
        {
            "id": f"{kind}-{lang}",
            "content": f"{topic} is described here in {lang}.",
            "doc_type": kind,
            "metadata": {"lang": lang, "year": year},
            "created_at": f"{year}-06-01T00:00:00Z",
        }
        for kind, topic, year in (
            ("faq", "password reset", 2021),
            ("manual", "engine repair", 2022),
            ("note", "garden birds", 2023),
        )
        for lang in ("en", "de")
    ]
    await client.post("/documents", json={"tenant_id": "acme", "documents": documents})
    return documents


async def search(client, **body):
    response = await client.post("/search", json={"tenant_id": "acme", "query": "password reset"} | body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_most_similar_come_first_with_everything_a_caller_needs(client, corpus):
    body = await search(client, top_k=3)
    assert body["count"] == 3
    assert body["scan"] == {"strategy": "exact", "completed": False, "full": True, "kind": None}
    first = body["results"][0]
    assert set(first) == {
        "id",
        "chunk_index",
        "content",
        "similarity",
        "doc_type",
        "metadata",
        "created_at",
        "start_offset",
        "score",
        "text_score",
        "rerank_score",
    }
    assert first["score"] == first["similarity"]
    assert first["doc_type"] == "faq"
    assert (first["chunk_index"], first["start_offset"]) == (0, 0)
    similarities = [hit["similarity"] for hit in body["results"]]
    assert similarities == sorted(similarities, reverse=True)
    assert all(-1 <= s <= 1.000001 for s in similarities)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"doc_type": "faq"}, {"faq-en", "faq-de"}),
        ({"doc_type": ["faq", "note"], "metadata": {"lang": "en"}}, {"faq-en", "note-en"}),
        ({"doc_type": []}, set()),
        ({"metadata": {"year": {"$gte": 2022}}}, {"manual-en", "manual-de", "note-en", "note-de"}),
        ({"metadata": {"$not": {"lang": "en"}, "year": 2021}}, {"faq-de"}),
        (
            {"created_after": "2022-06-01T00:00:00Z", "created_before": "2023-06-01T00:00:00Z"},
            {"manual-en", "manual-de"},
        ),
        ({"metadata": {}}, {"faq-en", "faq-de", "manual-en", "manual-de", "note-en", "note-de"}),
    ],
)
async def test_filters_narrow(client, corpus, filters, expected):
    assert {hit["id"] for hit in (await search(client, **filters))["results"]} == expected


async def test_threshold_is_cosine_similarity(client, corpus):
    every = (await search(client))["results"]
    cut = every[2]["similarity"]
    assert [h["id"] for h in (await search(client, threshold=cut))["results"]] == [
        h["id"] for h in every if h["similarity"] >= cut
    ]


async def test_a_vector_of_ones_own_may_be_searched_with(client, corpus, openai):
    asked = len(openai.calls)
    body = await search(client, query=None, embedding=[1.0] * 64)
    assert body["count"] == 6
    assert len(openai.calls) == asked


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"query": ""}, "query"),
        ({"query": "  "}, "query"),
        ({"query": "a\0"}, "query"),
        ({"query": "x", "embedding": [1.0] * 64}, "query"),
        ({"query": None}, "query"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 101}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": "1"}, "top_k"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": "0.5"}, "threshold"),
        ({"query": None, "embedding": ["1.0"] * 64}, "embedding[0]"),
        ({"threshold": "high"}, "threshold"),
        ({"query": None, "embedding": [1.0] * 63}, "embedding"),
        ({"query": None, "embedding": [0.0] * 64}, "embedding"),
        ({"doc_type": 5}, "doc_type"),
        ({"doc_type": ["a\0"]}, "doc_type[0]"),
        ({"doc_type": ["x"] * 1_001}, "doc_type"),
        ({"metadata": {"a": {"$foo": 1}}}, "metadata.a.$foo"),
        ({"created_before": "2020-01-01T00:00:00"}, "created_before"),
        ({"created_after": "0001-01-01T00:00:00Z"}, "created_after"),
        ({"created_before": "9999-12-31T23:59:59-12:00"}, "created_before"),
        ({"tenant_id": "a b"}, "tenant_id"),
        ({"limit": 5}, "limit"),
    ],
)
async def test_bad_requests_name_the_field(client, change, field):
    body = {"tenant_id": "acme", "query": "x"} | change
    assert_problem(await client.post("/search", json=body), 400, field=field)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"top_k": 1}', "tenant_id: is missing; it is required"),
        (b'{"tenant_id": "a", "top_k": "1"}', "top_k: is a text; allowed: a whole number from 1 to 100"),
        (
            b'{"tenant_id": "a", "top_k": 1.5}',
            "top_k: is a number with a fraction; allowed: a whole number from 1 to 100",
        ),
        (b'{"tenant_id": "a", "threshold": []}', "threshold: is a list; allowed: a number or null from -1 to 1"),
        (b'{"tenant_id": "a", "doc_type": 5}', "doc_type: is a whole number; allowed: a text or a list or null"),
        (b'{"tenant_id": "a", "created_after": 5}', "created_after: is a whole number; allowed: an ISO 8601 moment"),
        (b'{"tenant_id": "a", "explain": "why"}', "explain: is 'why'; allowed: 'analyze', true or false"),
        (b'{"tenant_id": "a", "created_after": "soon"}', "created_after: is not a moment; allowed: an ISO 8601 moment"),
        (b'{"tenant_id": "a", "embedding": [0, 1e999]}', "embedding[1]: is out of range; allowed: numbers"),
        (b'{"tenant_id": "a", "mode": "vektor"}', "mode: is 'vektor'; allowed: 'hybrid', 'text', 'vector'"),
        (b'{"tenant_id": "a", "group_by": "doc"}', "group_by: is 'doc'; allowed: 'id'"),
        (b'{"tenant_id": "a", "query": "\\ud800"}', "query: has a lone surrogate; allowed: valid Unicode"),
        (b'{"tenant_id": "a", "metadata": {"k": ["x", "\\ude00y"]}}', "metadata.k[1]: has a lone surrogate"),
        (b'{"tenant_id": "a", "metadata": {"\\ud800": 1}}', "metadata: has a lone surrogate"),
        (b'{"tenant_id": "\\ud800", ', "the body is not JSON: Input data was truncated, or a text in it has a lone"),
        (b'"\\ud800"', "the body has a lone surrogate; allowed: valid Unicode"),
        (b'{"tenant_id": "a", "query": "\\ud83d\\ude00", "top_k": "1"}', "top_k: is a text"),
        (b'{"tenant_id": "a", "limit": 5}', "limit: there is no such field; allowed: tenant_id, query, embedding"),
        (b"[]", "the body is a list; allowed: an object"),
        (b"", "the body is empty; allowed: a JSON object"),
        (b"{", "the body is not JSON: Input data was truncated; allowed: a JSON object"),
        (b"query=x", "the body is not JSON: "),
    ],
)
async def test_a_body_that_cannot_be_taken_says_what_can(client, body, detail):
    response = await client.post("/search", content=body, headers={"Content-Type": "application/json"})
    problem = assert_problem(response, 400)
    assert problem["detail"].startswith(detail)
    (fault,) = problem["faults"]
    assert (fault["field"] or None) == problem.get("field")
    assert problem["type"] == "urn:pgrecall:problem:bad-input"


async def test_a_question_of_zero_width_is_refused(client):
    for mode in ("vector", "text", "hybrid"):
        response = await client.post("/search", json={"tenant_id": "a", "query": "\u200b \u2060", "mode": mode})
        assert "white space only" in assert_problem(response, 400, field="query")["detail"]


async def test_weights_that_leave_no_leg_are_refused(client):
    body = {"tenant_id": "a", "query": "x", "mode": "hybrid", "vector_weight": 0, "text_weight": 0}
    problem = assert_problem(await client.post("/search", json=body), 400, field="vector_weight")
    assert "allowed: one of them above 0" in problem["detail"]


async def test_an_unknown_operator_lists_the_known_ones(client):
    response = await client.post(
        "/search", json={"tenant_id": "acme", "query": "x", "metadata": {"a": {"$regex": "x"}}}
    )
    assert "$exists" in assert_problem(response, 400)["detail"]


@pytest.fixture
def settings(settings, request):
    return replace(settings, **getattr(request, "param", {}))


@pytest.mark.parametrize("settings", [{"pool_timeout": 0.2}], indirect=True, ids=[""])
async def test_an_exhausted_pool_is_a_503_with_retry_after(client, app, settings):
    database = app.state.service.database
    async with AsyncExitStack() as held:
        for _ in range(settings.pool_size):
            await held.enter_async_context(database.write("acme"))
        response = await client.post("/search", json={"tenant_id": "acme", "embedding": [1.0] * 64})
        assert_problem(response, 503)
        assert int(response.headers["retry-after"]) >= 1


async def test_a_search_after_the_server_cut_every_connection_works(client, corpus, cluster, database_name):
    await search(client)
    with psycopg.connect(cluster.admin, autocommit=True) as admin:
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()",
            (database_name,),
        )
    assert (await search(client))["count"] == 6

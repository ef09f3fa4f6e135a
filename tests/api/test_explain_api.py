"""What a search tells of itself when asked to, and the options that overrule the server's choice."""

import pytest


@pytest.fixture
async def stored(client):
    items = [{"id": f"d{n}", "content": f"text number {n}", "doc_type": "odd" if n % 2 else "even"} for n in range(12)]
    response = await client.post("/documents", json={"tenant_id": "acme", "documents": items})
    assert response.status_code < 300, response.text


async def ask(client, **options):
    response = await client.post("/search", json={"tenant_id": "acme", "query": "text number 3", "top_k": 3} | options)
    return response.status_code, response.json()


async def test_an_answer_is_not_explained_unless_asked(client, stored):
    assert "explain" not in (await ask(client))[1]


async def test_explain_says_which_way_was_taken_why_and_where_the_time_went(client, stored):
    _, answer = await ask(client, explain=True, doc_type="odd")
    told = answer["explain"]
    assert told["strategy"] == "exact"
    assert "at most 500 chunks pass" in told["reason"]
    assert set(told["milliseconds"]) == {"embedding", "database", "rest"}
    assert [each["statement"] for each in told["statements"]] == ["few"]
    assert told["statements"][0]["measured"] is None


async def test_explain_analyze_says_what_postgresql_measured(client, stored):
    _, answer = await ask(client, explain="analyze", exact=True)
    told = answer["explain"]
    assert told["reason"] == "exact was asked for"
    (run,) = told["statements"]
    assert run["measured"]["rows_visited"] >= 12
    assert run["measured"]["pages_hit"] > 0


async def test_grouped_by_id_every_document_is_there_once(client):
    text = " ".join(f"Sentence {n} is about otters in rivers." for n in range(120))
    await client.put("/documents/long", json={"tenant_id": "acme", "content": text})
    await client.put("/documents/short", json={"tenant_id": "acme", "content": "A heron stands by the lake."})
    _, plain = await ask(client, query="otters", top_k=2)
    _, grouped = await ask(client, query="otters", top_k=2, group_by="id")
    assert sorted(hit["id"] for hit in grouped["results"]) == ["long", "short"]
    assert len({hit["id"] for hit in plain["results"]}) <= 2


@pytest.mark.parametrize(
    ("field", "value", "allowed"), [("ef_search", 5, "10"), ("ef_search", 1001, "1,000"), ("oversampling", 0.5, "100")]
)
async def test_options_out_of_range_are_refused_by_name(client, stored, field, value, allowed):
    status, problem = await ask(client, **{field: value})
    assert status == 400
    assert problem["field"] == field
    assert allowed.replace(",", "") in problem["detail"].replace(",", "")

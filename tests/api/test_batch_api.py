"""Several searches in one request, and questions whose vectors are remembered."""


async def store(client):
    items = [{"id": f"d{n}", "content": f"text number {n}", "doc_type": "odd" if n % 2 else "even"} for n in range(12)]
    response = await client.post("/documents", json={"tenant_id": "acme", "documents": items})
    assert response.status_code == 200, response.text


async def test_each_answer_is_that_of_the_search_alone_and_the_questions_are_embedded_in_one_call(client, openai):
    await store(client)
    searches = [
        {"tenant_id": "acme", "query": "number 3", "top_k": 2},
        {"tenant_id": "acme", "query": "number 4", "doc_type": "odd", "mode": "hybrid"},
        {"tenant_id": "acme", "query": "number 5", "mode": "text"},
        {"tenant_id": "nobody", "query": "number 6"},
    ]
    before = len(openai.calls)
    response = await client.post("/search/batch", json={"searches": searches})
    assert response.status_code == 200, response.text
    assert len(openai.calls) - before == 2  # one for each tenant
    alone = [(await client.post("/search", json=each)).json() for each in searches]
    assert response.json()["answers"] == alone


async def test_one_search_at_fault_is_named_by_its_place_and_nothing_is_embedded(client, openai):
    before = len(openai.calls)
    good = {"tenant_id": "acme", "query": "number 3"}
    for bad, field in (({"top_k": 0}, "top_k"), ({"query": " "}, "query"), ({"mode": "text", "query": None}, "query")):
        response = await client.post("/search/batch", json={"searches": [good, good | bad]})
        assert response.status_code == 400
        assert response.json()["field"] == f"searches[1].{field}"
    for searches in ([], [good] * 101):
        assert (await client.post("/search/batch", json={"searches": searches})).json()["field"] == "searches"
    assert len(openai.calls) == before


async def test_a_question_asked_again_by_the_same_tenant_skips_the_embedder_and_says_so(client, openai):
    await store(client)
    question = {"tenant_id": "acme", "query": "a hot question", "explain": True}
    first = (await client.post("/search", json=question)).json()
    before = len(openai.calls)
    again = (await client.post("/search", json=question)).json()
    assert len(openai.calls) == before
    assert [first["explain"]["embedding_remembered"], again["explain"]["embedding_remembered"]] == [False, True]
    assert again["results"] == first["results"]
    await client.post("/search", json=question | {"tenant_id": "other"})
    assert len(openai.calls) == before + 1

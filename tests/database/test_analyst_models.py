"""The functions and views for analysts while the embedding model is changed: what the API gives, of the model it searches."""

import psycopg
import pytest
from psycopg.rows import dict_row

from app import local
from app.drafts import Draft
from app.search import Options
from tests.conftest import DIMENSIONS
from tests.database.test_models import LENGTH, NEW, Steps
from tests.openai_server import embedding

OLD = "text-embedding-3-small"
QUESTION = "what do otters eat in winter"


@pytest.fixture
def steps(owner_url, database, settings, embedder, openai):
    return Steps(owner_url, database, settings, embedder, openai.url)


@pytest.fixture
def analyst(cluster, database_name, owner):
    """One session for the whole change: what it planned before must not be what it runs afterwards."""
    owner.execute(local.ADMIT_ANALYST, (local.ANALYST,))
    url = cluster.url(database_name, local.ANALYST)
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
        yield connection


async def same(steps, analyst, model, other):
    """Assert that the functions give the API's rows and refuse a vector of `other`, of which the state is said if it has one."""
    lengths = {OLD: DIMENSIONS, NEW: LENGTH}

    def called(call, *values):
        return analyst.execute(f"select * from {call}", values).fetchall()

    vector = str(embedding(QUESTION, lengths[model]).tolist())
    found, hits = await steps.find(QUESTION, top_k=5)
    rows = called("search_documents('acme', %s, 5)", vector)
    assert found == model
    assert [row["id"] for row in rows] == [hit.id for hit in hits]
    assert [row["similarity"] for row in rows] == pytest.approx([hit.similarity for hit in hits])
    _, hits = await steps.find(QUESTION, top_k=5, question=QUESTION, options=Options(mode="hybrid"))
    rows = called("hybrid_search('acme', %s, %s, 5)", QUESTION, vector)
    assert [(row["id"], row["text_score"]) for row in rows] == [(hit.id, hit.text_score) for hit in hits]
    assert [row["score"] for row in rows] == pytest.approx([hit.score for hit in hits])
    ((middle,),) = [
        row.values() for row in called("(select embedding::text from whole_documents where id = 'animal3') one")
    ]
    assert middle.count(",") == lengths[model] - 1
    nearest = called("search_documents('acme', %s, 4)", middle)
    rows = called("similar_documents('acme', 'animal3', 3)")
    assert [row["id"] for row in rows] == [row["id"] for row in nearest if row["id"] != "animal3"]
    assert called("recall_check('acme', 3)")[0]["recall"] == 1
    assert called("model_progress where state = 'active'")[0]["name"] == model
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        called("search_documents('acme', %s)", str(embedding(QUESTION, lengths[other]).tolist()))
    said = refused.value.diag
    expected = f"query_embedding: has {lengths[other]} dimensions; allowed: {lengths[model]}, as {model}"
    assert said.message_primary == expected
    states = [row["state"] for row in called("model_progress") if row["name"] == other]
    assert said.message_hint.startswith(f"That is the length of {other}, which is {states[0]}. " if states else model)


async def test_the_functions_give_what_the_api_gives_through_a_change_of_the_model(steps, analyst):
    await steps.put(
        *(Draft(f"animal{n}", f"The animal{n} lives in place{n} and eats otters{n % 3}.") for n in range(8))
    )
    await same(steps, analyst, OLD, NEW)
    steps.start()
    await same(steps, analyst, OLD, NEW)
    await steps.fill()
    await same(steps, analyst, OLD, NEW)
    await steps.switch()
    await same(steps, analyst, NEW, OLD)
    await steps.rollback()
    await same(steps, analyst, OLD, NEW)
    await steps.switch()
    await steps.finish()
    await same(steps, analyst, NEW, OLD)

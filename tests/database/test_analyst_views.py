"""The views for analysts: what they count is there, and of the tenants they may read only."""

import numpy as np
import psycopg
import pytest
from psycopg.rows import dict_row

from app import local, swap, upsert
from app.drafts import Draft
from tests.conftest import DIMENSIONS


@pytest.fixture
def analyst(cluster, database_name):
    url = cluster.url(database_name, local.ANALYST)
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
        yield connection


@pytest.fixture
async def stored(database, embedder, settings, owner):
    text = "Otters eat fish. " * 40
    for tenant in ("acme", "umbra", "other"):
        await upsert.put(
            database, embedder, settings, tenant, [Draft("long", text * 8), Draft("short", "Herons wait.")]
        )
    owner.execute("insert into sources (tenant_id, id, content) values ('acme', 'later', 'not yet')")
    owner.execute(
        "insert into sources (tenant_id, id, content, state, error) values ('acme', 'bad', 'x', 'failed', 'why')"
    )
    owner.execute(
        "insert into analyst_tenants select %s, tenant from unnest(array['acme', 'umbra']) tenant", (local.ANALYST,)
    )


def rows(connection, statement, *values):
    return connection.execute(statement, values).fetchall()


async def test_documents_are_whole_and_have_the_mean_of_their_vectors(stored, analyst):
    found = {
        row["id"]: row for row in rows(analyst, "select * from whole_documents where tenant_id = 'acme' order by id")
    }
    assert set(found) == {"bad", "later", "long", "short"}
    vectors = rows(analyst, "select embedding::text as v from documents where tenant_id = 'acme' and id = 'long'")
    parsed = np.array([[float(x) for x in row["v"].strip("[]").split(",")] for row in vectors])
    mean = np.array([float(x) for x in found["long"]["embedding"].strip("[]").split(",")])
    assert found["long"]["chunks"] == len(parsed) > 1
    np.testing.assert_allclose(mean, parsed.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert (found["later"]["state"], found["later"]["embedding"], found["bad"]["error"]) == ("pending", None, "why")


async def test_figures_are_of_each_tenant_the_reader_may_see(stored, analyst, owner):
    figures = {row["tenant_id"]: row for row in rows(analyst, "select * from statistics_by_tenant")}
    assert set(figures) == {"acme", "umbra"}
    acme = figures["acme"]
    chunks, characters, words = owner.execute(
        "select count(*), sum(ceil(length(content) / 4.0)), (select sum(length) from document_terms where tenant_id = 'acme') "
        "from documents where tenant_id = 'acme'"
    ).fetchone()
    assert (acme["documents"], acme["pending"], acme["failed"]) == (4, 1, 1)
    assert (acme["chunks"], acme["tokens"], acme["words"]) == (chunks, characters, words)
    assert figures["umbra"]["bytes"] > chunks * 4 * DIMENSIONS
    assert acme["first_created_at"] <= acme["last_created_at"] <= acme["updated_at"]


async def test_every_index_is_there_and_an_invalid_one_is_seen(stored, analyst, owner, owner_url):
    listed = rows(analyst, "select * from index_health")
    names = {row["index_name"] for row in listed}
    indexes = owner.execute(
        "select indexname from pg_indexes where schemaname = 'public' and tablename in ('documents', 'sources', 'document_terms')"
    ).fetchall()
    assert {name for (name,) in indexes} <= names
    assert {row["method"] for row in listed} == {"btree", "gin", "hnsw"}
    assert all(row["valid"] and row["bytes"] > 0 for row in listed)
    name = "documents_embedding_full_03_idx"
    owner.execute(f"drop index {name}")
    with psycopg.connect(owner_url) as other:
        other.execute("insert into sources (tenant_id, id, content) values ('acme', 'open', 'x')")
        other.execute(
            "insert into documents (tenant_id, id, chunk_key, content, embedding) "
            "values ('acme', 'open', 'k', 'x', array_fill(1, array[64])::vector)"
        )
        owner.execute("set lock_timeout = '0.5s'")  # it waits for the transaction that is open, and is given up
        with pytest.raises(psycopg.errors.LockNotAvailable):
            owner.execute(f"create index concurrently {name} on documents using hnsw (embedding vector_cosine_ops)")
    assert rows(analyst, "select index_name from index_health where not valid") == [{"index_name": name}]


async def test_a_change_of_the_model_is_seen_from_its_first_chunk_on(stored, analyst, owner):
    chunks = rows(analyst, "select count(*) as chunks from documents")[0]["chunks"]
    progress = "select name, state, chunks, filled, share::float8 from model_progress order by state"
    active = {"name": "text-embedding-3-small", "state": "active", "chunks": chunks, "filled": chunks, "share": 1.0}
    assert rows(analyst, progress) == [active]
    with owner.transaction():
        swap.create(owner, 8)
    owner.execute(
        "insert into embedding_models (name, dimensions, state) values ('new', 8, 'filling'), ('old', 8, 'dropped')"
    )
    others = {"chunks": chunks, "filled": 0, "share": 0.0}
    assert rows(analyst, progress) == [
        active,
        {"name": "old", "state": "dropped"} | others,
        {"name": "new", "state": "filling"} | others,
    ]
    owner.execute(
        "insert into pgrecall_run_documents select tenant_id, id, chunk_key, doc_type, metadata, created_at, content, "
        "array_fill(1, array[8])::vector from documents where id = 'short'"
    )
    (filling,) = rows(analyst, "select filled from model_progress where state = 'filling'")
    assert filling == {"filled": 2}  # of the tenants acme and umbra; `other` is not this analyst's


def test_a_column_that_is_not_selected_is_not_computed(analyst):
    for statement in (
        "select id, content from whole_documents",
        "select tenant_id, documents from statistics_by_tenant",
    ):
        plan = rows(analyst, f"explain (format json) {statement}")[0]["QUERY PLAN"]
        assert "'documents'" not in str(plan).replace("'Alias': 'documents'", "")

"""The full-text statement finds by the index of the words, or scores the few rows that a filter leaves; never a whole tenant."""

import json

import psycopg
import pytest

from app import fusion, roles, scans, text
from app.conditions import Conditions, where_values
from app.local import OWNER, SERVICE
from app.statements import rendered
from tests.conftest import cloned, settings_for

ROWS = 6_000


@pytest.fixture(scope="module")
def corpus(cluster, template):
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name, OWNER), autocommit=True) as owner:
        for (index,) in owner.execute(
            "select indexname from pg_indexes where tablename = 'documents' and indexdef like '%hnsw%'"
        ).fetchall():
            owner.execute(f"drop index {index}")
        for tenant in ("acme", "umbra"):
            owner.execute(
                "insert into sources (tenant_id, id, content) select %s, 'd' || n, '' from generate_series(1, %s) n",
                (tenant, ROWS),
            )
        owner.execute(
            "insert into documents (tenant_id, id, chunk_key, doc_type, content, embedding) "
            "select tenant_id, id, 'k', case when hashtext(id) %% 100 = 0 then 'rare' else 'often' end, "
            "'vacuum ' || case when hashtext(id) %% 50 = 1 then 'planner ' else 'page ' end || id, "
            "array_fill(1, array[64])::vector from sources".replace("%%", "%")
        )
        owner.execute("call fill_terms()")
        owner.execute("vacuum analyze documents, document_terms, term_statistics, sources")
        yield name


BY_WORDS = fusion.Mixed(scans.Wanted(0), None, similarity=False)


def plan(cluster, corpus, conditions, question="planner vacuum", mixed=BY_WORDS, **more):
    """The plan of a search as the service runs it: its role, its tenant, its settings."""
    settings = settings_for(cluster.url(corpus, SERVICE), "http://127.0.0.1:9/v1", exact_rows=1_000)
    sql, constants = rendered(fusion.build(conditions, mixed))
    sql = sql.replace("%(embedding)s", "%(embedding)s::vector")
    values = (
        constants | text.values(settings, question, 10, conditions) | where_values("acme", conditions) | {"top_k": 10}
    ) | more
    with psycopg.connect(settings.database_url) as connection:
        for name, value in ({"role": roles.APP, "pgrecall.tenant_id": "acme"} | scans.EXACT | text.CONFIG).items():
            connection.execute("select set_config(%s, %s, true)", (name, value))
        (found,) = connection.execute("explain (analyze, format json) " + sql, values).fetchone()
        return list(nodes((found if isinstance(found, list) else json.loads(found))[0]["Plan"]))


def nodes(node):
    yield node
    for child in node.get("Plans", []):
        yield from nodes(child)


def ran(plan, index):
    return [n for n in plan if n.get("Index Name") == index and n["Actual Loops"] > 0]


WORDS = "document_terms_tenant_terms_idx"


def test_words_are_looked_up_in_their_index_and_nothing_else_of_the_tenant_is_read(cluster, corpus):
    found = plan(cluster, corpus, Conditions())
    (walked,) = ran(found, WORDS)
    assert walked["Actual Rows"] < ROWS / 10
    assert not [n for n in found if n["Node Type"] in ("BitmapAnd", "Seq Scan")]


def test_a_filter_that_leaves_few_rows_has_them_scored_without_the_words(cluster, corpus):
    found = plan(cluster, corpus, Conditions(doc_types=("rare",)))
    assert ran(found, WORDS) == []
    assert ran(found, "document_terms_pkey")


def test_a_filter_that_leaves_many_is_applied_to_what_the_words_find(cluster, corpus):
    found = plan(cluster, corpus, Conditions(doc_types=("often",)))
    assert ran(found, WORDS)
    assert all(n["Actual Rows"] < ROWS / 10 for n in ran(found, WORDS))


def test_hybrid_looks_up_by_key_what_a_leg_did_not_give(cluster, corpus):
    found = plan(
        cluster,
        corpus,
        Conditions(),
        mixed=fusion.Mixed(scans.Wanted(64), "exact", "relative"),
        embedding=str([1] * 64),
        leg_k=10,
        vector_weight=1,
        text_weight=1,
    )
    looked_up = ran(found, "document_terms_pkey")
    assert looked_up
    assert all(n["Actual Rows"] <= 1 and n["Actual Loops"] <= 20 for n in looked_up)
    assert [n for n in ran(found, "documents_pkey") if n["Actual Rows"] <= 1 and n["Actual Loops"] <= 20]
    assert not [n for n in found if n["Node Type"] == "Seq Scan" and n["Relation Name"] == "document_terms"]

"""Which index each statement of a search uses, at three tenant sizes, as the service's role; and that it never is short."""

import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime

import numpy as np
import psycopg
import pytest
from msgspec.structs import replace
from psycopg.adapt import PyFormat
from psycopg.pq import Format

from app import filters, roles, scans, search
from app.conditions import Conditions
from app.database import Database
from app.local import OWNER, SERVICE
from app.statements import rendered
from tests.conftest import DIMENSIONS, NEEDS_CONTRIB, Cluster, cloned, settings_for

SIZES = {"small": 60, "middle": 1_500, "large": 12_000}
EXACT_ROWS = 1_000


def vectors(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((40, DIMENSIONS))
    return (centres[generator.integers(0, 40, count)] + 0.7 * generator.standard_normal((count, DIMENSIONS))).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def corpus(cluster: Cluster, template: str) -> Iterator[str]:
    """A database with tenants of three sizes; its name."""
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name, OWNER), autocommit=True) as owner:
        indexes = owner.execute(
            "select indexname, indexdef from pg_indexes where tablename = 'documents' and indexdef like '%hnsw%'"
        ).fetchall()
        for index, _ in indexes:
            owner.execute(f"drop index {index}")
        for tenant, count in SIZES.items():
            owner.execute(
                "insert into sources (tenant_id, id, content, chunk_keys, start_offsets, state) "
                "select %s, 'd' || n, 'x', '{k}', '{0}', 'ready' from generate_series(0, %s - 1) n",
                (tenant, count),
            )
            copy = "copy documents (tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding) from stdin"
            with owner.cursor().copy(copy) as rows:
                for n, vector in enumerate(vectors(count, len(tenant))):
                    rows.write_row(
                        (
                            tenant,
                            f"d{n}",
                            "k",
                            "faq" if n % 5 == 0 else "manual",
                            json.dumps({"lang": "de" if n % 10 == 0 else "en", "n": n}),
                            f"2026-01-{1 + n % 28:02}T00:00:00Z",
                            f"text {n}",
                            "[" + ",".join(map(str, vector)) + "]",
                        )
                    )
        for _, definition in indexes:
            owner.execute(definition)
        owner.execute("vacuum analyze documents")
        owner.execute("vacuum analyze sources")
        yield name


@pytest.fixture
def settings(cluster, corpus):
    return settings_for(cluster.url(corpus, SERVICE), "http://127.0.0.1:9/v1", exact_rows=EXACT_ROWS)


@pytest.fixture
async def database(settings) -> AsyncIterator[Database]:
    opened = Database(settings, settings.database_url)
    yield opened
    await opened.close()


@pytest.fixture
def owner(cluster, corpus):
    with psycopg.connect(cluster.url(corpus, OWNER), autocommit=True) as connection:
        yield connection


def explain(settings, kind, tenant, conditions=None, top_k=10):
    """The plan of one statement as the service runs it: its role, its tenant, its settings."""
    conditions = conditions or Conditions()
    statement = scans.build(kind, conditions, scans.Wanted(DIMENSIONS))
    values = search.where_values(tenant, conditions) | {
        "embedding": "[" + ",".join(map(str, vectors(1, 99)[0])) + "]",
        "top_k": top_k,
        "bound": settings.exact_rows + 1,
        "candidates": 4 * top_k,
    }
    config = scans.index_config(settings.ef_search, 4 * top_k) if kind == "nearest" else scans.EXACT
    with psycopg.connect(settings.database_url) as connection:
        for name, value in ({"role": roles.APP, "pgrecall.tenant_id": tenant} | config).items():
            connection.execute("select set_config(%s, %s, true)", (name, value))
        sql, constants = rendered(statement)
        sql = sql.replace("%(embedding)s", "%(embedding)s::vector")
        (plan,) = connection.execute("explain (analyze, format json) " + sql, constants | values).fetchone()
        return plan[0]["Plan"]


def nodes(plan):
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def indexes(plan, *, ran=True):
    return {n["Index Name"] for n in nodes(plan) if "Index Name" in n and (not ran or n["Actual Loops"] > 0)}


def walked(plan):
    """The walks over an HNSW index, even those that did not run."""
    return [n for n in nodes(plan) if n.get("Index Name", "").startswith("documents_embedding_")]


@pytest.mark.parametrize("tenant", ["small", "middle", "large"])
def test_counting_stops_at_the_bound_and_reads_the_index_only(settings, tenant):
    plan = explain(settings, "few", tenant)
    size = next(n for n in nodes(plan) if n.get("Subplan Name") == "CTE size")
    read = next(n for n in nodes(size) if n["Node Type"] == "Limit")
    assert read["Actual Rows"] == min(SIZES[tenant], EXACT_ROWS + 1)
    assert any(n["Node Type"] == "Index Only Scan" or "Index" in n["Node Type"] for n in nodes(size))


def test_a_small_tenant_is_measured_exactly_through_a_tenant_index(settings):
    plan = explain(settings, "few", "small")
    assert not walked(plan)
    assert not [n for n in nodes(plan) if n["Node Type"] == "Seq Scan" and n.get("Relation Name") == "documents"]


@pytest.mark.parametrize("tenant", ["middle", "large"])
def test_above_the_bound_the_exact_branch_does_not_run(settings, tenant):
    hit = next(n for n in nodes(explain(settings, "few", tenant)) if n.get("Subplan Name") == "CTE hit")
    scans = [n for n in nodes(hit) if n.get("Relation Name") == "documents" or "Index Name" in n]
    assert scans
    assert all(n["Actual Loops"] == 0 for n in scans)


@pytest.mark.parametrize("tenant", ["middle", "large"])
def test_above_the_bound_the_hnsw_index_of_the_tenants_bucket_is_walked(settings, tenant):
    plan = explain(settings, "nearest", tenant)
    (walk,) = walked(plan)
    assert walk["Actual Rows"] == 40


def test_the_exact_statement_never_touches_the_approximate_index(settings):
    for tenant in SIZES:
        assert not walked(explain(settings, "exact", tenant))


@pytest.mark.parametrize(
    ("conditions", "index"),
    [
        (Conditions(metadata=filters.parse({"n": 17})), "documents_labels_idx"),
        (Conditions(metadata=filters.parse({"n": {"$in": [3, 5]}})), "documents_labels_idx"),
        (Conditions(doc_types=("none",)), "documents_doc_type_idx"),
    ],
)
def test_a_selective_filter_uses_its_index_within_the_tenant(settings, conditions, index, contrib):
    if index == "documents_labels_idx" and not contrib:
        pytest.skip(NEEDS_CONTRIB)
    assert index in indexes(explain(settings, "few", "large", conditions))


def test_a_date_window_uses_its_index(settings):
    window = Conditions(
        created_after=datetime(2026, 1, 5, tzinfo=UTC), created_before=datetime(2026, 1, 5, 1, tzinfo=UTC)
    )
    assert "documents_created_at_idx" in indexes(explain(settings, "few", "large", window))


FILTERS = {
    "none": (Conditions(), "true"),
    "type": (Conditions(doc_types=("faq",)), "doc_type = 'faq'"),
    "metadata": (Conditions(metadata=filters.parse({"lang": "de"})), "metadata ->> 'lang' = 'de'"),
    "both": (
        Conditions(doc_types=("manual",), metadata=filters.parse({"lang": "de"})),
        "doc_type = 'manual' and metadata ->> 'lang' = 'de'",
    ),
    "range": (Conditions(metadata=filters.parse({"n": {"$lt": 7}})), "(metadata ->> 'n')::int < 7"),
    "nothing": (Conditions(doc_types=()), "false"),
}


@pytest.mark.parametrize("tenant", list(SIZES))
@pytest.mark.parametrize("name", list(FILTERS))
async def test_never_short_whatever_the_tenant_and_the_filter(database, settings, owner, tenant, name):
    conditions, sql = FILTERS[name]
    (matching,) = owner.execute(f"select count(*) from documents where tenant_id = %s and {sql}", (tenant,)).fetchone()
    for top_k in (1, 10, 100):
        found = await search.search(database, settings, tenant, vectors(1, 5)[0], top_k=top_k, conditions=conditions)
        assert len(found.hits) == min(top_k, matching)
        assert found.scan.strategy == ("exact" if matching <= EXACT_ROWS or found.scan.completed else "index")
        assert found.scan.full


@pytest.mark.parametrize("tenant", list(SIZES))
async def test_results_agree_with_a_plain_exact_query(database, settings, owner, tenant):
    query = vectors(1, 11)[0]
    truth = owner.execute(
        "select id, 1 - (embedding <=> %s::vector) from documents where tenant_id = %s order by (embedding <=> %s::vector) + 0, id limit 10",
        ("[" + ",".join(map(str, query)) + "]", tenant, "[" + ",".join(map(str, query)) + "]"),
    ).fetchall()
    found = await search.search(database, settings, tenant, query, top_k=10)
    got = [(hit.id, hit.similarity) for hit in found.hits]
    overlap = {i for i, _ in got} & {i for i, _ in truth}
    assert len(overlap) >= (10 if found.scan.strategy == "exact" else 9)
    assert [s for _, s in got] == sorted((s for _, s in got), reverse=True)
    if found.scan.strategy == "exact":
        assert [i for i, _ in got] == [i for i, _ in truth]


async def test_an_index_scan_that_ends_short_is_completed_exactly(database, settings, owner, monkeypatch):
    config = scans.index_config(100, 10) | {"hnsw.iterative_scan": "off", "hnsw.ef_search": "10"}
    monkeypatch.setattr(scans, "index_config", lambda *_: config)
    impatient = replace(settings, exact_rows=100)
    conditions = Conditions(metadata=filters.parse({"lang": "de"}))
    found = await search.search(database, impatient, "large", vectors(1, 5)[0], top_k=50, conditions=conditions)
    assert len(found.hits) == 50
    assert found.scan == search.Scan("exact", completed=True)
    assert all(hit.metadata["lang"] == "de" for hit in found.hits)


async def test_when_the_time_limit_forbids_completing_the_answer_says_so(database, settings, monkeypatch):
    config = scans.index_config(100, 10) | {"hnsw.iterative_scan": "off", "hnsw.ef_search": "100"}
    monkeypatch.setattr(scans, "index_config", lambda *_: config)
    original = database.fetch

    async def cut_short(tenant, statements, config=None, **options):
        if statements[0].name == "exact":
            config = {**(config or {}), "statement_timeout": "1"}
        return await original(tenant, statements, config, **options)

    monkeypatch.setattr(database, "fetch", cut_short)
    impatient = replace(settings, exact_rows=100)
    conditions = Conditions(metadata=filters.parse({"lang": "de"}))
    found = await search.search(database, impatient, "large", vectors(1, 5)[0], top_k=50, conditions=conditions)
    assert found.scan == search.Scan("index", full=False, kind="full")
    assert 0 < len(found.hits) < 50


async def test_threshold_cuts_and_what_it_leaves_is_complete(database, settings):
    every = await search.search(database, settings, "large", vectors(1, 5)[0], top_k=20)
    threshold = every.hits[7].similarity
    some = await search.search(database, settings, "large", vectors(1, 5)[0], top_k=20, threshold=threshold)
    assert [hit.id for hit in some.hits] == [hit.id for hit in every.hits[:8]]
    full = await search.search(database, settings, "large", vectors(1, 5)[0], top_k=5, threshold=threshold)
    assert full.scan == search.Scan("index", kind="full")
    none = await search.search(database, settings, "large", vectors(1, 5)[0], top_k=20, threshold=1.0)
    assert none.hits == []


async def test_ties_are_broken_by_id_and_every_call_gives_the_same_order(database, settings, owner):
    owner.execute("delete from sources where tenant_id = 'twins'")
    owner.execute(
        "insert into sources (tenant_id, id, content, chunk_keys, start_offsets, state) "
        "select 'twins', 'd' || n, 'x', '{k}', '{0}', 'ready' from generate_series(10, 49) n"
    )
    owner.execute(
        "insert into documents (tenant_id, id, chunk_key, content, embedding) select 'twins', 'd' || n, 'k', 'x', "
        "(select embedding from documents where tenant_id = 'small' and id = 'd0') from generate_series(10, 49) n"
    )
    for _ in range(3):
        found = await search.search(database, settings, "twins", vectors(1, 5)[0], top_k=12)
        assert [hit.id for hit in found.hits] == [f"d{n}" for n in range(10, 22)]


async def test_a_search_is_one_statement_for_a_small_tenant_and_for_a_large_one_that_is_known(
    database, settings, monkeypatch
):
    asked = []
    original = database.fetch

    async def counted(tenant, statements, *rest, **options):
        asked.append([s.name for s in statements])
        return await original(tenant, statements, *rest, **options)

    monkeypatch.setattr(database, "fetch", counted)
    await search.search(database, settings, "small", vectors(1, 5)[0])
    await search.search(database, settings, "large", vectors(1, 5)[0])
    await search.search(database, settings, "large", vectors(1, 6)[0])
    assert asked == [["layout"], ["few"], ["layout"], ["few"], ["nearest"], ["nearest"]]  # the layout once a minute


async def test_the_vector_travels_in_binary(database, settings):
    async with database._replica.lend() as lent:
        connection = lent.driver
        dumper = connection.adapters.get_dumper(np.ndarray, PyFormat.AUTO)
        assert dumper.format == Format.BINARY
        cursor = connection.cursor()
        await cursor.execute("select %s", (vectors(1, 1)[0],))
        assert len(cursor._query.params[0]) == 4 + 4 * DIMENSIONS

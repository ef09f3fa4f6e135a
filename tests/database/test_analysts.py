"""The functions for analysts give the rows that the API gives for the same request, under row-level security."""

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.rows import dict_row

from app import analysts, filters, indexes, local, scans, search
from app.conditions import Conditions
from app.database import Database
from app.search import Options
from app.settings import Settings
from tests.conftest import DIMENSIONS, Cluster, cloned, settings_for

COUNTS = {"large": 3_000, "small": 80, "theirs": 80, "copies": 300}
"""Rows a tenant. Of the first the index is walked, `theirs` is not granted to the analyst and has the texts of `small`; the
chunks of `copies` have ten vectors and texts between them. The tenant `empty` has none.
"""

WORDS = ["otter", "river", "heron", "lake", "stone", "moss", "trout", "reed", "kingfisher", "willow", "eddy", "gravel"]


def vectors(count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((20, DIMENSIONS))
    return (centres[random.integers(0, 20, count)] + 0.7 * random.standard_normal((count, DIMENSIONS))).astype(
        np.float32
    )


def literal(vector: np.ndarray) -> str:
    return "[" + ",".join(map(str, vector)) + "]"


def fill(owner: psycopg.Connection, tenant: str, count: int, seed: int) -> None:
    """Documents of two chunks each."""
    random = np.random.default_rng(seed)
    different = 10 if tenant == "copies" else count
    texts = [" ".join(random.choice(WORDS, 8, p=np.arange(12, 0, -1) / 78)) for _ in range(different)]
    near = vectors(different, seed)
    owner.execute(
        "insert into sources (tenant_id, id, title, content, chunk_keys, start_offsets, state) "
        "select %s, 'd' || n, 'T' || n, 'x', '{k0,k1}', '{0,50}', 'ready' from generate_series(0, %s - 1) n",
        (tenant, count // 2),
    )
    copy = "copy documents (tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding) from stdin"
    with owner.cursor().copy(copy) as rows:
        for n in range(count):
            rows.write_row(
                (
                    tenant,
                    f"d{n // 2}",
                    f"k{n % 2}",
                    ("faq", "manual", None)[n // 2 % 3],
                    json.dumps(
                        {
                            "lang": "de" if n // 2 % 10 == 0 else "en",
                            "n": n // 2,
                            "tags": ["a", "b"][: n // 2 % 3],
                            "by": {"who": WORDS[n // 2 % 12]},
                        }
                    ),
                    f"2026-01-{1 + n // 2 % 28:02}T00:00:00Z",
                    texts[n % different],
                    literal(near[n % different]),
                )
            )


@pytest.fixture(scope="module")
def corpus(cluster: Cluster, template: str) -> Iterator[str]:
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name, local.OWNER), autocommit=True) as owner:
        for tenant, count in COUNTS.items():
            fill(owner, tenant, count, 1 if tenant == "large" else 2)
        owner.execute("call fill_terms()")
        owner.execute("vacuum analyze documents")
        owner.execute("vacuum analyze sources")
        owner.execute("vacuum analyze document_terms")
        owner.execute(
            "insert into analyst_tenants select %s, tenant from unnest(array['large', 'small', 'copies', 'empty']) tenant",
            (local.ANALYST,),
        )
        yield name


@pytest.fixture
def settings(cluster, corpus):
    return settings_for(cluster.url(corpus, local.SERVICE), "http://127.0.0.1:9/v1")


@pytest.fixture
async def database(settings) -> AsyncIterator[Database]:
    opened = Database(settings, settings.database_url)
    yield opened
    await opened.close()


@pytest.fixture
def analyst(cluster, corpus):
    with psycopg.connect(cluster.url(corpus, local.ANALYST), autocommit=True, row_factory=dict_row) as connection:
        yield connection


@pytest.fixture
def owner(cluster, corpus):
    with psycopg.connect(cluster.url(corpus, local.OWNER), autocommit=True, row_factory=dict_row) as connection:
        yield connection


def called(connection: psycopg.Connection, function: str, **arguments: Any) -> list[dict[str, Any]]:
    names = {"query_embedding": "vector", "metadata": "jsonb"}
    given = ", ".join(f"{name} => %({name})s" + (f"::{names[name]}" if name in names else "") for name in arguments)
    return connection.execute(f"select * from {function}({given})", arguments).fetchall()


SHOWN = ("id", "chunk_index", "content", "similarity", "doc_type", "metadata", "created_at", "start_offset")
MOMENT = datetime(2026, 1, 9, tzinfo=UTC)

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one": {"top_k": 1},
    "most": {"top_k": 100},
    "threshold": {"threshold": 0.5, "top_k": 50},
    "nothing is so near": {"threshold": 1.0},
    "type": {"doc_types": ["faq"]},
    "types": {"doc_types": ["faq", "manual"]},
    "no type": {"doc_types": []},
    "same type twice": {"doc_types": ["faq", "faq", "none"]},
    "least threshold": {"threshold": -1.0},
    "orthogonal": {"threshold": 0.0, "top_k": 100},
    "key": {"metadata": {"lang": "de"}},
    "values": {"metadata": {"by.who": {"$in": ["otter", "heron"]}, "tags": {"$ne": "b"}}},
    "nested": {
        "metadata": {"$or": [{"by": {"who": "moss"}}, {"n": {"$gt": 20, "$lte": 25}}], "absent": {"$exists": False}}
    },
    "all of": {"metadata": {"$and": [{"tags": ["a"]}, {"$not": {"lang": "de"}}, {"by": {"who": {"$lt": "n"}}}]}},
    "range": {"metadata": {"n": {"$gte": 3, "$lt": 900}, "$not": {"tags": "b"}}},
    "nothing passes": {"metadata": {"lang": "fr"}},
    "period": {"created_after": MOMENT, "created_before": datetime(2026, 1, 20, tzinfo=UTC)},
    "everything": {
        "doc_types": ["manual"],
        "metadata": {"lang": {"$in": ["en", "de"]}},
        "created_before": MOMENT,
        "threshold": -0.2,
    },
    "documents": {"by_document": True, "top_k": 30},
    "documents near": {"by_document": True, "threshold": 0.4, "metadata": {"lang": "en"}},
    "narrow walk": {"ef_search": 10},
    "exact": {"exact": True},
    "exact documents": {"exact": True, "by_document": True},
}
MODES: dict[str, dict[str, Any]] = {
    "vector": {},
    "hybrid": {"query_text": "otter willow gravel"},
    "rrf": {"query_text": 'otter -moss "river lake"', "fusion": "rrf", "vector_weight": 0.4, "text_weight": 1.5},
    "text": {"query_text": "heron kingfisher"},
}


def askable(mode: str, asked: dict[str, Any]) -> bool:
    """Words alone have no cosine similarity and walk no index of vectors."""
    return mode != "text" or not asked.keys() & {"threshold", "exact", "ef_search"}


async def agree(
    database: Database,
    settings: Settings,
    analyst: psycopg.Connection,
    tenant: str,
    mode: str,
    asked: dict[str, Any],
    query: np.ndarray | None = None,
) -> search.Found:
    """Assert that the function gives the rows that the API gives, and give the API's."""
    asked = asked | MODES[mode]
    query = vectors(1, 99)[0] if query is None else query
    conditions = Conditions(
        doc_types=tuple(asked["doc_types"]) if "doc_types" in asked else None,
        metadata=filters.parse(asked.get("metadata", {})),
        created_after=asked.get("created_after"),
        created_before=asked.get("created_before"),
    )
    options = Options(
        mode="hybrid" if mode == "rrf" else mode,
        fusion=asked.get("fusion", "relative"),
        vector_weight=asked.get("vector_weight", 1.0),
        text_weight=asked.get("text_weight", 1.0),
        exact=asked.get("exact", False),
        ef_search=asked.get("ef_search"),
        grouped=asked.get("by_document", False),
    )
    found = await search.search(
        database,
        settings,
        tenant,
        None if mode == "text" else query,
        question=asked.get("query_text", ""),
        top_k=asked.get("top_k", 10),
        threshold=asked.get("threshold"),
        conditions=conditions,
        options=options,
    )
    arguments = {"tenant": tenant} | asked | ({} if mode == "text" else {"query_embedding": literal(query)})
    if "metadata" in arguments:
        arguments["metadata"] = json.dumps(arguments["metadata"])
    rows = called(analyst, "search_documents" if mode == "vector" else "hybrid_search", **arguments)
    shown = SHOWN if mode == "vector" else (*SHOWN, "score", "text_score")
    hits = [dataclasses.asdict(hit) for hit in found.hits]
    assert [{key: row[key] for key in shown} for row in rows] == [{key: hit[key] for key in shown} for hit in hits]
    assert {row["scan"] for row in rows} <= {"completed" if found.scan.completed else found.scan.strategy}
    return found


@pytest.mark.parametrize("tenant", ["large", "small"])
@pytest.mark.parametrize(
    ("mode", "name"), [(mode, name) for mode in MODES for name in REQUESTS if askable(mode, REQUESTS[name])]
)
async def test_a_search_in_sql_gives_what_the_api_gives(database, settings, analyst, tenant, mode, name):
    found = await agree(database, settings, analyst, tenant, mode, REQUESTS[name])
    assert found.hits or name in {"no type", "nothing passes", "nothing is so near"}


@pytest.mark.parametrize("tenant", ["copies", "empty"])
@pytest.mark.parametrize("mode", MODES)
async def test_copies_come_in_the_same_order_and_an_empty_tenant_has_nothing(database, settings, analyst, tenant, mode):
    for name, request in REQUESTS.items():
        if askable(mode, request):
            found = await agree(database, settings, analyst, tenant, mode, request)
            assert tenant == "copies" or not found.hits, name


async def test_a_threshold_keeps_what_is_exactly_as_near(database, settings, analyst):
    for tenant in ("large", "copies"):
        found = await agree(database, settings, analyst, tenant, "vector", {"top_k": 5})
        edge = found.hits[-1].similarity
        for threshold, kept in ((edge, True), (np.nextafter(edge, 1), False)):
            found = await agree(database, settings, analyst, tenant, "vector", {"threshold": float(threshold)})
            assert (edge in {hit.similarity for hit in found.hits}) is kept


def test_functions_are_what_the_builder_gives_today(owner):
    written = max(Path(__file__).parents[2].glob("migrations/versions/*_analyst_functions.sql")).read_text()
    today = analysts.statements()
    assert [each.strip() for each in written.split("\n-- ;;\n")] == today, (
        "the builder of searches gives other SQL than the last revision of the functions holds: write a new revision with "
        "what `python -m app.analysts` prints"
    )
    defined = (
        "select p.oid::regprocedure::text as name, pg_get_functiondef(p.oid) as body, proacl::text from pg_proc p "
        "where p.pronamespace = 'public'::regnamespace "
        "and not exists (select from pg_depend d where d.objid = p.oid and d.deptype = 'e') order by 1"
    )
    before = owner.execute(defined).fetchall()
    with owner.transaction(force_rollback=True):
        for statement in today:
            assert "%" not in statement  # offline, Alembic prints it twice
            owner.execute(statement)
        assert owner.execute(defined).fetchall() == before


def test_text_question_read_is_text_question_over_the_tables(owner):
    bodies = "select prosrc from pg_proc where proname = %s"
    ours = owner.execute(bodies, ("text_question",)).fetchone()["prosrc"]
    read = owner.execute(bodies, ("text_question_read",)).fetchone()["prosrc"]
    assert read == ours.replace("from tenant_", "from ")


def test_functions_are_the_callers_and_look_names_up_in_one_place(owner):
    rows = owner.execute(
        "select proname, prosecdef, proconfig, has_function_privilege('public', oid, 'execute') as public, "
        "has_function_privilege(%s, oid, 'execute') as granted from pg_proc "
        "where pronamespace = 'public'::regnamespace and proname = any (%s)",
        (
            "pgrecall_analyst",
            ["search_documents", "hybrid_search", "similar_documents", "recall_check", "search_chunks"],
        ),
    ).fetchall()
    assert len(rows) == 5
    for row in rows:
        assert (row["prosecdef"], row["public"], row["granted"]) == (False, False, True), row["proname"]
        assert "search_path=public, pg_temp" in row["proconfig"]


def test_what_is_not_granted_is_as_what_is_not_there(analyst):
    query = literal(vectors(1, 99)[0])
    for tenant in ("theirs", "nobody"):
        assert called(analyst, "search_documents", tenant=tenant, query_embedding=query) == []
        assert called(analyst, "hybrid_search", tenant=tenant, query_text="otter", query_embedding=query) == []
        assert called(analyst, "hybrid_search", tenant=tenant, query_text="otter") == []
        assert called(analyst, "similar_documents", tenant=tenant, id="d1") == []
        assert called(analyst, "recall_check", tenant=tenant)[0]["queries"] == 0
        assert (
            called(analyst, "text_question_read", tenant=tenant, question="otter", most_terms=9, most_chunks=9)[0][
                "total"
            ]
            == 0
        )


def test_a_tenants_setting_opens_nothing_to_an_analyst(analyst):
    query = literal(vectors(1, 99)[0])
    with analyst.transaction():
        analyst.execute("select set_config('pgrecall.tenant_id', 'theirs', true)")
        assert called(analyst, "search_documents", tenant="theirs", query_embedding=query) == []
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            analyst.execute("select count(*) from tenant_documents")


def test_names_of_a_callers_own_are_not_looked_up(analyst):
    query = literal(vectors(1, 99)[0])
    before = called(analyst, "search_documents", tenant="large", query_embedding=query)
    analyst.execute("create temporary table documents (tenant_id text)")
    analyst.execute("create temporary table embedding_models (name text)")
    analyst.execute("set search_path = pg_temp, public")
    assert called(analyst, "search_documents", tenant="large", query_embedding=query) == before


def test_nothing_stays_of_how_a_search_was_done(analyst):
    names = [
        "enable_sort",
        "hnsw.ef_search",
        "hnsw.iterative_scan",
        "jit",
        "max_parallel_workers_per_gather",
        "search_path",
    ]
    shown = "select current_setting(name) as value from unnest(%s::text[]) name"
    query = literal(vectors(1, 99)[0])
    with analyst.transaction():
        analyst.execute("select '[1]'::vector")
        before = analyst.execute(shown, (names,)).fetchall()
        assert called(analyst, "search_documents", tenant="large", query_embedding=query)[0]["scan"] == "index"
        assert analyst.execute(shown, (names,)).fetchall() == before


GIVEN: dict[str, dict[str, Any]] = {
    "search_documents": {"tenant": "small", "query_embedding": literal(vectors(1, 99)[0])},
    "hybrid_search": {"tenant": "small", "query_text": "otter"},
    "similar_documents": {"tenant": "small", "id": "d1"},
    "recall_check": {"tenant": "small"},
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (function, arguments, message)
        for function in GIVEN
        for arguments, message in (
            ({"tenant": None}, "tenant: is missing"),
            ({"tenant": ""}, "tenant: '' is not allowed; allowed: 1 to 128 letters, digits, "),
            ({"tenant": "a b"}, "tenant: 'a b' is not allowed; allowed: 1 to 128 letters, digits, "),
            ({"top_k": None}, "top_k: is null; allowed: 1 to "),
            ({"top_k": 0}, "top_k: is 0; allowed: 1 to "),
            ({"top_k": -1}, "top_k: is -1; allowed: 1 to "),
            ({"top_k": 5000}, "top_k: is 5000; allowed: 1 to "),
            ({"top_k": 2**31 - 1}, "top_k: is 2147483647; allowed: 1 to "),
        )
    ),
    *(
        (function, arguments, message)
        for function in ("search_documents", "hybrid_search")
        for arguments, message in (
            ({"top_k": 1001}, "top_k: is 1001; allowed: 1 to 1000"),
            ({"threshold": 1.5, "query_embedding": literal(vectors(1, 99)[0])}, "threshold: is 1.5; allowed: -1 to 1"),
            ({"doc_types": ["faq", None]}, "doc_types[2]: is null; allowed: texts"),
            ({"doc_types": ["faq"] * 1001}, "doc_types: has 1001 types; allowed: at most 1000"),
            ({"doc_type": "x" * 32_001}, "doc_type: is 32001 bytes; allowed: 0 to 32000"),
            ({"created_after": "infinity"}, "created_after: is infinity; allowed: years 0002 to 9998"),
            ({"created_before": "0001-05-01 BC"}, "created_before: is "),
            ({"by_document": None}, "by_document: is null; allowed: true or false"),
            ({"exact": None}, "exact: is null; allowed: true or false"),
            ({"ef_search": 5}, "ef_search: is 5; allowed: 10 to 1000"),
            (
                {"query_embedding": "[1,2,3]"},
                "query_embedding: has 3 dimensions; allowed: 64, as text-embedding-3-small",
            ),
            ({"query_embedding": literal(np.zeros(64))}, "query_embedding: has length 0; allowed: 1e-09 to"),
            ({"metadata": "[]"}, "metadata: must be a condition"),
        )
    ),
    *(
        ("search_documents", arguments, message)
        for arguments, message in (
            ({"threshold": float("nan")}, "threshold: is NaN; allowed: -1 to 1"),
            ({"query_embedding": None}, "query_embedding: is missing"),
            ({"metadata": '{"a": {"$near": 1}}'}, "metadata.a.$near: unknown operator; known: $and"),
            ({"metadata": '{"$gt": 1}'}, "metadata.$gt: belongs under a key"),
            ({"metadata": '{"a": {"$ne": {"b": 1}}}'}, "metadata.a.$ne: must be a string"),
            ({"metadata": '{"a": {"$in": 1}}'}, "metadata.a.$in: must be a list of values"),
            ({"metadata": '{"$or": []}'}, "metadata.$or: must be a list of at least one condition"),
            ({"metadata": '{"a": {"b": {"$exists": 1}}}'}, "metadata.a.b.$exists: must be true or false"),
            ({"metadata": '{"a": {"$lt": null}}'}, "metadata.a.$lt: must be a number or a string"),
            ({"metadata": '{"$and": [{"a": 1}, {}]}'}, "metadata.$and[1]: must be a condition"),
        )
    ),
    *(
        ("hybrid_search", arguments, message)
        for arguments, message in (
            ({"query_text": None}, "query_text: is missing"),
            ({"query_text": ""}, "query_text: is white space only; allowed: a text"),
            ({"query_text": " \n\u200b\ufeff"}, "query_text: is white space only; allowed: a text"),
            ({"query_text": "x" * 32_001}, "query_text: has 32001 bytes; allowed: 1 to 32000"),
            ({"fusion": "best"}, "fusion: is best; allowed: relative, rrf"),
            ({"fusion": None}, "fusion: is null; allowed: relative, rrf"),
            ({"text_weight": -1}, "text_weight: is -1; allowed: 0 to 100"),
            ({"vector_weight": None}, "vector_weight: is null; allowed: 0 to 100"),
            (
                {"vector_weight": 0, "text_weight": 0},
                "vector_weight: is 0, and so is text_weight; allowed: one of them",
            ),
            ({"threshold": 0.5}, "threshold: is on cosine similarity; allowed: only with a query_embedding"),
        )
    ),
    ("similar_documents", {"id": None}, "id: is missing"),
    ("similar_documents", {"id": ""}, "id: is 0 bytes; allowed: 1 to 512 bytes in UTF-8"),
    ("similar_documents", {"top_k": 1001}, "top_k: is 1001; allowed: 1 to 1000"),
    ("recall_check", {"top_k": 1000}, "top_k: is 1000; allowed: 1 to 999"),
    ("recall_check", {"sample": 0}, "sample: is 0; allowed: 1 to 10000"),
    ("recall_check", {"sample": None}, "sample: is null; allowed: 1 to 10000"),
    ("recall_check", {"ef_search": 1001}, "ef_search: is 1001; allowed: 10 to 1000"),
    ("recall_check", {"seed": None}, "seed: is null; allowed: a whole number"),
]


def test_what_cannot_be_asked_is_refused_by_its_name_in_few_lines(analyst):
    for function, arguments, message in REFUSED:
        with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
            called(analyst, function, **(GIVEN[function] | arguments))
        said = refused.value.diag
        assert said.message_primary.startswith(message), (function, arguments)
        assert said.message_hint, (function, arguments)
        lines = said.context.splitlines()
        assert len(lines) <= 2, said.context
        assert max(map(len, lines)) <= 90, said.context


@pytest.mark.parametrize("function", GIVEN)
def test_the_most_that_may_be_asked_is_answered(analyst, function):
    most = 999 if function == "recall_check" else 1000
    assert called(analyst, function, **GIVEN[function], top_k=most)


def test_similar_documents_are_the_nearest_to_the_mean_of_the_chunks(analyst):
    expected = analyst.execute(
        "select d.id, max(1 - (d.embedding <=> m.embedding)) as similarity from documents d, "
        "(select avg(embedding) as embedding from documents where tenant_id = 'small' and id = 'd7') m "
        "where d.tenant_id = 'small' and d.id <> 'd7' group by d.id order by 2 desc, 1 limit 5"
    ).fetchall()
    rows = called(analyst, "similar_documents", tenant="small", id="d7", top_k=5)
    assert [(row["id"], row["similarity"]) for row in rows] == [(row["id"], row["similarity"]) for row in expected]
    assert all(row["title"] == f"T{row['id'][1:]}" for row in rows)


def test_recall_check_measures_what_the_walk_finds_and_that_it_walked(analyst):
    (wide,) = called(analyst, "recall_check", tenant="large", top_k=10, sample=20)
    (narrow,) = called(analyst, "recall_check", tenant="large", top_k=10, sample=20, ef_search=10)
    (small,) = called(analyst, "recall_check", tenant="small", top_k=10, sample=20)
    assert (wide["queries"], wide["walked"], small["walked"], small["recall"]) == (20, 20, 0, 1)
    assert 0.95 <= wide["recall"] <= 1
    assert narrow["least_recall"] <= narrow["recall"] <= wide["recall"] + 0.05
    assert wide["search_ms"] > 0 < wide["exact_ms"]


def plan_of(connection: psycopg.Connection, tenant: str, fragment: str, filter_: str = "true") -> list[dict[str, Any]]:
    """The nodes of the plan of a statement as the function runs it, under the analyst's policies."""
    fragments = dict(analysts.fragments())
    sql = fragments[fragment].replace("{order}", fragments["order full"]).replace("{score}", fragments["score"])
    sql = sql.replace("{dimensions}", str(DIMENSIONS)).replace("{conditions}", filter_)
    values = {
        "$14": "100",
        "$13": "1.0",
        "$12": "1.0",
        "$11": "100",
        "$10": "'otter'::text",
        "$6": "'-infinity'::float8",
        "$5": "40",
        "$4": "1000",
        "$3": "10",
        "$2": f"'{literal(vectors(1, 99)[0])}'::vector",
        "$1": f"'{tenant}'::text",
    }
    for parameter, value in values.items():
        sql = sql.replace(parameter, value)
    with connection.transaction():
        for name, value in scans.index_config(250, 40).items():
            connection.execute("select set_config(%s, %s, true)", (name, value))
        (row,) = connection.execute("explain (format json) " + sql).fetchall()
    return list(nodes(row["QUERY PLAN"][0]["Plan"]))


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def test_the_walk_orders_by_the_index_of_the_tenants_bucket(analyst):
    (bucket,) = analyst.execute("select hashtextextended('large', 0) & 15 as bucket").fetchall()
    plan = plan_of(analyst, "large", "nearest")
    walked = [node for node in plan if node.get("Index Name", "").startswith("documents_embedding_")]
    assert [node["Index Name"] for node in walked] == [f"documents_embedding_full_{bucket['bucket']:02}_idx"]
    assert "Order By" in walked[0]


def test_the_index_is_scanned_as_often_as_a_large_tenant_is_searched(analyst, owner):
    scanned = "select coalesce(sum(idx_scan), 0)::int as scans from pg_stat_user_indexes where indexrelname like 'documents_embedding%'"
    query = literal(vectors(1, 99)[0])
    analyst.execute("select pg_stat_force_next_flush()")
    before = owner.execute(scanned).fetchone()["scans"]
    for _ in range(7):  # past the five after which a prepared plan may become one for every tenant
        assert called(analyst, "search_documents", tenant="large", query_embedding=query)[0]["scan"] == "index"
    analyst.execute("select pg_stat_force_next_flush()")
    assert owner.execute(scanned).fetchone()["scans"] == before + 7


@pytest.mark.parametrize("kind", ["half", "binary"])
async def test_another_kind_of_index_needs_nothing_done(cluster, corpus, database, settings, analyst, owner, kind):
    indexes.change(
        cluster.url(corpus, local.OWNER), kind, oversampling=None, told=lambda *_: None, patience=0, keep=True
    )
    try:
        for mode in MODES:
            for name in ("plain", "threshold", "key", "documents", "narrow walk"):
                if askable(mode, REQUESTS[name]):
                    await agree(database, settings, analyst, "large", mode, REQUESTS[name])
        found = await agree(database, settings, analyst, "large", "vector", {})
        assert (found.scan.strategy, found.scan.kind) == ("index", kind)
    finally:
        owner.execute("update vector_indexes set state = 'retired' where state = 'active'")
        owner.execute("update vector_indexes set state = 'active' where kind = 'full'")

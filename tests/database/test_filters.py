"""The filter language in PostgreSQL: docs/filters.md cell by cell, and against an independent reading of it in Python."""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.psycopg import dialect

from app import filters
from tests.conftest import THOROUGH, Cluster, cloned

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "filters.md"
METADATA = sa.literal_column("metadata", JSONB)


@pytest.fixture(scope="module")
def plain_connection(cluster: Cluster, template: str) -> Iterator[psycopg.Connection]:
    """A connection to a real PostgreSQL, as its superuser."""
    with cloned(cluster, template) as name, psycopg.connect(cluster.url(name), autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def corpus(plain_connection: psycopg.Connection, contrib: bool) -> list[dict[str, Any]]:
    """Every metadata of the documentation, and enough other rows for the index to pay; `id` is the place in the list."""
    documents = [json.loads(text) for text in dict.fromkeys(metadata for metadata, _, _ in truth_table())]
    documents += [{"n": n, "lang": ["en", "de", "fr"][n % 3], "a": {"b": n}, "tags": ["x", n]} for n in range(3_000)]
    plain_connection.execute("CREATE TEMP TABLE corpus (tenant_id text, id int, metadata jsonb NOT NULL)")
    with plain_connection.cursor().copy("COPY corpus FROM STDIN") as copy:
        for number, document in enumerate(documents):
            copy.write_row(("acme", number, json.dumps(document)))
            copy.write_row(("other", number, json.dumps(document)))
    columns = "tenant_id, metadata" if contrib else "metadata"
    plain_connection.execute(f"CREATE INDEX corpus_gin ON corpus USING gin ({columns} jsonb_path_ops)")
    plain_connection.execute("ANALYZE corpus")
    plain_connection.execute("SET enable_seqscan = off")
    return documents


def truth_table() -> list[tuple[str, str, bool]]:
    """The cells of every table of the documentation whose first column is `metadata`: metadata, filter, whether it matches."""
    cells: list[tuple[str, str, bool]] = []
    header: list[str] = []
    for line in DOCUMENTATION.read_text().splitlines():
        row = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not row or not header:
            header = row if row and row[0] == "metadata" else []
        elif not re.fullmatch(r":?-+:?", row[0]):
            marks = zip(header[1:], row[1:], strict=True)
            cells += [(row[0].strip("`"), asked.strip("`"), {"✓": True, "·": False}[mark]) for asked, mark in marks]
    return cells


def sql(parsed: filters.Filter) -> str:
    return str(filters.clause(parsed, METADATA).compile(dialect=dialect()))


def verdicts(
    connection: psycopg.Connection, asked: dict[str, Any], documents: list[dict[str, Any]]
) -> list[bool | None]:
    """What the filter says of each document: true, false, or None where it leaks SQL's unknown."""
    parsed = filters.parse(asked)
    assert parsed is not None
    rows = connection.execute(
        f"SELECT {sql(parsed)} FROM unnest(CAST(%(documents)s AS JSONB[])) WITH ORDINALITY AS d(metadata, n) ORDER BY n",
        {"documents": [json.dumps(document) for document in documents], **filters.values(parsed)},
    )
    return [row[0] for row in rows]


def verdicts_in_sql(
    connection: psycopg.Connection, asked: dict[str, Any], documents: list[dict[str, Any]]
) -> list[bool | None]:
    """The same of the condition that the functions for analysts make of the filter."""
    (condition,) = connection.execute("SELECT metadata_condition(%s)", (json.dumps(asked),)).fetchone() or ("",)
    rows = connection.execute(
        f"SELECT {condition.replace('%', '%%')} FROM unnest(CAST(%s AS JSONB[])) WITH ORDINALITY AS documents(metadata, n) ORDER BY n",
        ([json.dumps(document) for document in documents],),
    )
    return [row[0] for row in rows]


def found(connection: psycopg.Connection, asked: dict[str, Any]) -> list[int]:
    """The documents of the corpus that pass."""
    parsed = filters.parse(asked)
    assert parsed is not None
    statement = f"SELECT id FROM corpus WHERE tenant_id = 'acme' AND {sql(parsed)} ORDER BY id"
    return [row[0] for row in connection.execute(statement, filters.values(parsed))]


# The language once more, read from docs/filters.md by somebody who has no SQL.

MISSING = object()


def expected(asked: dict[str, Any], document: dict[str, Any], keys: tuple[str, ...] = ()) -> bool:
    return all(holds(key, value, document, keys) for key, value in asked.items())


def holds(key: str, value: Any, document: dict[str, Any], keys: tuple[str, ...]) -> bool:
    if not key.startswith("$"):
        inner = (*keys, key)
        return expected(value, document, inner) if isinstance(value, dict) else same(look(document, inner), value)
    stored = look(document, keys) if keys else MISSING
    meanings = {
        "$and": lambda: all(expected(part, document, keys) for part in value),
        "$or": lambda: any(expected(part, document, keys) for part in value),
        "$not": lambda: not expected(value, document, keys),
        "$in": lambda: any(same(stored, candidate) for candidate in value),
        "$ne": lambda: not same(stored, value),
        "$exists": lambda: (stored is not MISSING) == value,
        "$gt": lambda: ordered(stored, value) and canonical(stored) > canonical(value),
        "$gte": lambda: ordered(stored, value) and canonical(stored) >= canonical(value),
        "$lt": lambda: ordered(stored, value) and canonical(stored) < canonical(value),
        "$lte": lambda: ordered(stored, value) and canonical(stored) <= canonical(value),
    }
    return meanings[key]()


def ordered(stored: Any, value: Any) -> bool:
    return stored is not MISSING and kind(stored) == kind(value)


def look(document: Any, keys: tuple[str, ...]) -> Any:
    head, tail = keys[0], keys[1:]
    return walk(document, (head, *tail)) if head in document else walk(document, (*head.split("."), *tail))


def walk(value: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def same(stored: Any, value: Any) -> bool:
    if stored is MISSING:
        return False
    held = stored if isinstance(stored, list) and not isinstance(value, list) else []
    return any(canonical(candidate) == canonical(value) for candidate in [stored, *held])


def kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return {int: "number", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}[
        type(value)
    ]


def canonical(value: Any) -> tuple[str, Any]:
    match kind(value):
        case "number":
            return "number", Decimal(repr(value))
        case "array":
            return "array", [canonical(item) for item in value]
        case "object":
            return "object", {key: canonical(item) for key, item in value.items()}
        case name:
            return name, value


KEYS = st.sampled_from(["a", "b", "a.b", "a.b.c", "0", "", ".", "é", "'; --", '"\\', "%s", "NULL", "{a,b}"])
NUMBERS = st.sampled_from([0, 1, 1.0, -1, -0.0, 0.1, 2**70, 2**70 + 1, 10**23, 1e23, 1e300, 5e-324]) | st.integers()
STRINGS = st.sampled_from(
    ["", "1", "a", "B", "Z", "é", "\uffff", "\U00010000", "true", "null", "%s", "'", '"', "\\", "{}"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | STRINGS
ARRAYS = st.recursive(
    st.lists(SCALARS, max_size=3),
    lambda inner: st.lists(SCALARS | inner | st.dictionaries(KEYS, inner, max_size=2), max_size=3),
    max_leaves=4,
)
VALUES = SCALARS | ARRAYS
METADATAS = st.dictionaries(
    KEYS, st.recursive(VALUES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=5), max_size=4
)
OPERANDS = {
    "$in": st.lists(VALUES, max_size=3) | st.lists(SCALARS, min_size=9, max_size=12),
    "$ne": VALUES,
    "$exists": st.booleans(),
    **dict.fromkeys(filters.COMPARISONS, NUMBERS | STRINGS),
}


@st.composite
def conditions(draw: st.DrawFn, level: int = 3, *, under_a_key: bool = False) -> dict[str, Any]:
    if under_a_key and (level == 0 or draw(st.booleans())):
        names = draw(st.lists(st.sampled_from(sorted(OPERANDS)), min_size=1, max_size=2, unique=True))
        return {name: draw(OPERANDS[name]) for name in names}
    inner = {"level": level - 1, "under_a_key": under_a_key}
    match draw(st.sampled_from(["keys", "keys", "$and", "$or", "$not"])) if level else "keys":
        case "keys":
            keys = draw(st.lists(KEYS, min_size=1, max_size=2, unique=True))
            return {
                key: draw(VALUES if not level else VALUES | conditions(level - 1, under_a_key=True)) for key in keys
            }
        case "$not":
            return {"$not": draw(conditions(**inner))}
        case name:
            return {name: draw(st.lists(conditions(**inner), min_size=1, max_size=3))}


@pytest.mark.parametrize(("metadata", "asked", "matches"), truth_table())
def test_a_cell_of_the_documented_truth_table(plain_connection, metadata, asked, matches):
    for said in (verdicts, verdicts_in_sql):
        assert said(plain_connection, json.loads(asked), [json.loads(metadata)]) == [matches]


def test_the_documented_truth_table_is_the_one_that_was_asked_for():
    stored = {metadata for metadata, _, _ in truth_table()}
    assert stored >= {"{}", '{"k": null}', '{"k": true}', '{"k": false}', '{"k": 0}', '{"k": 1}', '{"k": 1.0}'}
    assert stored >= {'{"k": "1"}', '{"k": ""}', '{"k": [1, "1"]}', '{"k": [[1]]}', '{"k": {"n": 1}}'}
    assert stored >= {'{"a.b": 1}', '{"a": {"b": 1}}', '{"a": {"b": 1}, "a.b": 2}'}
    text = " ".join(asked for _, asked, _ in truth_table())
    assert [name for name in filters.OPERATORS if f'"{name}"' not in text] == []


@settings(max_examples=300 * THOROUGH, deadline=None)
@given(asked=conditions(), documents=st.lists(METADATAS, min_size=1, max_size=12))
def test_any_filter_says_of_any_metadata_what_the_language_says(plain_connection, asked, documents):
    meant = [expected(asked, document) for document in documents]
    assert verdicts(plain_connection, asked, documents) == meant
    assert verdicts_in_sql(plain_connection, asked, documents) == meant


@settings(max_examples=60 * THOROUGH, deadline=None)
@given(asked=conditions())
def test_any_filter_finds_the_same_through_the_index(plain_connection, corpus, asked):
    assert found(plain_connection, asked) == [n for n, document in enumerate(corpus) if expected(asked, document)]


@pytest.mark.parametrize("asked", sorted({asked for _, asked, _ in truth_table()}))
def test_a_documented_filter_finds_the_same_through_the_index(plain_connection, corpus, asked):
    given_filter = json.loads(asked)
    passing = [n for n, document in enumerate(corpus) if expected(given_filter, document)]
    assert found(plain_connection, given_filter) == passing


@pytest.mark.parametrize(
    "asked",
    [
        {"lang": "en"},
        {"n": 1.0},
        {"n": None},
        {"a": {"b": 7}},
        {"a.b": 7},
        {"a.b": {"c": 7}},
        {"n": {"$in": [1, 2, 3]}},
        {"n": {"$in": list(range(100))}},
        {"a.b": {"$in": list(range(100))}},
        {"n": {"$in": [1, [2], "x"]}},
        {"tags": ["x", 7]},
        {"$or": [{"n": 1}, {"a.b": 2}]},
        {"n": 1, "lang": {"$ne": "en"}},
        {"$and": [{"n": {"$gt": 0}}, {"lang": "en"}]},
    ],
    ids=json.dumps,
)
def test_equality_is_an_index_condition(plain_connection, corpus, contrib, asked):
    parsed = filters.parse(asked)
    statement = f"EXPLAIN (FORMAT JSON) SELECT id FROM corpus WHERE tenant_id = 'acme' AND {sql(parsed)}"
    plan = plain_connection.execute(statement, filters.values(parsed)).fetchone()[0]
    scanned = [node["Index Cond"] for node in nodes(plan[0]["Plan"]) if node["Node Type"] == "Bitmap Index Scan"]
    assert scanned
    assert all(
        ("tenant_id" in condition or not contrib) and re.search("metadata @[>?]", condition) for condition in scanned
    )


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


def test_an_array_given_to_equality_does_not_match_arrays_that_only_contain_it(plain_connection):
    stored = [{"k": [1, 2]}, {"k": [2, 1]}, {"k": [1, 2, 3]}, {"k": [1, 1, 2]}, {"k": [[1, 2]]}, {"k": 1}]
    assert verdicts(plain_connection, {"k": [1, 2]}, stored) == [True, False, False, False, False, False]
    assert verdicts(plain_connection, {"k": []}, [{"k": []}, {"k": [1]}, {"k": {}}]) == [True, False, False]
    assert verdicts(plain_connection, {"k": [{"a": 1}]}, [{"k": [{"a": 1}]}, {"k": [{"a": 1, "b": 2}]}]) == [
        True,
        False,
    ]


def test_numbers_stay_exact(plain_connection):
    stored = [{"k": 2**64}, {"k": 2**64 + 1}, {"k": 10**400 + 1}]
    assert verdicts(plain_connection, {"k": 2**64}, stored) == [True, False, False]
    assert verdicts(plain_connection, {"k": {"$gt": 2**64}}, stored) == [False, True, True]
    assert verdicts(plain_connection, {"k": {"$gt": 10**400}}, stored) == [False, False, True]


def test_strings_are_ordered_by_code_point(plain_connection):
    stored = [{"k": text} for text in ("B", "a", "b", "é", "\uffff", "\U00010000")]
    assert verdicts(plain_connection, {"k": {"$gt": "a"}}, stored) == [False, False, True, True, True, True]
    assert verdicts(plain_connection, {"k": {"$lt": "\U00010000"}}, stored) == [True, True, True, True, True, False]


@pytest.mark.parametrize(
    "asked",
    [
        {"k": "x" * filters.MAX_STRING},
        {"k" * filters.MAX_KEY: 1},
        {"k": {"$in": [f"{n:050}" for n in range(filters.MAX_IN)]}},
        {"k": 10**filters.MAX_DIGITS - 1, "l": 1.7976931348623157e308, "m": 5e-324},
        {"$or": [{f"a.b.c.d.e.f.g.{n}": {"$gt": n}} for n in range(filters.MAX_CONDITIONS)]},
        {".".join("abcdefgh"): {"a": {"b": {"c": {"d": {"e": {"f": {"$in": [[[[[[[[[1]]]]]]]], *range(20)]}}}}}}}},
        {"." * 200: {"$gt": 1}},
    ],
    ids=["string", "key", "$in", "numbers", "conditions", "depth", "dots"],
)
def test_whatever_is_within_the_limits_runs(plain_connection, asked):
    assert verdicts(plain_connection, asked, [{}, {"k": 1}]) == [False, False]


def test_a_key_with_more_dots_than_metadata_is_deep_is_only_literal(plain_connection):
    key = ".".join("abcdefghi")
    assert verdicts(plain_connection, {key: 1}, [{key: 1}]) == [True]


def test_the_statement_runs_through_sqlalchemy_too(plain_connection):
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: plain_connection, poolclass=sa.StaticPool)
    asked = {"a.b": {"$in": [1, [2]], "$gt": 0}, "lang": {"$gte": "en", "$exists": True}, "n": {"$ne": None}}
    parsed = filters.parse(asked)
    documents = sa.select(sa.cast(sa.bindparam("document", type_=sa.Text), JSONB).label("metadata")).subquery()
    statement = sa.select(filters.clause(parsed, documents.c.metadata))
    with engine.connect() as connection:
        for document in ({"a": {"b": 1}, "lang": "fr"}, {"a": {"b": [2]}, "lang": "fr"}, {"lang": "en", "n": 1}):
            bound = {"document": json.dumps(document), **filters.values(parsed)}
            assert connection.scalar(statement, bound) == expected(asked, document)


@pytest.mark.parametrize(
    "text", ['"', "\\", 'a"b\\c', "\u0001\n\t", "é 🜁", "$", "@ == 1", "' or true --", "\u2028", "/*", "%s"]
)
@pytest.mark.parametrize("place", ["key", "value"])
def test_any_text_is_a_key_and_a_value_like_another(plain_connection, text, place):
    document = {text: 1} if place == "key" else {"k": text}
    others = [{"k": 1}, {"k": f"{text} "}, {}]
    key, value = next(iter(document.items()))
    for asked in ({"$and": [{key: value}]}, {key: {"$in": [value, "other"]}}):
        if key.startswith("$"):
            continue  # an operator, which parsing refuses
        assert verdicts(plain_connection, asked, [document, {key: [value]}, *others]) == [
            True,
            True,
            False,
            False,
            False,
        ]


@pytest.mark.parametrize("number", [0, 1, -1, 1.5, -2.5, 1e23, 1e-7, 10**30, 123456789012345678901234567890.0])
def test_any_number_is_found(plain_connection, number):
    assert verdicts(plain_connection, {"k": number}, [{"k": number}, {"k": [number]}, {"k": str(number)}]) == [
        True,
        True,
        False,
    ]

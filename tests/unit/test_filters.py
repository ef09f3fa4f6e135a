"""The filter language's reading half: what is refused and how that is said, and which filters share a statement."""

import math
import re
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.psycopg import dialect

from app import filters
from app.errors import BadInput

KNOWN = "$and, $exists, $gt, $gte, $in, $lt, $lte, $ne, $not, $or"
VALUE = "must be a string, number, true, false, null or array; for objects use $not and $or"
EMPTY = 'must be a condition with at least one key, like {"key": value}'


def parsed(asked: dict[str, Any]) -> filters.Filter:
    found = filters.parse(asked)
    assert found is not None
    return found


def sql(found: filters.Filter) -> str:
    return str(filters.clause(found, sa.column("metadata", JSONB)).compile(dialect=dialect()))


def placeholders(found: filters.Filter) -> set[str]:
    return set(re.findall(r"%\((\w+)\)s", sql(found)))


def within(value: Any, levels: int, key: str | None = None) -> Any:
    """The value inside so many arrays, or objects with this key."""
    for _ in range(levels):
        value = [value] if key is None else {key: value}
    return value


def test_no_condition_is_no_filter():
    assert filters.parse({}) is None


@pytest.mark.parametrize(
    ("asked", "field", "fault"),
    [
        ({"k": {"$foo": 1}}, "metadata.k.$foo", f"unknown operator '$foo'; known: {KNOWN}"),
        ({"$eq": 1}, "metadata.$eq", f"unknown operator '$eq'; known: {KNOWN}"),
        ({"$": 1}, "metadata.$", f"unknown operator '$'; known: {KNOWN}"),
        ({"a": {"b": {"$IN": []}}}, "metadata.a.b.$IN", f"unknown operator '$IN'; known: {KNOWN}"),
        ({"$gt": 1}, "metadata.$gt", 'belongs under a key, like {"key": {"$gt": 1}}'),
        ({"$in": [1]}, "metadata.$in", 'belongs under a key, like {"key": {"$gt": 1}}'),
        ({"$not": {"$ne": 1}}, "metadata.$not.$ne", 'belongs under a key, like {"key": {"$gt": 1}}'),
        ({"k": {}}, "metadata.k", EMPTY),
        ({"$not": {}}, "metadata.$not", EMPTY),
        ({"$not": [{"k": 1}]}, "metadata.$not", EMPTY),
        ({"$or": [{"k": 1}, {}]}, "metadata.$or[1]", EMPTY),
        ({"$and": [1]}, "metadata.$and[0]", EMPTY),
        ({"k": {"$or": ["x"]}}, "metadata.k.$or[0]", EMPTY),
        ({"$and": []}, "metadata.$and", "must be a list of at least one condition"),
        ({"$or": {"k": 1}}, "metadata.$or", "must be a list of at least one condition"),
        ({"k": {"$in": "x"}}, "metadata.k.$in", "must be a list of values"),
        ({"k": {"$in": [{"a": 1}]}}, "metadata.k.$in", VALUE),
        ({"k": {"$ne": {"a": 1}}}, "metadata.k.$ne", VALUE),
        ({"k": {"$exists": 1}}, "metadata.k.$exists", "must be true or false"),
        ({"k": {"$exists": None}}, "metadata.k.$exists", "must be true or false"),
        ({"k": {"$gt": True}}, "metadata.k.$gt", "must be a number or a string"),
        ({"k": {"$gte": None}}, "metadata.k.$gte", "must be a number or a string"),
        ({"k": {"$lt": [1]}}, "metadata.k.$lt", "must be a number or a string"),
        ({"k": {"$lte": {"n": 1}}}, "metadata.k.$lte", "must be a number or a string"),
        ({"$or": [{"k": 1}, {"a": {"b": {"$gt": None}}}]}, "metadata.$or[1].a.b.$gt", "must be a number or a string"),
        ({"k": object()}, "metadata.k", VALUE),
        ({"k": math.nan}, "metadata.k", "must be a finite number of at most 1,000 digits"),
        ({"k": [[-math.inf]]}, "metadata.k", "must be a finite number of at most 1,000 digits"),
        ({"k": {"$gt": math.inf}}, "metadata.k.$gt", "must be a finite number of at most 1,000 digits"),
        ({"k": -(10**1000)}, "metadata.k", "must be a finite number of at most 1,000 digits"),
        ({"k": {"$lt": 10**5000}}, "metadata.k.$lt", "must be a finite number of at most 1,000 digits"),
        ({"k": "a\0b"}, "metadata.k", "has a NUL character, which PostgreSQL cannot store"),
        ({"k": {"$gt": "\0"}}, "metadata.k.$gt", "has a NUL character, which PostgreSQL cannot store"),
        ({"k": {"$in": ["\ud800"]}}, "metadata.k.$in", "has a lone surrogate, which is no Unicode text"),
        ({"a": {"\0": 1}}, "metadata.a", "has a NUL character, which PostgreSQL cannot store"),
        ({"\udfff": 1}, "metadata", "has a lone surrogate, which is no Unicode text"),
        ({"$\ud800": 1}, "metadata", "has a lone surrogate, which is no Unicode text"),
        ({"k": [{"\0": 1}]}, "metadata.k", "has a NUL character, which PostgreSQL cannot store"),
        ({"k": [{"a": {"b": "\0"}}]}, "metadata.k", "has a NUL character, which PostgreSQL cannot store"),
        ({"k" * 257: 1}, "metadata", "has a key of 257 characters; allowed: 256"),
        ({"a": {"b": [{"k" * 257: 1}]}}, "metadata.a.b", "has a key of 257 characters; allowed: 256"),
        ({"k": "é" * 4097}, "metadata.k", "is too long a string; allowed: 8,192 bytes"),
        ({"k": {"$lte": "x" * 8193}}, "metadata.k.$lte", "is too long a string; allowed: 8,192 bytes"),
        ({"k": {"$in": [0] * 1001}}, "metadata.k.$in", "has 1,001 values; allowed: 1,000"),
        ({"k": within(1, 9)}, "metadata.k", "is nested too deep; allowed: 8 levels"),
        ({"k": [within(1, 8, "a")]}, "metadata.k", "is nested too deep; allowed: 8 levels"),
        (within(1, 9, "a"), "metadata" + 8 * ".a", "is nested too deep; allowed: 8 objects inside each other"),
        (
            within({"a": 1}, 8, "$not"),
            "metadata" + 8 * ".$not",
            "is nested too deep; allowed: 8 objects inside each other",
        ),
        ({f"k{n}": n for n in range(65)}, "metadata.k64", "is one condition too many; allowed: 64 in a filter"),
        (
            {"$or": [{"k": {"$gt": 1, "$lt": 2}}] * 33},
            "metadata.$or[32].k.$gt",
            "is one condition too many; allowed: 64 in a filter",
        ),
        (
            {"k": {"$in": ["x" * 8192] * 1000}},
            "metadata.k.$in",
            "makes the filter too large; allowed: 1,000,000 characters, keys included",
        ),
        (
            {"a" * 256: {"b" * 256: {"c" * 256: {"d" * 256: {"$in": list(range(1000))}}}}},
            "metadata." + ".".join(letter * 256 for letter in "abcd") + ".$in",
            "makes the filter too large; allowed: 1,000,000 characters, keys included",
        ),
    ],
)
def test_what_is_refused(asked, field, fault):
    with pytest.raises(BadInput) as refusal:
        filters.parse(asked)
    assert (refusal.value.field, refusal.value.fault) == (field, fault)


def test_messages_start_with_what_the_caller_calls_the_filter():
    with pytest.raises(BadInput, match=r"^filter\.k\.\$exists: must be true or false$"):
        filters.parse({"k": {"$exists": 0}}, "filter")


@pytest.mark.parametrize("asked", [within(1, 1000, "a"), {"k": within(1, 1000)}, within({"a": 1}, 1000, "$not")])
def test_depth_is_refused_before_it_can_exhaust_the_stack(asked):
    with pytest.raises(BadInput, match="nested too deep"):
        filters.parse(asked)


def test_whatever_is_within_the_limits_is_accepted():
    assert parsed(within(1, 8, "a"))
    assert parsed(within(within(1, 8), 8, "a"))
    assert parsed({f"k{n}": {"$ne": "é" * 4096} for n in range(64)})
    assert parsed({"k" * 256: 10**1000 - 1, "k": {"$in": list(range(1000))}})
    assert parsed({"": 1, ".": 2, "a..b": 3})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"lang": "en"}, {"year": 2020}),
        ({"lang": "en"}, {"lang": None}),
        ({"lang": "en"}, {"lang": {"$in": ["de", 1, True]}}),
        ({"a": {"b": 1}}, {"c": {"d": 1}}),
        ({"a.b": 1}, {"c.d": {"$in": [1, [2]]}}),
        ({"k": [1]}, {"l": ["x", [2]]}),
        ({"k": {"$in": list(range(10))}}, {"l": {"$in": list(range(1000))}}),
        ({"k": -1}, {"l": {"$in": ["x", -2]}}),
        ({"a": {"b": {"$gt": 1}}}, {"c": {"d": {"$gt": 2.5}}}),
        ({"$not": {"k": 1}}, {"k": {"$ne": 2}}),
        ({"a": 1, "b": 2}, {"$and": [{"c": 3}, {"d": 4}]}),
    ],
)
def test_filters_of_one_shape_share_a_statement(one, other):
    first, second = parsed(one), parsed(other)
    assert filters.shape(first) == filters.shape(second)
    assert hash(filters.shape(first)) == hash(filters.shape(second))
    assert sql(first) == sql(second)
    assert filters.values(first).keys() == filters.values(second).keys()
    assert filters.values(first) != filters.values(second)


@pytest.mark.parametrize(
    "shapes",
    [
        [{"k": 1}, {"k": -1}, {"k": [1]}, {"a.b": 1}, {"a.b.c": 1}, {"k": {"$ne": 1}}, {"k": {"$exists": True}}],
        [{"k": {name: operand}} for name in filters.COMPARISONS for operand in (1, "1")],
        [{"k": {"$in": list(range(filters.HASHED_FROM - less))}} for less in (0, 1)],
        [{"$and": [{"a": 1}, {"b": 1}]}, {"$or": [{"a": 1}, {"b": 1}]}, {"$not": {"a": 1, "b": 1}}],
    ],
)
def test_other_statements_are_other_shapes(shapes):
    assert len({filters.shape(parsed(asked)) for asked in shapes}) == len(shapes)
    assert len({sql(parsed(asked)) for asked in shapes}) == len(shapes)


def test_parameters_are_numbered_and_are_json_text_or_plain_text():
    assert filters.values(parsed({"lang": "en", "year": {"$gt": 2019}, "a.b": {"$lt": "é"}})) == {
        "f0": '$ ? (@."lang" == "en")',
        "f1": "year",
        "f2": "2019",
        "f3": "a.b",
        "f4": "a",
        "f5": "b",
        "f6": "é",
    }


def test_the_statement_names_every_parameter_and_no_other():
    asked = {"a.b": {"$in": [1, [2]], "$gt": 0, "$lt": "x", "$exists": False}, "$or": [{"k": 1}, {"$not": {"l": "m"}}]}
    assert placeholders(parsed(asked)) == filters.values(parsed(asked)).keys()


def test_strings_are_ordered_by_code_point_whatever_the_database_collates_by():
    assert 'COLLATE "C") >= ' in sql(parsed({"k": {"$gte": "x"}}))


def test_the_clause_stays_whole_when_its_text_is_put_beside_a_tenant():
    assert sql(parsed({"$or": [{"k": 1}, {"l": 1}]})).startswith("(")


def test_parsing_keeps_nothing_of_an_operand_in_the_statement():
    marked = "Zq7"
    asked = {
        f"{marked}.{marked}": {"$in": [marked, [marked]], "$gt": marked, "$exists": True},
        marked: {marked: marked},
    }
    assert marked not in sql(parsed(asked))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*filters.OPERATORS, "a", "a.b", "$x"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
)


@given(st.dictionaries(st.sampled_from([*filters.OPERATORS, "a", "a.b"]) | st.text(max_size=3), JSON, max_size=3))
def test_any_json_is_either_refused_by_name_or_a_statement(asked):
    try:
        found = filters.parse(asked)
    except BadInput as refusal:
        said = refusal
    else:
        assert (found is None) == (asked == {})
        assert found is None or filters.values(found).keys() == placeholders(found)
        return
    assert said.field.startswith("metadata")
    assert str(said).encode()

"""The metadata filter language of `POST /search`: parsed once, compiled to SQL that holds no text of the user's.

docs/filters.md defines the language cell by cell. A parsed filter is a condition that names its parameters, and beside
it their values: filters of one shape share one statement. Every condition is true or false for every document, never
unknown, so that `$ne` and `$not` are exact negations.
"""

import json
import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ColumnElement
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, JSONPATH

from app.errors import BadInput

MAX_CONDITIONS = 64
MAX_DEPTH = 8  # objects inside each other in a filter; levels of an array that is given as a value
MAX_KEY = 256  # characters
MAX_STRING = 8_192  # bytes in UTF-8
MAX_DIGITS = 1_000
MAX_IN = 1_000
MAX_TOTAL = 1_000_000  # characters of all parameters: `$in` repeats the keys it stands under for each of its values
HASHED_FROM = 9  # constants from which on PostgreSQL looks `= ANY (…)` up in a hash table
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
COMPARISONS = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}

Jsonb = ColumnElement[Any]
Clause = ColumnElement[bool]
KeyPath = tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]
"""Where a value stands, in names of parameters that hold keys: the first of the heads that is present, then the tail."""

Condition = tuple[Any, ...]
"""One of these; what is in angle brackets is the name of a parameter.

("and" | "or", (condition, …))            all of them, at least one of them
("not", condition)
("matches", <jsonpath>)                   a key has one of some scalars, or an array that holds one
("contains", <documents>)                 the metadata contains one of these objects
("equals", path, <scalars>, <arrays>)     the value is a scalar or an array given, or an array that holds such a scalar
("exists", path)                          the key is there, be its value null
("number" | "string", "$gt", path, <operand>)     order, among values of this type only
"""


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter: its condition, and the parameters the condition names."""

    condition: Condition
    parameters: Mapping[str, str | list[str]]


def parse(metadata: Mapping[str, Any], field: str = "metadata") -> Filter | None:
    """The filter that a request's `metadata` object means; None for the empty one, which every document passes.

    `field` is what the object is called in messages. Raises BadInput naming the faulty place (`metadata.year.$gt`) for
    unknown operators, operands of the wrong type and everything over the limits above.
    """
    if not metadata:
        return None
    reading = _Reading()
    return Filter(_condition(metadata, _Place(field), reading), reading.parameters)


def shape(parsed: Filter) -> Hashable:
    """Equal for filters whose clauses are the same SQL; keys and values are not part of it."""
    return parsed.condition


def values(parsed: Filter) -> dict[str, Any]:
    """The clause's parameters by name: keys, strings and JSON as text, several JSON values as a list of text."""
    return dict(parsed.parameters)


def clause(parsed: Filter, column: ColumnElement[Any]) -> ColumnElement[bool]:
    """The filter over a jsonb column that is an object and not null; its parameters carry names, but no values yet."""
    # Callers put the text beside a tenant's predicate: an OR must not get out.
    return sa.Grouping(_clause(parsed.condition, column))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the request something stands, and which keys of the metadata it is about."""

    where: str
    keys: tuple[str, ...] = ()
    depth: int = 1


@dataclass(slots=True)
class _Reading:
    """What has been read of one filter so far."""

    conditions: int = 0
    size: int = 0
    parameters: dict[str, str | list[str]] = field(default_factory=dict)

    def condition(self, place: _Place) -> None:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            raise BadInput(place.where, f"is one condition too many; allowed: {MAX_CONDITIONS} in a filter")
        if not place.keys:
            raise BadInput(place.where, 'belongs under a key, like {"key": {"$gt": 1}}')

    def parameter(self, place: _Place, value: str | list[str]) -> str:
        self.size += len(value) if isinstance(value, str) else sum(map(len, value))
        if self.size > MAX_TOTAL:
            raise BadInput(place.where, f"makes the filter too large; allowed: {MAX_TOTAL:,} characters, keys included")
        name = f"f{len(self.parameters)}"
        self.parameters[name] = value
        return name

    def path(self, place: _Place) -> KeyPath:
        heads = tuple(tuple(self.parameter(place, key) for key in head) for head in _heads(place.keys[0]))
        return heads, tuple(self.parameter(place, key) for key in place.keys[1:])


def _condition(given: Any, place: _Place, reading: _Reading) -> Condition:
    if not isinstance(given, Mapping) or not given:
        raise BadInput(place.where, 'must be a condition with at least one key, like {"key": value}')
    if place.depth > MAX_DEPTH:
        raise BadInput(place.where, f"is nested too deep; allowed: {MAX_DEPTH} objects inside each other")
    parts: list[Condition] = []
    for key, value in given.items():
        _check_key(key, place.where)
        where = f"{place.where}.{key}"
        if key.startswith("$"):
            if key not in OPERATORS:
                raise BadInput(where, f"unknown operator '{key}'; known: {', '.join(sorted(OPERATORS))}")
            parts.append(OPERATORS[key](key, value, replace(place, where=where), reading))
        elif isinstance(value, Mapping):
            parts.append(_condition(value, _Place(where, (*place.keys, key), place.depth + 1), reading))
        else:
            parts.append(_equality([value], _Place(where, (*place.keys, key)), reading))
    return parts[0] if len(parts) == 1 else ("and", tuple(parts))


def _junction(name: str, operand: Any, place: _Place, reading: _Reading) -> Condition:
    if not isinstance(operand, list) or not operand:
        raise BadInput(place.where, "must be a list of at least one condition")
    parts = [(_Place(f"{place.where}[{i}]", place.keys, place.depth + 1), part) for i, part in enumerate(operand)]
    return name[1:], tuple(_condition(part, at, reading) for at, part in parts)


def _negation(name: str, operand: Any, place: _Place, reading: _Reading) -> Condition:
    deeper = replace(place, depth=place.depth + 1)
    return "not", (_equality([operand], place, reading) if name == "$ne" else _condition(operand, deeper, reading))


def _in(_: str, operand: Any, place: _Place, reading: _Reading) -> Condition:
    if not isinstance(operand, list):
        raise BadInput(place.where, "must be a list of values")
    if len(operand) > MAX_IN:
        raise BadInput(place.where, f"has {len(operand):,} values; allowed: {MAX_IN:,}")
    return _equality(operand, place, reading)


def _exists(_: str, operand: Any, place: _Place, reading: _Reading) -> Condition:
    reading.condition(place)
    if not isinstance(operand, bool):
        raise BadInput(place.where, "must be true or false")
    present = "exists", reading.path(place)
    return present if operand else ("not", present)


def _comparison(name: str, operand: Any, place: _Place, reading: _Reading) -> Condition:
    reading.condition(place)
    if isinstance(operand, bool) or not isinstance(operand, int | float | str):
        raise BadInput(place.where, "must be a number or a string")
    _check_value(operand, place.where)
    kind, text = ("string", operand) if isinstance(operand, str) else ("number", _json(operand))
    return kind, name, reading.path(place), reading.parameter(place, text)


def _equality(given: list[Any], place: _Place, reading: _Reading) -> Condition:
    reading.condition(place)
    for value in given:
        _check_value(value, place.where)
    scalars = [_json(value) for value in given if not isinstance(value, list)]
    arrays = [_json(value) for value in given if isinstance(value, list)]
    heads = _heads(place.keys[0])
    signed = any(scalar.startswith("-") for scalar in scalars)
    if heads == ((place.keys[0],),) == (place.keys,) and 0 < len(scalars) < HASHED_FROM and not arrays and not signed:
        # One search of an index, where containment in an object with the scalar or with it in an array would be two. A
        # path looks into arrays on its way to an inner key, and a sign makes of a number what no index serves.
        key = _json(place.keys[0])
        tests = " || ".join(f"@.{key} == {scalar}" for scalar in scalars)
        return "matches", reading.parameter(place, f"$ ? ({tests})")
    forms = [form for scalar in scalars for form in (scalar, f"[{scalar}]")] + arrays
    around = [_around((*head, *place.keys[1:])) for head in heads]
    documents = [opening + form + closing for opening, closing in around for form in forms]
    contains = "contains", reading.parameter(place, documents)
    # Containment, which an index can serve, is equality but for arrays and where a dot leaves two keys to ask. Many values
    # get the second condition for its hash table: 1,000 against 20,000 unindexed rows took 2.6 s without it, 0.1 s with.
    if not arrays and len(heads) == 1 and len(scalars) < HASHED_FROM:
        return contains
    equals = "equals", reading.path(place), reading.parameter(place, scalars), reading.parameter(place, arrays)
    return "and", (contains, equals)


OPERATORS: Mapping[str, Callable[[str, Any, _Place, _Reading], Condition]] = {
    **dict.fromkeys(COMPARISONS, _comparison),
    **dict.fromkeys(("$and", "$or"), _junction),
    **dict.fromkeys(("$ne", "$not"), _negation),
    "$exists": _exists,
    "$in": _in,
}


def _heads(key: str) -> tuple[tuple[str, ...], ...]:
    """The ways to read a top-level key: as it is; a dotted one else as a path, unless too long for any metadata."""
    parts = tuple(key.split("."))
    return ((key,), parts) if 1 < len(parts) <= MAX_DEPTH else ((key,),)


def _around(keys: tuple[str, ...]) -> tuple[str, str]:
    """What JSON text has before and after a value that stands under these keys, and nothing beside it."""
    return "".join(f"{{{_json(key)}: " for key in keys), "}" * len(keys)


def _check_key(key: str, where: str) -> None:
    if len(key) > MAX_KEY:
        raise BadInput(where, f"has a key of {len(key):,} characters; allowed: {MAX_KEY}")
    _check_text(key, where)


def _check_value(value: Any, where: str, depth: int = 0) -> None:
    if isinstance(value, list) or (isinstance(value, dict) and depth > 0):
        if depth == MAX_DEPTH:
            raise BadInput(where, f"is nested too deep; allowed: {MAX_DEPTH} levels")
        for key in value if isinstance(value, dict) else ():
            _check_key(key, where)
        for item in value.values() if isinstance(value, dict) else value:
            _check_value(item, where, depth + 1)
    elif isinstance(value, str):
        if _check_text(value, where) > MAX_STRING:
            raise BadInput(where, f"is too long a string; allowed: {MAX_STRING:,} bytes")
    elif isinstance(value, int | float):
        if not abs(value) < 10**MAX_DIGITS:
            raise BadInput(where, f"must be a finite number of at most {MAX_DIGITS:,} digits")
    elif value is not None:
        raise BadInput(where, "must be a string, number, true, false, null or array; for objects use $not and $or")


def _check_text(text: str, where: str) -> int:
    """The text's size in bytes."""
    if "\0" in text:
        raise BadInput(where, "has a NUL character, which PostgreSQL cannot store")
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise BadInput(where, "has a lone surrogate, which is no Unicode text") from None


def _clause(condition: Condition, column: Jsonb) -> Clause:  # noqa: PLR0911  one for each kind of condition
    # The planner takes a CASE for half of the rows. Of the bare tests inside, on which it has no statistics, it would
    # expect next to none or all, and choose its plan for that.
    match condition:
        case "and" | "or" as name, parts:
            join = sa.and_ if name == "and" else sa.or_
            return join(*(_clause(part, column) for part in parts))
        case "not", inner:
            return sa.not_(_clause(inner, column))
        case "matches", path:
            return column.bool_op("@?")(_bound(path, JSONPATH()))
        case "contains", documents:
            return column.bool_op("@>")(_any_of(documents))
        case "exists", path:
            return sa.case((_value(path, column).is_(None), sa.false()), else_=sa.true())
        case "equals", path, scalars, arrays:
            value = _value(path, column)
            within = sa.or_(value == _any_of(arrays), value.bool_op("@>")(_any_of(scalars)))
            return _by_type(value, "array", within, sa.func.coalesce(value == _any_of(scalars), sa.false()))
        case "number" | "string" as kind, name, path, operand:
            value = _value(path, column)
            text = sa.collate(value.op("#>>", return_type=sa.Text())(sa.literal_column("'{}'")), "C")
            left, right = (value, JSONB()) if kind == "number" else (text, sa.Text())
            return _by_type(value, kind, COMPARISONS[name](left, _bound(operand, right)), sa.false())
    raise AssertionError(condition)


def _value(path: KeyPath, column: Jsonb) -> Jsonb:
    """The jsonb at a path, SQL NULL where there is none. `->` with a text looks into objects only, never into arrays."""
    heads = [_descend(column, head) for head in path[0]]
    return _descend(sa.func.coalesce(*heads, type_=JSONB) if len(heads) > 1 else heads[0], path[1])


def _descend(value: Jsonb, keys: tuple[str, ...]) -> Jsonb:
    return reduce(lambda at, key: at.op("->", return_type=JSONB())(_bound(key, sa.Text())), keys, value)


def _by_type(value: Jsonb, kind: str, test: Clause, other: Clause) -> Clause:
    """The test for values of this type, the other for the rest and where there is none; known as long as these are."""
    return sa.case((sa.func.jsonb_typeof(value) == sa.literal_column(f"'{kind}'"), test), else_=other)


def _bound(name: str, kind: sa.types.TypeEngine[Any]) -> Jsonb:
    return sa.cast(sa.bindparam(name, type_=sa.Text), kind)


def _any_of(name: str) -> Jsonb:
    return sa.any_(sa.cast(sa.bindparam(name, type_=ARRAY(sa.Text)), ARRAY(JSONB)))

"""What msgspec and Litestar find wrong with a request, in our words: the field, the fault and what is allowed."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from msgspec import inspect

from app.errors import BadInput, TooLarge

NO_BODY = BadInput("", "the body is empty; allowed: a JSON object")
_AT = " - at `$"
_PATH = re.compile(r"((?:\.\w{1,60}|\[(?:\d{1,9}|\.\.\.)\]){0,20})`", re.ASCII)
"""Behind _AT where msgspec says it; the name of a field that is not known may hold anything."""
_NAMED = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_KIND = re.compile(r"Expected `(.+)`, got `(.+)`")
_VALUE = re.compile(r"Invalid enum value (.+)", re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LOOKED_THROUGH = 1_000_000
"""Bytes of a body up to which a lone surrogate is looked for: 16 MB of numbers would take two seconds."""
MOST_PARTS, MOST_VALUES = 1_000_000, 5_000_000
"""Lists, objects and names, and values of a body: as Python objects they take twenty times what they take as JSON."""
_BLOCK = 1_000_000
_HALF = re.compile("[\ud800-\udfff]")
"""Of a surrogate pair. JSON can spell one half alone; UTF-8 and PostgreSQL cannot."""
_STEP = re.compile(r"\[[^\]]*\]|[^.\[\]]+")
_MOMENT = "an ISO 8601 moment with time zone, such as 2026-01-31T12:00:00Z"
_WORDS = {
    "array": "a list",
    "bool": "true or false",
    "datetime": _MOMENT,
    "float": "a number",
    "int": "a whole number",
    "null": "null",
    "object": "an object",
    "str": "a text",
}
_OTHER = {
    "Invalid RFC3339 encoded datetime": f"is not a moment; allowed: {_MOMENT}",
    "Number out of range": "is out of range; allowed: numbers of double precision",
}


def decoded(body: bytes, kind: Any, name: str = "body") -> Any:
    """The body as `kind`, a Struct; no value is taken for one of another type. Raises BadInput naming the field at fault.

    `name`: what the whole is called.
    """
    _check_parts(body, name)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _named(str(error), kind, name) from None
    except msgspec.DecodeError as error:
        if (field := _halved(body)) is not None:
            fault = "has a lone surrogate; allowed: valid Unicode"
            raise BadInput(field, fault if field else f"the {name} {fault}") from None
        hint = ", or a text in it has a lone surrogate" if _SURROGATE.search(body) else ""
        raise BadInput("", f"the {name} is not JSON: {error}{hint}; allowed: a JSON object") from None
    except UnicodeDecodeError:
        raise BadInput("", f"the {name} is not UTF-8; allowed: JSON in UTF-8") from None
    except RecursionError:
        raise BadInput("", f"the {name} is nested too deeply; allowed: JSON of a few levels") from None


def worded(said: str, limits: str = "") -> str:
    """What msgspec finds wrong with a single value, as a fault. `limits`: further words about what is allowed."""
    kinds = _KIND.fullmatch(said)
    if kinds is None:
        return _OTHER.get(said, f"is not allowed: {said[:200]}")
    allowed = " or ".join(_WORDS.get(each, each) for each in kinds[1].split(" | "))
    found = "a number with a fraction" if kinds[2] == "float" else _WORDS.get(kinds[2], kinds[2])
    return f"is {found}; allowed: {allowed}{limits}"


def _check_parts(body: bytes, name: str) -> None:
    if len(body) <= MOST_PARTS:
        return
    if sum(map(body.count, (b"[", b"{", b":"))) <= MOST_PARTS and body.count(b",") <= MOST_VALUES:
        return
    counts = _marks(body)
    parts, values = sum(counts[ord(mark)] for mark in "[{:"), counts[ord(",")]
    for found, most, what in (
        (parts, MOST_PARTS, "lists, objects and names"),
        (values, MOST_VALUES, "values"),
    ):
        if found > most:
            raise TooLarge("", f"the {name} has {found:,} {what}; allowed: at most {most:,}")


def _marks(body: bytes) -> list[int]:
    """How often each byte stands in JSON outside of its texts, where there may be any number of them."""
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    counts, within = np.zeros(256, np.int64), np.uint8(0)
    for start in range(0, len(body), _BLOCK):
        block = np.frombuffer(body, np.uint8, min(_BLOCK, len(body) - start), start)
        quotes = np.cumsum(block == ord('"'), dtype=np.uint8) + within
        counts += np.bincount(block[quotes % 2 == 0], minlength=256)
        within = quotes[-1]
    return counts.tolist()


def _halved(body: bytes) -> str | None:
    """The path of the first text with half a surrogate pair in a body that is JSON otherwise; None where none is found.

    msgspec says of such a body that it is truncated, or malformed, and not where. An object with such a key is named itself.
    """
    if len(body) > _LOOKED_THROUGH or not _SURROGATE.search(body):
        return None
    try:
        whole = json.loads(body)
    except (ValueError, RecursionError):
        return None
    waiting = [("", whole)]
    while waiting:
        path, value = waiting.pop()
        texts = (value,) if isinstance(value, str) else value if isinstance(value, dict) else ()
        if any(map(_HALF.search, texts)):
            return path
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        steps = [(step, each) for step, each in inner if isinstance(each, (str, dict, list))]
        for step, each in reversed(steps):
            named = f"{path}[{step}]" if isinstance(step, int) else f"{path}.{step[:60]}" if path else step[:60]
            waiting.append((named, each))
    return None


def _named(message: str, kind: Any, name: str) -> BadInput:
    said, _, tail = message.rpartition(_AT)
    whole = _NAMED.fullmatch(said) or not said.startswith("Object ")  # else the name of a field looks like a path
    if said and whole and (found := _PATH.fullmatch(tail)):
        path = found[1].removeprefix(".")
    else:
        said, path = message, ""
    types = list(_types(_struct(kind) if isinstance(kind, type) else inspect.type_info(kind)))
    for step in _STEP.findall(path):
        types = [each for one in types for each in _inner(one, step)]
    if named := _NAMED.fullmatch(said):
        field = ".".join(filter(None, (path, named[2][:60])))
        if named[1] == "missing required":
            return BadInput(field, "is missing; it is required")
        known = ", ".join(field.name for one in types if isinstance(one, inspect.StructType) for field in one.fields)
        return BadInput(field, f"there is no such field; allowed: {known}")
    if not path:
        return BadInput("", f"the {name} {worded(said)}")
    if (value := _VALUE.fullmatch(said)) and (allowed := [repr(each) for one in types for each in _values(one)]):
        others = [_WORDS["bool"]] if any(isinstance(one, inspect.BoolType) for one in types) else []
        return BadInput(path, f"is {value[1][:80]}; allowed: {', '.join(allowed + others)}")
    return BadInput(path, worded(said, "".join(map(_limits, types))))


@lru_cache(maxsize=100)
def _struct(kind: type) -> inspect.Type:
    """Half a millisecond; a stream may have a faulty line every twelve bytes."""
    return inspect.type_info(kind)


def _types(info: Any) -> Iterator[Any]:
    """The types a value may have: unions taken apart, metadata only kept around numbers."""
    match info:
        case inspect.UnionType(types=types):
            for each in types:
                yield from _types(each)
        case inspect.Metadata(type=inspect.IntType() | inspect.FloatType()):
            yield info
        case inspect.Metadata(type=inner):
            yield from _types(inner)
        case _:
            yield info


def _inner(info: Any, step: str) -> Iterator[Any]:
    match info:
        case inspect.StructType(fields=fields):
            for field in fields:
                if field.name == step:
                    yield from _types(field.type)
        case inspect.ListType(item_type=item) if step[0] == "[":
            yield from _types(item)


def _values(info: Any) -> tuple[Any, ...]:
    return info.values if isinstance(info, inspect.LiteralType) else ()


def _limits(info: Any) -> str:
    limits = (info.extra_json_schema or {}).get("extra", {}) if isinstance(info, inspect.Metadata) else {}
    return f" from {limits['minimum']:,} to {limits['maximum']:,}" if limits else ""

"""What msgspec and Litestar find wrong with a request, in our words: the field, the fault and what is allowed."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from app.errors import BadInput

NO_BODY = BadInput("", "the body is empty; allowed: a JSON object")
_SAID = re.compile(r"(.*?)(?: - at `\$(.*)`)?", re.DOTALL)
_NAMED = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_KIND = re.compile(r"Expected `(.+)`, got `(.+)`")
_STEP = re.compile(r"\[|[^.\[\]]+")
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
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _named(str(error), kind, name) from None
    except msgspec.DecodeError as error:
        raise BadInput("", f"the {name} is not JSON: {error}; allowed: a JSON object") from None
    except UnicodeDecodeError:
        raise BadInput("", f"the {name} is not UTF-8; allowed: JSON in UTF-8") from None
    except RecursionError:
        raise BadInput("", f"the {name} is nested too deeply; allowed: JSON of a few levels") from None


def worded(said: str, limits: str = "") -> str:
    """What msgspec finds wrong with a single value, as a fault. `limits`: further words about what is allowed."""
    kinds = _KIND.fullmatch(said)
    if kinds is None:
        return _OTHER.get(said, f"is not allowed: {said}")
    allowed = " or ".join(_WORDS.get(each, each) for each in kinds[1].split(" | "))
    found = "a number with a fraction" if kinds[2] == "float" else _WORDS.get(kinds[2], kinds[2])
    return f"is {found}; allowed: {allowed}{limits}"


def _named(message: str, kind: Any, name: str) -> BadInput:
    said, path = _SAID.fullmatch(message).groups()  # type: ignore[union-attr]  # it matches every text
    path = (path or "").removeprefix(".")
    types = list(_types(inspect.type_info(kind)))
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
    return BadInput(path, worded(said, "".join(map(_limits, types))))


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
        case inspect.ListType(item_type=item) if step == "[":
            yield from _types(item)


def _limits(info: Any) -> str:
    limits = (info.extra_json_schema or {}).get("extra", {}) if isinstance(info, inspect.Metadata) else {}
    return f" from {limits['minimum']:,} to {limits['maximum']:,}" if limits else ""

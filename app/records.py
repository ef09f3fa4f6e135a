"""Records as documents: lines of JSONL and rows of CSV, their fields mapped by `--field TARGET=SOURCE`."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec
from msgspec import Struct

from app import formats
from app.drafts import Draft
from app.errors import BadInput
from app.formats import Damaged

MAX_LINE = 64_000_000
"""Bytes of a line or row: a text of 10 MB, escaped, fits."""

TARGETS = ("id", "content", "title", "doc_type", "metadata", "created_at", "embedding")
Others = Literal["refuse", "ignore", "metadata"]
_SAMPLE = 1 << 16
_BUFFER = 1 << 20
_SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class Mapped:
    """Which field becomes what: target to the sources it is made of. Fields that no target names are `others`."""

    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)
    others: Others = "refuse"


class Record(Struct, kw_only=True):
    """A record in our terms."""

    id: str
    content: str
    title: str | None = None
    doc_type: str | None = None
    metadata: dict[str, Any] = {}
    created_at: datetime | None = None
    embedding: list[float] | None = None


def mapping(given: Iterable[str], others: Others = "refuse") -> Mapped:
    """The mapping of `TARGET=SOURCE` options. A target named twice is made of both, an empty line between them."""
    sources: dict[str, list[str]] = {}
    for option in given:
        target, found, source = option.partition("=")
        known = target in TARGETS or (target.startswith("metadata.") and target != "metadata.")
        if not found or not source or not known:
            allowed = f"TARGET=FIELD with one of {', '.join(TARGETS)}, metadata.KEY as TARGET"
            raise BadInput("--field", f"{option!r} is not allowed; allowed: {allowed}")
        sources.setdefault(target, []).append(source)
        if len(sources[target]) > 1 and target != "content":
            raise BadInput("--field", f"{target} is named twice; allowed for content only")
    return Mapped(sources, others)


def draft(values: dict[str, Any], mapped: Mapped) -> Draft:
    """The document a record stands for. Raises BadInput naming the field at fault."""
    made, metadata = _mapped(values, mapped)
    for name in ("id", "content"):
        if made.get(name) in (None, ""):
            source = "+".join(mapped.sources.get(name, [name]))
            raise BadInput(source, f"is missing or empty, and is the {name}; --field {name}=FIELD names another")
    made = _normalised(made)
    if metadata:
        made["metadata"] = made.get("metadata", {}) | metadata
    try:
        record = msgspec.convert(made, Record)
    except msgspec.ValidationError as error:
        said, _, path = str(error).partition(" - at `$.")
        raise BadInput(path.rstrip("`"), said) from None
    return Draft(**msgspec.structs.asdict(record))


def _mapped(values: dict[str, Any], mapped: Mapped) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record's values by target, and single keys of metadata. Raises BadInput for a field that is in neither."""
    used: set[str] = set()
    made: dict[str, Any] = {}
    for target, sources in mapped.sources.items():
        found = [value for source in sources if (value := _value(values, source, used)) is not None]
        if found:
            made[target] = "\n\n".join(map(str, found)) if len(found) > 1 else found[0]
    prefix = "metadata."
    metadata = {name.removeprefix(prefix): made.pop(name) for name in [*made] if name.startswith(prefix)}
    for name in values.keys() - used:
        if name in TARGETS and name not in mapped.sources:
            made[name] = values[name]
        elif mapped.others == "metadata":
            metadata[name] = values[name]
        elif mapped.others == "refuse":
            fault = "there is no such field; map it with --field, or say --other-fields ignore or metadata"
            raise BadInput(name[:60], fault)
    return made, metadata


def _value(values: Mapping[str, Any], source: str, used: set[str]) -> Any:
    """The field of this name; else, where the name has dots, what lies at this path."""
    if source in values:
        used.add(source)
        return values[source]
    first, dotted, rest = source.partition(".")
    inner = values.get(first)
    if not dotted or not isinstance(inner, dict):
        return None
    used.add(first)
    return _value(inner, rest, set())


def _normalised(made: dict[str, Any]) -> dict[str, Any]:
    """What other programs write, as we have it: whole numbers as ids, days as moments, JSON in a cell of a table."""
    identity = made["id"]
    if isinstance(identity, int) and not isinstance(identity, bool):
        made["id"] = str(identity)
    for name in ("title", "doc_type", "created_at", "metadata", "embedding"):
        if made.get(name) in (None, ""):
            made.pop(name, None)
    if "created_at" in made:
        moment = formats.moment_of(made["created_at"])
        if moment is None:
            raise BadInput(
                "created_at", f"{str(made['created_at'])[:40]!r} is no moment; allowed: ISO 8601, or seconds since 1970"
            )
        made["created_at"] = moment
    for name, kind in (("metadata", dict), ("embedding", list)):
        if isinstance(made.get(name), str):
            try:
                made[name] = msgspec.json.decode(made[name], type=kind)
            except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
                raise BadInput(name, f"is not JSON of a{'n object' if kind is dict else ' list of numbers'}") from None
    return made


@dataclass(slots=True)
class Place:
    """A record's document or the fault with it, the number of its line, and the bytes it took."""

    line: int
    size: int
    made: Draft | BadInput


def jsonl(stream: io.RawIOBase, mapped: Mapped) -> Iterator[Place]:
    """A document for each line that is not blank."""
    number = 0
    with io.BufferedReader(stream, _BUFFER) as lines:
        while line := lines.readline(MAX_LINE):
            number += 1
            size = len(line)
            if size == MAX_LINE and not line.endswith(b"\n"):
                while (more := lines.readline(MAX_LINE)) and not more.endswith(b"\n"):
                    size += len(more)
                yield Place(number, size + len(more), BadInput("", f"is longer than {MAX_LINE:,} bytes"))
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Place(number, size, _decoded(line, mapped))


def _decoded(line: bytes, mapped: Mapped) -> Draft | BadInput:
    try:
        return draft(msgspec.json.decode(line, type=dict[str, Any]), mapped)
    except BadInput as fault:
        return fault
    except msgspec.ValidationError:
        return BadInput("", "is not a JSON object")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadInput("", f"is not JSON: {error}")


def table(
    stream: io.RawIOBase, mapped: Mapped, *, separator: str | None = None, encoding: str | None = None
) -> Iterator[Place | str]:
    """A document for each row below the first, which names the fields; first the encoding, where it is a guess.

    `separator` None: whichever of comma, semicolon, tab and bar is most frequent in the first line. Raises Damaged.
    """
    buffered = io.BufferedReader(stream, _BUFFER)
    sample = buffered.peek(_SAMPLE)[:_SAMPLE]
    encoding, guessed = formats.sniffed(sample, encoding)
    if guessed:
        yield guessed
    if encoding == "utf-8":
        encoding = "utf-8-sig"
    head = sample.decode(encoding, "replace").partition("\n")[0]
    separator = separator or max(_SEPARATORS, key=head.count)
    csv.field_size_limit(MAX_LINE)
    with io.TextIOWrapper(buffered, encoding, newline="") as lines:
        rows = csv.reader(lines, delimiter=separator)
        try:
            yield from _rows(rows, mapped)
        except UnicodeDecodeError as error:
            name = encoding.removesuffix("-sig").upper()
            raise Damaged(f"is not {name} behind line {rows.line_num}; give --encoding") from error
        except csv.Error as error:
            raise Damaged(f"cannot be read behind line {rows.line_num}: {error}") from error


def _rows(rows: Any, mapped: Mapped) -> Iterator[Place]:
    names = next(rows, None)
    if not names:
        raise Damaged("is empty; allowed: a first row that names the fields")
    if len(set(names)) < len(names):
        raise Damaged("its first row names a field twice")
    line = rows.line_num
    for row in rows:
        line, before = rows.line_num, line
        if any(row):
            size = sum(len(cell.encode()) for cell in row) + len(row)
            yield Place(before + 1, size, _row(names, row, mapped))


def _row(names: list[str], row: list[str], mapped: Mapped) -> Draft | BadInput:
    if len(row) != len(names):
        return BadInput("", f"has {len(row)} cells; the first row names {len(names)} fields")
    try:
        return draft({name: cell for name, cell in zip(names, row, strict=True) if cell}, mapped)
    except BadInput as fault:
        return fault

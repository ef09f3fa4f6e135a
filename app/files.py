"""Files and folders as documents, one after the other: a folder of a million files is walked, never listed whole."""

import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msgspec import Struct

from app import formats, records
from app.drafts import Draft, is_blank
from app.errors import BadInput
from app.formats import Damaged, Page
from app.records import Mapped

MAX_FILE = 256_000_000
"""Bytes of a file that is one document; what is in it may be 10 MB of text."""

REMEMBERED = 1_000_000
"""Records whose ids are remembered, to tell when another has one of them: 76 MB, and never more."""

STDIN = Path("-")


class Unreadable(Struct):
    """A file, or a record of one, that is no document, and why. `id`: the document it would have been, where known."""

    path: str
    fault: str
    id: str | None = None


class Noted(Struct):
    """Something about a file that a person should know."""

    path: str
    note: str


class Step(NamedTuple):
    """The next document, or what stands in its place; and how many bytes of its file are behind it."""

    item: Draft | Unreadable | Noted
    size: int


class File(NamedTuple):
    """A file with the id its document gets; `folder` is what it was found in."""

    path: Path
    id: str


@dataclass(frozen=True)
class Reading:
    """How files become documents. `doc_type` and `metadata` go to every document that says nothing of its own about them."""

    doc_type: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    marks: Mapping[str, Any] = field(default_factory=dict)
    """Metadata that no document overrules."""
    prefix: str = ""
    format: str | None = None
    encoding: str | None = None
    separator: str | None = None
    date_from: Literal["mtime", "none"] = "none"
    mapped: Mapped = field(default_factory=Mapped)


class Other(NamedTuple):
    """A file of a kind that is not read, by the ending of its name."""

    ending: str


def check(given: Sequence[Path], reading: Reading) -> None:
    """Raise BadInput for a path that does not exist or is a file of another kind."""
    for path in given:
        if path == STDIN:
            if sys.stdin is None:  # its number may be that of something else by now
                raise BadInput("-", "standard input is closed")
            if reading.format is None:
                raise BadInput("-", f"standard input needs --format; allowed: {', '.join(formats.FORMATS)}")
            if reading.format not in formats.RECORDS and not reading.prefix:
                raise BadInput("-", "one document from standard input needs its id, as --prefix")
        elif not path.exists():
            raise BadInput(str(path), "does not exist")
        elif path.is_file() and reading.format is None and path.suffix.lower() not in formats.SUFFIXES:
            kinds = ", ".join(formats.SUFFIXES)
            raise BadInput(str(path), f"is of a kind that is not read; allowed: {kinds}, or any with --format")
    if given.count(STDIN) > 1:
        raise BadInput("-", "is given twice")


def walk(given: Sequence[Path], reading: Reading) -> Iterator[File | Unreadable | Other]:
    """Every file to read: its id is its path below the folder it was found in, else its name.

    Files and folders whose name begins with a dot are left out, and so are symbolic links to folders, which may go round
    in circles. A file whose id an earlier path has given away comes as Unreadable, one of a kind that is not read as Other.
    """
    for position, path in enumerate(given):
        found = _below(path, reading) if path.is_dir() else [path]
        for each in found:
            if isinstance(each, Unreadable | Other):
                yield each
                continue
            identity = each.relative_to(path).as_posix() if each != path else path.name
            twin = next((one for one in given[:position] if _names(one, identity, reading)), None)
            if twin is not None:
                yield Unreadable(str(each), f"would have the same id as a file of {twin}: {identity!r}")
            else:
                yield File(each, reading.prefix + identity)


def _names(given: Path, identity: str, reading: Reading) -> bool:
    """Whether the file or folder given earlier has a document of this id."""
    if not given.is_dir():
        return given.name == identity
    return (given / identity).is_file() and _read(Path(identity).name, reading)


def _below(folder: Path, reading: Reading) -> Iterator[Path | Unreadable | Other]:
    """The files in a folder and below, in the order of their names."""
    try:
        with os.scandir(folder) as entries:
            names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        yield Unreadable(str(folder), error.strerror or str(error))
        return
    for name, is_folder in names:
        if name.startswith("."):
            continue
        path = folder / name
        if is_folder:
            yield from _below(path, reading)
        elif path.is_file():
            yield path if _read(name, reading) else Other(os.path.splitext(name)[1].lower())  # noqa: PTH122  as in _read


def _read(name: str, reading: Reading) -> bool:
    return reading.format is not None or os.path.splitext(name)[1].lower() in formats.SUFFIXES  # noqa: PTH122  a path object costs more than the file


def total(given: Sequence[Path], reading: Reading) -> int | None:
    """Bytes of all files; None where standard input is among them."""
    if STDIN in given:
        return None
    size = 0
    for found in walk(given, reading):
        if isinstance(found, File):
            try:
                size += found.path.stat().st_size
            except OSError:
                continue
    return size


def drafts(given: Sequence[Path], reading: Reading) -> Iterator[Step]:
    """A draft for each file of one document and for each record of the others, in the order of the files."""
    read: set[int] = set()
    others: Counter[str] = Counter()
    for found in walk(given, reading):
        if isinstance(found, Unreadable):
            yield Step(found, 0)
        elif isinstance(found, Other):
            others[found.ending or "no ending"] += 1
        else:
            yield from _steps(found, reading, read)
    if others:
        told = ", ".join(f"{ending} {count:,}" for ending, count in others.most_common(5))
        more = ", …" if len(others) > 5 else ""
        folders = ", ".join(str(path) for path in given if path.is_dir())
        note = f"also: {others.total():,} files of kinds that are not read ({told}{more}); --format reads every file as one kind"
        yield Step(Noted(folders, note), 0)


def _steps(file: File, reading: Reading, read: set[int]) -> Iterator[Step]:
    kind = reading.format or formats.SUFFIXES[file.path.suffix.lower()]
    name = "standard input" if file.path == STDIN else str(file.path)
    try:
        with open(0 if file.path == STDIN else file.path, "rb", buffering=0, closefd=file.path != STDIN) as stream:
            if kind in formats.RECORDS:
                yield from _records(stream, kind, name, reading, read)
            else:
                yield from _document(stream, kind, name, file, reading)
    except OSError as error:
        yield Step(Unreadable(name, error.strerror or str(error), file.id), 0)
    except Damaged as fault:
        yield Step(Unreadable(name, str(fault), None if kind in formats.RECORDS else file.id), 0)


def _document(stream: io.FileIO, kind: str, name: str, file: File, reading: Reading) -> Iterator[Step]:
    data = _whole(stream)
    page = formats.READERS[kind](data, reading.encoding)
    if is_blank(page.content):
        raise Damaged("is empty or white space only")
    if page.guessed:
        yield _guessed(name, page.guessed)
    identity = reading.prefix if file.path == STDIN else file.id
    draft = _draft(identity, page)
    if draft.created_at is None and reading.date_from == "mtime" and file.path != STDIN:
        draft = replace(draft, created_at=datetime.fromtimestamp(os.fstat(stream.fileno()).st_mtime, UTC))
    yield Step(_labelled(draft, reading), len(data))


def _guessed(name: str, encoding: str) -> Step:
    return Step(Noted(name, f"is not UTF-8 and was taken for {encoding}; --encoding says another"), 0)


def _whole(stream: io.FileIO) -> bytes:
    parts = []
    size = 0
    while part := stream.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > MAX_FILE:
            raise Damaged(f"is larger than {MAX_FILE:,} bytes")
    return b"".join(parts)


def _draft(identity: str, page: Page) -> Draft:
    return Draft(identity, page.content, page.title, page.doc_type, page.metadata, page.created_at)


def _records(stream: io.FileIO, kind: str, name: str, reading: Reading, read: set[int]) -> Iterator[Step]:
    """`read`: hashes of the ids of records before. Of two records of one id the later one is kept, and noted."""
    if kind == "jsonl":
        places: Iterable[records.Place | str] = records.jsonl(stream, reading.mapped)
    else:
        separator = reading.separator or ("\t" if kind == "tsv" else None)
        places = records.table(stream, reading.mapped, separator=separator, encoding=reading.encoding)
    for place in places:
        if isinstance(place, str):
            yield _guessed(name, place)
        elif isinstance(place.made, BadInput):
            yield Step(Unreadable(f"{name}:{place.line}", str(place.made)), place.size)
        else:
            draft = replace(place.made, id=reading.prefix + place.made.id)
            digest = hash(draft.id)
            if digest in read:
                yield Step(Noted(f"{name}:{place.line}", f"replaces an earlier record of the same id: {draft.id!r}"), 0)
            if len(read) < REMEMBERED:
                read.add(digest)
            yield Step(_labelled(draft, reading), place.size)


def _labelled(draft: Draft, reading: Reading) -> Draft:
    return replace(
        draft,
        doc_type=draft.doc_type or reading.doc_type,
        metadata={**reading.metadata, **draft.metadata, **reading.marks},
    )

"""Files and folders as documents: text, Markdown and JSONL."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from app.drafts import Draft
from app.errors import BadInput

TEXT = frozenset({".txt", ".md", ".markdown", ".rst"})
JSONL = frozenset({".jsonl", ".ndjson"})


class Line(Struct, forbid_unknown_fields=True, kw_only=True):
    """One line of a JSONL file."""

    id: str
    content: str
    title: str | None = None
    doc_type: str | None = None
    metadata: dict[str, Any] = {}
    created_at: datetime | None = None
    embedding: list[float] | None = None


class Unreadable(Struct):
    """A file, or a line of one, that is no document, and why."""

    path: str
    fault: str


def paths(given: Iterable[Path]) -> list[tuple[Path, str]]:
    """Every file to read, with the id its document gets: its path below the folder it was found in, else its name.

    Raises BadInput for a path that does not exist or is a file of another kind.
    """
    found: dict[str, Path] = {}
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT | JSONL and p.is_file())
            named = [(p, p.relative_to(path).as_posix()) for p in inside if not _hidden(p.relative_to(path))]
        elif not path.exists():
            raise BadInput(str(path), "does not exist")
        elif path.suffix.lower() not in TEXT | JSONL:
            raise BadInput(str(path), f"is of a kind that is not read; allowed: {', '.join(sorted(TEXT | JSONL))}")
        else:
            named = [(path, path.name)]
        for file, identity in named:
            if found.setdefault(identity, file) != file:
                raise BadInput(str(file), f"would have the same id as {found[identity]}: {identity!r}")
    return [(file, identity) for identity, file in found.items()]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def drafts(
    files: Iterable[tuple[Path, str]], *, doc_type: str | None = None, metadata: dict[str, Any] | None = None
) -> Iterator[Draft | Unreadable]:
    """A draft for each text file and for each line of a JSONL file; what cannot be read comes as Unreadable.

    `doc_type` and `metadata` go to every document that says nothing of its own about them.
    """
    for path, identity in files:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            yield Unreadable(str(path), error.strerror or str(error))
            continue
        except UnicodeDecodeError as error:
            yield Unreadable(str(path), f"is not UTF-8 at byte {error.start}")
            continue
        for draft in _lines(path, text) if path.suffix.lower() in JSONL else [Draft(identity, text)]:
            if isinstance(draft, Draft):
                yield replace(
                    draft, doc_type=draft.doc_type or doc_type, metadata={**(metadata or {}), **draft.metadata}
                )
            else:
                yield draft


def _lines(path: Path, text: str) -> Iterator[Draft | Unreadable]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield Draft(**msgspec.structs.asdict(msgspec.json.decode(line, type=Line)))
            except (msgspec.DecodeError, UnicodeEncodeError) as error:
                yield Unreadable(f"{path}:{number}", str(error))

"""Judged queries: a JSONL file, or a folder in the BEIR layout, which brings its documents along."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from app import tenants
from app.drafts import Draft
from app.errors import BadInput

CORPUS, QUERIES = "corpus.jsonl", "queries.jsonl"
QRELS = ("qrels.tsv", "qrels/test.tsv")
HEADER = "query-id\t"

Line = TypeVar("Line", bound=Struct)


class JudgedLine(Struct, forbid_unknown_fields=True, kw_only=True):
    """One line of a JSONL file of judged queries."""

    query: str
    expected_doc_ids: list[str]
    tenant_id: str | None = None


class CorpusLine(Struct, kw_only=True):
    """One document of a BEIR folder; other fields are left unread."""

    id: str = msgspec.field(name="_id")
    title: str = ""
    text: str


class QueryLine(Struct, kw_only=True):
    """One query of a BEIR folder; other fields are left unread."""

    id: str = msgspec.field(name="_id")
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """A query and its judgements: `grades` by document, relevant above 0, at least one of them. `origin`: file and line."""

    id: str
    text: str
    tenant_id: str
    grades: Mapping[str, int]
    origin: str


@dataclass(frozen=True, slots=True)
class Collection:
    """Judged queries, and the documents to search, where they come along, which all belong to `tenant_id`."""

    questions: list[Question]
    tenant_id: str | None = None
    drafts: Sequence[Draft] = ()


def read(path: Path, tenant_id: str | None = None) -> Collection:
    """The judged queries of a JSONL file or a BEIR folder; queries without a relevant document are left out.

    `tenant_id`: of a file's lines that name none; of a folder's documents, where None is made from the folder's name.
    Raises BadInput, naming file and line, for what cannot be read and for judgements about ids that do not exist.
    """
    if tenant_id is not None:
        tenants.check(tenant_id, "--tenant")
    collection = _folder(path, tenant_id) if path.is_dir() else Collection(list(_file(path, tenant_id)))
    if not collection.questions:
        raise BadInput(str(path), "has no judged query; allowed: at least one with a relevant document")
    return collection


def _file(path: Path, tenant_id: str | None) -> Iterator[Question]:
    for origin, line in _parsed(path, JudgedLine):
        tenant = line.tenant_id or tenant_id
        if tenant is None:
            raise BadInput(origin, "has no tenant_id; allowed: one in every line, or --tenant for those without")
        tenants.check(tenant, f"{origin}: tenant_id")
        if line.expected_doc_ids:
            yield Question(
                origin.rpartition(":")[2], line.query, tenant, dict.fromkeys(line.expected_doc_ids, 1), origin
            )


def _folder(path: Path, tenant_id: str | None) -> Collection:
    tenant = tenant_id or "eval-" + re.sub(r"[^A-Za-z0-9_.:-]+", "-", path.resolve().name)[:100]
    corpus = _by_id(path / CORPUS, CorpusLine)
    queries = _by_id(path / QUERIES, QueryLine)
    qrels = next((path / name for name in QRELS if (path / name).is_file()), path / QRELS[0])
    grades: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_text(qrels).split("\n"), 1):
        origin = f"{qrels}:{number}"
        if not line.strip() or (number == 1 and line.startswith(HEADER)):
            continue
        query, document, grade = _judgement(origin, line)
        for identity, known, file in ((query, queries, QUERIES), (document, corpus, CORPUS)):
            if identity not in known:
                raise BadInput(origin, f"{identity!r} is not in {file}; allowed: ids that are")
        if grades.setdefault(query, {}).setdefault(document, grade) != grade:
            raise BadInput(origin, f"judges document {document!r} for query {query!r} again, and otherwise")
    return Collection(
        [
            Question(identity, line.text, tenant, grades[identity], origin)
            for identity, (origin, line) in queries.items()
            if any(grade > 0 for grade in grades.get(identity, {}).values())
        ],
        tenant,
        [
            Draft(identity, f"{line.title}\n{line.text}" if line.title else line.text)
            for identity, (_, line) in corpus.items()
        ],
    )


def _judgement(origin: str, line: str) -> tuple[str, str, int]:
    try:
        query, document, grade = line.split("\t")
        return query, document, int(grade)
    except ValueError:
        raise BadInput(
            origin, f"{line[:80]!r} is no judgement; allowed: query, document and a whole number, with tabs between"
        ) from None


def _by_id(path: Path, kind: type[Any]) -> dict[str, tuple[str, Any]]:
    lines: dict[str, tuple[str, Any]] = {}
    for origin, line in _parsed(path, kind):
        if lines.setdefault(line.id, (origin, line))[0] != origin:
            raise BadInput(origin, f"has the _id of {lines[line.id][0]}: {line.id!r}")
    return lines


def _parsed(path: Path, kind: type[Line]) -> Iterator[tuple[str, Line]]:
    """Each line that is not blank, with its place."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", msgspec.json.decode(line, type=kind)
            except (msgspec.DecodeError, UnicodeEncodeError) as error:
                raise BadInput(f"{path}:{number}", str(error)) from None


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(str(path), f"cannot be read: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}:{number}", "is not UTF-8") from None

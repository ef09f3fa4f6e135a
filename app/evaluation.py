"""Judged queries -> recall@k, MRR, nDCG@k, similarity and latency of the search as it stands.

Queries come with the documents they should find, from a JSONL file or from a folder in the BEIR layout. A search finds
chunks and judgements name documents, so a document is ranked by its best chunk. The measures are trec_eval's.
"""

import math
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct
from sqlalchemy import ARRAY, Text, bindparam, func, select

from app import search, tenants
from app.database import Database, rendered
from app.drafts import Draft
from app.embedding import Embedder
from app.errors import BadInput, TimedOut
from app.settings import Settings
from app.tables import tenant_sources

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


class Judged(NamedTuple):
    """One query's result. `found`: cosine similarity of each document's best chunk by id, best first, at most k."""

    question: Question
    found: Mapping[str, float]
    milliseconds: float


def recall(ranking: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """Share of the relevant documents that are among the first k."""
    relevant = {document for document, grade in grades.items() if grade > 0}
    return len(relevant.intersection(ranking[:k])) / len(relevant)


def reciprocal_rank(ranking: Sequence[str], grades: Mapping[str, int]) -> float:
    """1 / rank of the first relevant document, 0 where there is none."""
    return next((1 / rank for rank, document in enumerate(ranking, 1) if grades.get(document, 0) > 0), 0.0)


def ndcg(ranking: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """Discounted gain of the first k over that of the best possible k; a document's gain is its grade, as in trec_eval."""
    best = sorted(grades.values(), reverse=True)
    return _discounted([grades.get(document, 0) for document in ranking[:k]]) / _discounted(best[:k])


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1) if gain > 0)


def metric_names(k: int) -> tuple[str, str, str, str]:
    """Of what `metrics` gives; each is the better the higher."""
    return (f"recall@{k}", "mrr", f"ndcg@{k}", "mean_similarity")


def metrics(judged: Judged, k: int) -> dict[str, float]:
    """One query's figures. `mean_similarity` is over the documents found, 0 where there is none."""
    ranking, grades = list(judged.found), judged.question.grades
    similarity = float(np.mean(list(judged.found.values()))) if ranking else 0.0
    values = (recall(ranking, grades, k), reciprocal_rank(ranking, grades), ndcg(ranking, grades, k), similarity)
    return dict(zip(metric_names(k), values, strict=True))


def mean_metrics(judged: Sequence[Judged], k: int) -> dict[str, float]:
    """The mean of each figure over the queries, of which there is at least one."""
    each = [metrics(one, k) for one in judged]
    return {name: float(np.mean([one[name] for one in each])) for name in metric_names(k)}


def latency(judged: Sequence[Judged]) -> dict[str, float]:
    """Milliseconds a query took, embedding included: median and 95th percentile."""
    p50, p95 = np.percentile([one.milliseconds for one in judged], [50, 95])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


async def run(
    database: Database, embedder: Embedder, settings: Settings, questions: Sequence[Question], k: int
) -> AsyncGenerator[Judged, None]:
    """Search for one question after the other. Raises BadInput, naming its line, for one the search refuses."""
    for question in questions:
        begun = time.perf_counter()
        vector = await search.question_vector(embedder, question.text, question.origin)
        found = await nearest_documents(database, settings, question.tenant_id, vector, k)
        yield Judged(question, found, 1000 * (time.perf_counter() - begun))


async def nearest_documents(
    database: Database, settings: Settings, tenant_id: str, embedding: npt.NDArray[np.float32], k: int
) -> dict[str, float]:
    """The k documents with the most similar chunks, best first, and those similarities; fewer if there are not k.

    Raises TimedOut where a search would be short.
    """
    top_k = 2 * k
    while True:
        hits, scan, _ = await search.search(database, settings, tenant_id, embedding, top_k=top_k)
        if not scan.full:
            raise TimedOut(
                "a search ran into its time limit, figures would be too low; raise PGRECALL_STATEMENT_TIMEOUT"
            )
        best: dict[str, float] = {}
        for hit in hits:
            best.setdefault(hit.id, hit.similarity)
        if len(best) >= k or len(hits) < top_k:
            return dict(islice(best.items(), k))
        top_k *= 2


class Stored(NamedTuple):
    """What a tenant has: how many documents in all, and which of those asked for."""

    documents: int
    ids: set[str]


_tenant = bindparam("tenant_id", type_=Text)
_COUNT = rendered(select(func.count().label("documents")).where(tenant_sources.c.tenant_id == _tenant))
_IDS = rendered(
    select(tenant_sources.c.id).where(
        tenant_sources.c.tenant_id == _tenant, tenant_sources.c.id == func.any(bindparam("ids", type_=ARRAY(Text)))
    )
)


async def stored(database: Database, tenant_id: str, ids: Sequence[str]) -> Stored:
    """Which of `ids` the tenant has, and how many documents it has."""
    statements = [
        _COUNT.with_values("count", {"tenant_id": tenant_id}),
        _IDS.with_values("ids", {"tenant_id": tenant_id, "ids": list(ids)}),
    ]
    (count,), rows = await database.fetch(tenant_id, statements, primary=True)
    return Stored(count["documents"], {row["id"] for row in rows})


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

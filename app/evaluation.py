"""Judged queries -> recall@k, MRR, nDCG@k, similarity and latency of the search as it stands, and of other settings.

A search finds chunks and judgements name documents, so a document is ranked by its best chunk. The measures are
trec_eval's.
"""

import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace
from sqlalchemy import ARRAY, Text, bindparam, func, select
from sqlalchemy.dialects.postgresql import distinct_on

from app import layout, rerank, search, statistics, text
from app.database import Database
from app.embedding import Embedder
from app.errors import TimedOut
from app.judgements import Question
from app.model import Model
from app.questions import vector as question_vector
from app.rerank import Reranker
from app.search import Mode, Options, Scan
from app.settings import Settings
from app.statements import rendered
from app.statistics import Hits, Interval
from app.tables import Vector, tenant_documents, tenant_sources

MODES: tuple[Mode, ...] = ("vector", "text", "hybrid")
"""How a query can be searched; results are kept by mode."""

EF_SEARCH = (20, 40, 100, 200, 400)
"""What the index is tried with, besides the ef_search that is set."""

OVERSAMPLING = (1.0, 2.0, 4.0, 10.0)
"""What a quantised index is tried with, besides the oversampling that is set."""

ALL_ROWS = 2_000_000_000
"""As PGRECALL_EXACT_ROWS: every search is exact."""


class Judged(NamedTuple):
    """One query's result. `found`: cosine similarity of each document's best chunk by id, best first, at most k.

    A search by words alone measures no similarity: None stands there.
    """

    question: Question
    found: Mapping[str, float | None]
    milliseconds: float
    scan: Scan = Scan("exact")

    @property
    def similarities(self) -> list[float]:
        """Those that were measured, in the order of the documents."""
        return [similarity for similarity in self.found.values() if similarity is not None]

    @property
    def expected(self) -> list[str]:
        """The relevant documents."""
        return [document for document, grade in self.question.grades.items() if grade > 0]


class Ranked(NamedTuple):
    """Documents found, as in `Judged`, and how the search was done."""

    found: dict[str, float | None]
    scan: Scan


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


def metric_names(k: int, mode: str = "vector") -> tuple[str, ...]:
    """Of what `metrics` gives for a mode; each is the better the higher. Searches by words measure no similarity."""
    return (f"recall@{k}", "mrr", f"ndcg@{k}", *(() if mode == "text" else ("mean_similarity",)))


def metrics(judged: Judged, k: int) -> dict[str, float]:
    """One query's figures. `mean_similarity` is over the documents found, 0 where there is none."""
    ranking, grades = list(judged.found), judged.question.grades
    similarity = float(np.mean(judged.similarities)) if judged.similarities else 0.0
    values = (recall(ranking, grades, k), reciprocal_rank(ranking, grades), ndcg(ranking, grades, k), similarity)
    return dict(zip(metric_names(k, judged.scan.strategy), values, strict=False))


def mean_metrics(judged: Sequence[Judged], k: int) -> dict[str, float]:
    """The mean of each figure over the queries, of which there is at least one."""
    each = [metrics(one, k) for one in judged]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def mean_intervals(judged: Sequence[Judged], k: int) -> dict[str, Interval]:
    """The 95 % interval of each mean; none for a single query."""
    if len(judged) < 2:
        return {}
    each = [metrics(one, k) for one in judged]
    values = np.array([list(one.values()) for one in each])
    return dict(zip(each[0], statistics.intervals(values), strict=True))


def latency(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of what each query took."""
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


def scans(done: Sequence[Scan]) -> dict[str, int]:
    """How many searches were exact from the start, answered by the index, walked it and were completed exactly, or by words."""
    kinds = Counter("completed" if scan.completed else scan.strategy for scan in done)
    ways = ("exact", "index", "completed", *(("text",) if kinds["text"] else ()))
    return {kind: kinds[kind] for kind in ways}


def hits(one: Judged) -> Hits:
    """The similarities of a query's relevant and other documents found."""
    relevant: list[float] = []
    irrelevant: list[float] = []
    for document, similarity in one.found.items():
        if similarity is not None:
            (relevant if one.question.grades.get(document, 0) > 0 else irrelevant).append(similarity)
    return Hits(relevant, irrelevant, len(one.expected))


async def run(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    questions: Sequence[Question],
    k: int,
    modes: Sequence[Mode] = MODES,
    reranker: Reranker | None = None,
) -> AsyncGenerator[dict[Mode, Judged], None]:
    """Search for one question after the other, in each mode. Raises BadInput, naming its line, for one the search refuses.

    A question is embedded once, unless words alone are searched; what that took counts in every mode that needs it. The
    modes take turns at going first, so that none always finds the pages another one has just read.
    """
    space = Model(embedder.model, embedder.dimensions)
    for turn, question in enumerate(questions):
        vector, embedding = None, 0.0
        if set(modes) != {"text"}:
            begun = time.perf_counter()
            vector = await question_vector(embedder, question.text, question.origin)
            embedding = time.perf_counter() - begun
        judged: dict[Mode, Judged] = {}
        first = turn % len(modes)
        for mode in (*modes[first:], *modes[:first]):
            given, waited = (None, 0.0) if mode == "text" else (vector, embedding)
            begun = time.perf_counter()
            found, scan = await best_documents(database, settings, question, given, k, mode, reranker, space)
            judged[mode] = Judged(question, found, 1000 * (waited + time.perf_counter() - begun), scan)
        yield {mode: judged[mode] for mode in modes}


async def best_documents(
    database: Database,
    settings: Settings,
    question: Question,
    embedding: npt.NDArray[np.float32] | None,
    k: int,
    mode: Mode = "vector",
    reranker: Reranker | None = None,
    space: Model | None = None,
    oversampling: float | None = None,
) -> Ranked:
    """The k documents with the best chunks, best first, and the similarities of those; fewer if there are not k.

    `oversampling`: candidates taken from the index for each hit; None stands for what the deployment has set. Raises TimedOut where a search would be short.
    """
    found = await search.search(
        database,
        settings,
        question.tenant_id,
        embedding,
        question=text.plain(question.text),
        top_k=k,
        options=Options(mode=mode, grouped=True, oversampling=oversampling),
        stage=None if reranker is None else rerank.Stage(reranker, question.text),
        space=space,
    )
    if not found.scan.full:
        raise TimedOut("a search ran into its time limit, figures would be too low; raise PGRECALL_STATEMENT_TIMEOUT")
    return Ranked({hit.id: hit.similarity for hit in found.hits}, found.scan)


class Alternative(NamedTuple):
    """The same queries under other settings.

    `agreement`: share of the exact search's documents that are found, None where the exact search was too slow.
    `latency_ms`: of the search alone, the query being embedded already.
    """

    name: str
    recall: float
    agreement: float | None
    latency_ms: dict[str, float]


async def alternatives(
    database: Database,
    embedder: Embedder,
    settings: Settings,
    questions: Sequence[Question],
    k: int,
    advance: Callable[[], object] = lambda: None,
) -> list[Alternative]:
    """Recall@k and latency of the exact search, and of the index with several ef_search.

    An index of half precision or of bits is tried with several oversamplings too, at the ef_search that is set.

    The settings take turns at each query, so that whatever else the machine does falls on all of them. One that runs
    into the time limit is left out. `advance` is called after each query.
    """
    # Below top_k, which is 2 k here, ef_search has no effect.
    widths = sorted({max(width, 2 * k) for width in (*EF_SEARCH, settings.ef_search)})
    tried: dict[str, tuple[Settings, float | None]] = {"exact": (replace(settings, exact_rows=ALL_ROWS), None)}
    tried |= {f"ef_search {width}": (replace(settings, exact_rows=0, ef_search=width), None) for width in widths}
    deployed = await layout.of(database, questions[0].tenant_id)
    if deployed.kind != "full":
        factors = sorted({*OVERSAMPLING, deployed.oversampling})
        tried |= {f"oversampling {factor:g}": (replace(settings, exact_rows=0), factor) for factor in factors}
    found: dict[str, list[list[str]]] = {name: [] for name in tried}
    took: dict[str, list[float]] = {name: [] for name in tried}
    for turn, question in enumerate(questions):
        vector = await question_vector(embedder, question.text, question.origin)
        names = list(tried)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            changed, factor = tried[name]
            begun = time.perf_counter()
            try:
                ranked = await best_documents(database, changed, question, vector, k, oversampling=factor)
            except TimedOut:
                del tried[name], found[name], took[name]
                continue
            took[name].append(1000 * (time.perf_counter() - begun))
            found[name].append(list(ranked.found))
        advance()
    return [
        Alternative(
            name,
            float(np.mean([recall(one, q.grades, k) for one, q in zip(found[name], questions, strict=True)])),
            float(np.mean([_agreement(one, best) for one, best in zip(found[name], found["exact"], strict=True)]))
            if "exact" in found
            else None,
            latency(took[name]),
        )
        for name in tried
    ]


def _agreement(found: Sequence[str], exact: Sequence[str]) -> float:
    return len(set(found).intersection(exact)) / len(exact) if exact else 1.0


class Passage(NamedTuple):
    """The part of a document that is most similar to a query, shortened, and its cosine similarity."""

    text: str
    similarity: float


async def passages(
    database: Database, tenant_id: str, embedding: npt.NDArray[np.float32], ids: Sequence[str]
) -> dict[str, Passage]:
    """The best passage of each of these documents, as far as the tenant has them."""
    chunk = tenant_documents
    distance = chunk.c.embedding.cosine_distance(bindparam("embedding", type_=Vector(len(embedding))))
    best = rendered(
        select(chunk.c.id, func.left(chunk.c.content, 400).label("text"), (1 - distance).label("similarity"))
        .where(chunk.c.tenant_id == _tenant, chunk.c.id == func.any(bindparam("ids", type_=ARRAY(Text))))
        .ext(distinct_on(chunk.c.id))
        .order_by(chunk.c.id, distance)
    )
    values = {"tenant_id": tenant_id, "embedding": embedding, "ids": list(ids)}
    (rows,) = await database.fetch(tenant_id, [best.with_values("best passages", values)])
    return {row["id"]: Passage(row["text"], row["similarity"]) for row in rows}


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

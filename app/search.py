"""The repository's reading half: thresholded cosine similarity within one tenant, never silently short.

Which scan is right depends on how many rows pass the filter (DESIGN §2). Up to the size from which the index pays
(`layout.breakeven`) every row is measured by the statement that counts them, `few`. Above, `nearest` walks the index;
where that ends short, `exact` completes it within the time limit. That a set is large is remembered for a minute, so
that a busy tenant's search is one statement. `scans` has the statements.
"""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Select

from app import diversity, fusion, layout, model, scans, text
from app.conditions import Conditions, where_values
from app.database import Database
from app.errors import SpaceChanged, TimedOut
from app.fusion import Method, Mixed
from app.model import Model
from app.rerank import Stage
from app.scans import Strategy, Wanted
from app.settings import Settings
from app.statements import Rendered, Statement, rendered
from app.tables import Kind

Mode = Literal["vector", "text", "hybrid"]

MAX_TOP_K = 100
MAX_OVERSAMPLING = 100


@dataclass(frozen=True, slots=True)
class Hit:
    """One chunk found. `chunk_index` counts from 0, `start_offset` characters in the document.

    `similarity` is cosine similarity in [-1, 1], None where words were searched without a vector; `text_score` is BM25,
    above 0, None where the words were not searched, give this chunk nothing or, by `rrf`, did not find it. `score` is the similarity in the mode
    `vector`, the text score in `text` and the fused one in `hybrid`. `rerank_score` is the reranker's, on its model's own
    scale, None where none was asked.
    """

    id: str
    chunk_index: int
    content: str
    similarity: float | None
    doc_type: str | None
    metadata: dict[str, Any]
    created_at: datetime
    start_offset: int
    score: float = 0.0
    text_score: float | None = None
    rerank_score: float | None = None

    @property
    def rank_score(self) -> float:
        """What hits are ordered by."""
        return self.score if self.rerank_score is None else self.rerank_score


@dataclass(frozen=True, slots=True)
class Scan:
    """How a search was done, of a hybrid one the vector leg.

    `strategy`: `exact` measured every row that passes the filter, `index` walked the HNSW index, `text` searched the
    words only. `completed`: the index
    scan ended short and was completed exactly. `full`: min(top_k, matching) rows were found; false only if completing
    ran into the time limit. `kind`: precision of the index that was walked.
    """

    strategy: Literal["exact", "index", "text"]
    completed: bool = False
    full: bool = True
    kind: Kind | None = None


class Step(NamedTuple):
    """A statement that was run for a search, under which settings, and how long it took."""

    statement: Statement
    config: dict[str, str]
    milliseconds: float


class Found(NamedTuple):
    """Hits, best first; ties by id, then by place in the document. `reranking`: milliseconds, None without a reranker."""

    hits: list[Hit]
    scan: Scan
    steps: Sequence[Step] = ()
    reranking: float | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to search, where the settings and the active index are not to decide.

    `exact`: measure every row. `ef_search`: breadth of the walk, 10 to 1,000. `oversampling`: candidates taken from the
    index for each hit, 1 to 100. `grouped`: the best chunk of each document, so top_k documents. `mode`: by vectors, by
    the question's words (BM25), or both fused by `fusion` with these weights. `diversity`, 0 to 1: how much a hit's
    likeness to those above it counts against it (maximal marginal relevance).
    """

    mode: Mode = "vector"
    fusion: Method = "relative"
    vector_weight: float = 1.0
    text_weight: float = 1.0
    diversity: float = 0.0

    exact: bool = False
    ef_search: int | None = None
    oversampling: float | None = None
    grouped: bool = False


async def search(
    database: Database,
    settings: Settings,
    tenant_id: str,
    embedding: npt.NDArray[np.float32] | None,
    *,
    question: str = "",
    top_k: int = 10,
    threshold: float | None = None,
    conditions: Conditions | None = None,
    options: Options | None = None,
    stage: Stage | None = None,
    space: Model | None = None,
) -> Found:
    """The best chunks of `tenant_id`, at least as similar to `embedding` (shape (dimensions,)) as `threshold`.

    `question` is what the modes `text` and `hybrid` search the words of; `text` needs no embedding but for a threshold.
    With a `stage` the candidates are found as without one (grouped where they are to be, so that there are as many
    documents), then reranked, then chosen for diversity, then cut to top_k. Raises RerankFailed.

    `space`: the model the embedding is of. Raises SpaceChanged where vectors of another one were searched.
    """
    conditions, options = conditions or Conditions(), options or Options()
    several = top_k
    if stage is not None:
        several = max(top_k, stage.candidates)
    elif options.diversity:
        several = min(MAX_TOP_K, max(top_k, diversity.CHOICE * top_k))
    laid_out = await layout.of(database, tenant_id)
    dimensions = 0 if embedding is None else len(embedding)
    wanted = Wanted(dimensions, laid_out.kind, threshold is not None, options.grouped, bool(options.diversity))
    leg_k = max(fusion.LEG, several)
    candidates = max(
        math.ceil(several * (options.oversampling or laid_out.oversampling)),
        leg_k if options.mode == "hybrid" else several,
        0 if options.oversampling else scans.TELLING,
    )
    plan = _Plan(
        leg_k,
        min(candidates, scans.MAX_EF_SEARCH),
        settings.exact_rows,
        laid_out.rows,
        options.ef_search or settings.ef_search,
        several if options.mode == "vector" else leg_k,
    )
    values = {"top_k": several, "leg_k": leg_k, "bound": plan.bound + 1, "candidates": plan.candidates}
    asked: dict[str, Any] = values | where_values(tenant_id, conditions)
    if embedding is not None:
        asked["embedding"] = embedding
    if threshold is not None:
        asked["threshold"] = threshold
    if options.mode != "vector":
        # Without anything to leave out of them later, the best top_k by words are enough.
        all_shown = options.mode == "text" and threshold is None and not options.grouped
        asked |= text.values(settings, question, several if all_shown else leg_k, conditions)
        asked |= {"vector_weight": options.vector_weight, "text_weight": options.text_weight}
    walk = _Walk(database, tenant_id, conditions, wanted, asked, options, space if embedding is not None else None)
    found = await _words(walk) if options.mode == "text" else await _nearest(walk, plan, threshold)
    if stage is not None:
        found = await _reranked(walk, found, stage)
    if options.diversity:
        scores = [hit.rank_score for hit in found.hits]
        return found._replace(hits=diversity.chosen(found.hits, scores, walk.vectors, top_k, options.diversity))
    return found._replace(hits=found.hits[:top_k])


async def _reranked(walk: "_Walk", found: Found, stage: Stage) -> Found:
    """The hits by the reranker's scores, equal ones in the order they had. Holds no connection."""
    begun = time.perf_counter()
    scores = await stage.reranker.scores(stage.query, [hit.content for hit in found.hits])
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    walk.vectors = [walk.vectors[index] for index in order] if walk.vectors else []
    return found._replace(
        hits=[replace(found.hits[index], rerank_score=scores[index]) for index in order],
        reranking=1000 * (time.perf_counter() - begun),
    )


class _Plan(NamedTuple):
    leg_k: int
    candidates: int
    exact_rows: int | None
    rows: float
    ef_search: int
    enough: int

    @property
    def bound(self) -> int:
        """The most rows that are measured without asking the index."""
        return layout.breakeven(self.rows, self.candidates) if self.exact_rows is None else self.exact_rows


async def _words(walk: "_Walk") -> Found:
    rows = await walk.rows(None, scans.EXACT)
    return Found(walk.hits(rows), Scan("text"), walk.steps)


async def _nearest(walk: "_Walk", plan: _Plan, threshold: float | None) -> Found:
    database, conditions, wanted = walk.database, walk.conditions, walk.wanted
    which, shape = where_values(walk.tenant_id, conditions), (conditions.shape, plan.bound)
    hybrid = walk.options.mode == "hybrid"
    if walk.options.exact:
        rows = await walk.rows("exact", scans.EXACT)
        return Found(walk.hits(rows), Scan("exact"), walk.steps)
    if not layout.is_large(database, which, shape):
        rows = await walk.rows("few", scans.EXACT)
        if rows[0]["candidates"] <= plan.bound:
            return Found(walk.hits(rows), Scan("exact"), walk.steps)
        layout.note(database, which, shape, large=True)
    candidates = plan.candidates
    while True:
        rows = await walk.rows("nearest", scans.index_config(plan.ef_search, candidates))
        hits = walk.hits(rows)
        if rows[0]["different"] * scans.REPETITIVE < rows[0]["candidates"]:
            break  # caught among copies of one text, which are neighbours of nothing but each other
        enough = hybrid or len(hits) == walk.values["top_k"] or (threshold is not None and not wanted.grouped)
        if rows[0]["candidates"] >= candidates and enough:
            return Found(hits, Scan("index", kind=wanted.kind), walk.steps)
        if rows[0]["candidates"] < candidates or candidates == scans.MAX_EF_SEARCH:
            break
        # Many chunks of few documents: farther chunks hold the next ones.
        walk.values["candidates"] = candidates = min(4 * candidates, scans.MAX_EF_SEARCH)
    layout.note(database, which, shape, large=False)
    try:
        rows = await walk.rows("exact", scans.EXACT)
    except TimedOut:
        return Found(hits, Scan("index", full=False, kind=wanted.kind), walk.steps)
    return Found(walk.hits(rows), Scan("exact", completed=True), walk.steps)


@dataclass
class _Walk:
    """One search under way: its values, the statements run so far, the vectors of the last one's hits where wanted."""

    database: Database
    tenant_id: str
    conditions: Conditions
    wanted: Wanted
    values: dict[str, Any]
    options: Options
    space: Model | None
    steps: list[Step] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float32]] = field(default_factory=list)

    async def rows(self, strategy: Strategy | None, config: dict[str, str]) -> list[dict[str, Any]]:
        if self.options.mode == "vector" and strategy is not None:
            statement = _statement(strategy, self.conditions, self.wanted).with_values(strategy, self.values)
        else:
            mixed = Mixed(self.wanted, strategy, self.options.fusion, "embedding" in self.values)
            name = f"hybrid {strategy}" if strategy else "text"
            statement = _mixed(self.conditions, mixed).with_values(name, self.values)
            config = config | text.CONFIG
        begun = time.perf_counter()
        try:
            (rows,) = await self.database.fetch(self.tenant_id, [statement], config)
        except SpaceChanged:  # the lengths differ, which is all the server says
            layout.forget(self.database)
            asked = model.NOW_SEARCHED.with_values("model searched", {})
            ((row,),) = await self.database.fetch(self.tenant_id, [asked])
            raise SpaceChanged(model.tagged(row["space"])) from None
        if self.space is not None and rows[0]["space"] != self.space.tag:
            layout.forget(self.database)
            raise SpaceChanged(model.tagged(rows[0]["space"]))
        self.steps.append(Step(statement, config, 1000 * (time.perf_counter() - begun)))
        return rows

    def hits(self, rows: list[dict[str, Any]]) -> list[Hit]:
        found = [row for row in rows if row["id"] is not None]
        if self.wanted.vectors:
            self.vectors = [row["embedding"].to_numpy() for row in found]
        return [_hit(row) for row in found]


def _hit(row: dict[str, Any]) -> Hit:
    return Hit(
        row["id"],
        row["chunk_index"],
        row["content"],
        row["similarity"],
        row["doc_type"],
        row["metadata"],
        row["created_at"],
        row["start_offset"],
        row.get("score", row["similarity"]),
        row.get("text_score"),
    )


_CACHE: dict[Any, Rendered] = {}
_CACHED = 1_000


def _statement(strategy: Strategy, conditions: Conditions, wanted: Wanted) -> Rendered:
    return _kept((strategy, conditions.shape, wanted), lambda: scans.build(strategy, conditions, wanted))


def _mixed(conditions: Conditions, mixed: Mixed) -> Rendered:
    return _kept((conditions.shape, mixed), lambda: fusion.build(conditions, mixed))


def _kept(key: Hashable, build: Callable[[], Select[Any]]) -> Rendered:
    if key not in _CACHE:
        if len(_CACHE) >= _CACHED:
            _CACHE.clear()
        # In the snapshot that the rows are read in: the model whose vectors they have.
        _CACHE[key] = rendered(build().add_columns(model.SPACE.label("space")))
    return _CACHE[key]

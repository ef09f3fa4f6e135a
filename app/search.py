"""The repository's reading half: thresholded cosine similarity within one tenant, never silently short.

Which scan is right depends on how many rows pass the filter (DESIGN §2). Up to the size from which the index pays
(`layout.breakeven`) every row is measured by the statement that counts them, `few`. Above, `nearest` walks the index;
where that ends short, `exact` completes it within the time limit. That a set is large is remembered for a minute, so
that a busy tenant's search is one statement. `scans` has the statements.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from app import layout, scans
from app.conditions import Conditions, where_values
from app.database import Database, Rendered, Statement, rendered
from app.drafts import check_text
from app.embedding import Embedder
from app.errors import BadInput, TimedOut
from app.scans import Strategy, Wanted
from app.settings import Settings
from app.tables import Kind

MAX_TOP_K = 100
MAX_OVERSAMPLING = 100
MAX_QUERY_BYTES = 32_000


@dataclass(frozen=True, slots=True)
class Hit:
    """One chunk found. `similarity` is cosine similarity in [-1, 1]; `start_offset` counts characters in the document."""

    id: str
    chunk_index: int
    content: str
    similarity: float
    doc_type: str | None
    metadata: dict[str, Any]
    created_at: datetime
    start_offset: int


@dataclass(frozen=True, slots=True)
class Scan:
    """How a search was done.

    `strategy`: `exact` measured every row that passes the filter, `index` walked the HNSW index. `completed`: the index
    scan ended short and was completed exactly. `full`: min(top_k, matching) rows were found; false only if completing
    ran into the time limit. `kind`: precision of the index that was walked.
    """

    strategy: Literal["exact", "index"]
    completed: bool = False
    full: bool = True
    kind: Kind | None = None


class Step(NamedTuple):
    """A statement that was run for a search, under which settings, and how long it took."""

    statement: Statement
    config: dict[str, str]
    milliseconds: float


class Found(NamedTuple):
    """Hits, most similar first; ties by id, then by place in the document."""

    hits: list[Hit]
    scan: Scan
    steps: Sequence[Step] = ()


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to search, where the settings and the active index are not to decide.

    `exact`: measure every row. `ef_search`: breadth of the walk, 10 to 1,000. `oversampling`: candidates taken from the
    index for each hit, 1 to 100. `grouped`: the best chunk of each document, so top_k documents.
    """

    exact: bool = False
    ef_search: int | None = None
    oversampling: float | None = None
    grouped: bool = False


async def question_vector(embedder: Embedder, text: str, field: str = "query") -> npt.NDArray[np.float32]:
    """The vector of a question, shape (dimensions,).

    Raises BadInput, naming `field`, for a text that is blank or longer than the model reads: the rest of it would be
    left out without a word.
    """
    check_text(field, text, 1, MAX_QUERY_BYTES)
    if not text.strip():
        raise BadInput(field, "is white space only; allowed: a text")
    (tokens,) = embedder.count_tokens([text])
    if tokens > embedder.max_tokens:
        raise BadInput(
            field, f"has {tokens:,} tokens; allowed: {embedder.max_tokens:,}, as much as {embedder.model} reads"
        )
    return (await embedder.embed([text], "query")).reshape(-1)


async def search(
    database: Database,
    settings: Settings,
    tenant_id: str,
    embedding: npt.NDArray[np.float32],
    *,
    top_k: int = 10,
    threshold: float | None = None,
    conditions: Conditions | None = None,
    options: Options | None = None,
) -> Found:
    """The chunks of `tenant_id` most similar to `embedding` (shape (dimensions,)), at least as similar as `threshold`."""
    conditions, options = conditions or Conditions(), options or Options()
    laid_out = await layout.of(database, tenant_id)
    wanted = Wanted(len(embedding), laid_out.kind, threshold is not None, options.grouped)
    oversampling = options.oversampling or laid_out.oversampling
    candidates = min(max(math.ceil(top_k * oversampling), top_k), scans.MAX_EF_SEARCH)
    bound = settings.exact_rows
    if bound is None:
        bound = layout.breakeven(laid_out.rows, candidates)
    shape = conditions.shape, bound
    which = where_values(tenant_id, conditions)
    asked: dict[str, Any] = {"embedding": embedding, "top_k": top_k, "bound": bound + 1, "candidates": candidates}
    if threshold is not None:
        asked["threshold"] = threshold
    walk = _Walk(database, tenant_id, conditions, wanted, which | asked)
    if options.exact:
        rows = await walk.rows("exact", scans.EXACT)
        return Found(_hits(rows), Scan("exact"), walk.steps)
    if not layout.is_large(database, which, shape):
        rows = await walk.rows("few", scans.EXACT)
        if rows[0]["candidates"] <= bound:
            return Found(_hits(rows), Scan("exact"), walk.steps)
        layout.note(database, which, shape, large=True)
    while True:
        rows = await walk.rows("nearest", scans.index_config(options.ef_search or settings.ef_search, candidates))
        hits = _hits(rows)
        enough = len(hits) == top_k or (threshold is not None and not options.grouped)
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
    return Found(_hits(rows), Scan("exact", completed=True), walk.steps)


@dataclass
class _Walk:
    """One search under way: its values, and the statements run so far."""

    database: Database
    tenant_id: str
    conditions: Conditions
    wanted: Wanted
    values: dict[str, Any]
    steps: list[Step] = field(default_factory=list)

    async def rows(self, strategy: Strategy, config: dict[str, str]) -> list[dict[str, Any]]:
        statement = _statement(strategy, self.conditions, self.wanted).with_values(strategy, self.values)
        begun = time.perf_counter()
        (rows,) = await self.database.fetch(self.tenant_id, [statement], config)
        self.steps.append(Step(statement, config, 1000 * (time.perf_counter() - begun)))
        return rows


def _hits(rows: list[dict[str, Any]]) -> list[Hit]:
    return [
        Hit(**{name: value for name, value in row.items() if name != "candidates"})
        for row in rows
        if row["id"] is not None
    ]


_CACHE: dict[Any, Rendered] = {}
_CACHED = 1_000


def _statement(strategy: Strategy, conditions: Conditions, wanted: Wanted) -> Rendered:
    key = (strategy, conditions.shape, wanted)
    if key not in _CACHE:
        if len(_CACHE) >= _CACHED:
            _CACHE.clear()
        _CACHE[key] = rendered(scans.build(strategy, conditions, wanted))
    return _CACHE[key]

"""The repository's reading half: thresholded cosine similarity within one tenant, never silently short.

Which scan is right depends on how many rows pass the filter (DESIGN §2), so that is counted first, up to a bound, in
the same statement that already holds the exact answer for a small set:

    few      counts up to `exact_rows` + 1 rows; if the bound is not reached, returns the exact answer. One round trip.
    nearest  walks the HNSW index, filtering as it goes (pgvector's iterative scan). Only for sets above the bound.
    exact    measures every row that passes. Completes an index scan that ended short.

All three return the same columns, `candidates` among them, and compare the threshold after the top k are found.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    DateTime,
    Float,
    Integer,
    Select,
    Text,
    bindparam,
    cast,
    func,
    literal,
    select,
    true,
)

from app import filters
from app.database import Database, Rendered, Statement, rendered
from app.drafts import check_text
from app.embedding import Embedder
from app.errors import BadInput, TimedOut
from app.filters import Filter
from app.settings import Settings
from app.tables import INDEXED_AS_VECTOR, HalfVector, Vector, tenant_documents, tenant_sources

MAX_TOP_K = 100
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
class Conditions:
    """What a chunk must satisfy besides belonging to the tenant. None: no such condition; `doc_types` () : nothing fits."""

    doc_types: tuple[str, ...] | None = None
    metadata: Filter | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Scan:
    """How a search was done.

    `strategy`: `exact` measured every row that passes the filter, `index` walked the HNSW index. `completed`: the index
    scan ended short of top_k rows and was completed exactly. `full`: min(top_k, matching) rows were found; false only
    if completing ran into the time limit.
    """

    strategy: Literal["exact", "index"]
    completed: bool = False
    full: bool = True


class Found(NamedTuple):
    """Hits, most similar first; ties by id, then by place in the document."""

    hits: list[Hit]
    scan: Scan


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
) -> Found:
    """The chunks of `tenant_id` most similar to `embedding` (shape (dimensions,)), at least as similar as `threshold`."""
    conditions = conditions or Conditions()
    values = _values(tenant_id, embedding, top_k, threshold, conditions)
    few, nearest, exact = _statements(conditions, threshold is not None, len(embedding))
    rows = await _rows(database, tenant_id, few.with_values("few", values | {"bound": settings.exact_rows + 1}), EXACT)
    if rows[0]["candidates"] <= settings.exact_rows:
        return Found(_hits(rows), Scan("exact"))
    rows = await _rows(database, tenant_id, nearest.with_values("nearest", values), index_config(settings, top_k))
    hits = _hits(rows)
    # Fewer than top_k above the threshold may be all there are, or all the index found: only measuring them all tells.
    if rows[0]["candidates"] >= top_k and (threshold is None or len(hits) == top_k):
        return Found(hits, Scan("index"))
    try:
        rows = await _rows(database, tenant_id, exact.with_values("exact", values), EXACT)
    except TimedOut:
        return Found(hits, Scan("index", full=False))
    return Found(_hits(rows), Scan("exact", completed=True))


EXACT = {"plan_cache_mode": "force_custom_plan"}
"""A generic plan for the average tenant turns 5 ms into 127 ms (DESIGN §2)."""


def index_config(settings: Settings, top_k: int) -> dict[str, str]:
    """Settings under which the planner can only order by the HNSW index, and the index goes on until it has enough."""
    return EXACT | {
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.ef_search": str(min(max(settings.ef_search, top_k), 1_000)),  # pgvector takes no more
        "enable_sort": "off",
        "jit": "off",
        "max_parallel_workers_per_gather": "0",
    }


def where(conditions: Conditions, table: Any = tenant_documents) -> list[ColumnElement[bool]]:
    """The tenant's predicate and the conditions, with every value a named parameter."""
    clauses: list[ColumnElement[bool]] = [table.c.tenant_id == bindparam("tenant_id", type_=Text)]
    if conditions.doc_types is not None:
        clauses.append(table.c.doc_type == func.any(bindparam("doc_types", type_=ARRAY(Text))))
    if conditions.created_after is not None:
        clauses.append(table.c.created_at >= bindparam("created_after", type_=DateTime(timezone=True)))
    if conditions.created_before is not None:
        clauses.append(table.c.created_at < bindparam("created_before", type_=DateTime(timezone=True)))
    if conditions.metadata is not None:
        clauses.append(filters.clause(conditions.metadata, table.c.metadata))
    return clauses


def where_values(tenant_id: str, conditions: Conditions) -> dict[str, Any]:
    """The values of `where`."""
    given = {
        "doc_types": None if conditions.doc_types is None else list(conditions.doc_types),
        "created_after": conditions.created_after,
        "created_before": conditions.created_before,
    }
    values = {"tenant_id": tenant_id} | {name: value for name, value in given.items() if value is not None}
    return values | (filters.values(conditions.metadata) if conditions.metadata is not None else {})


def build(
    kind: Literal["few", "nearest", "exact"], conditions: Conditions, *, thresholded: bool, dimensions: int
) -> Select[Any]:
    """One of the three statements. Its parameters: embedding, top_k, bound (few), threshold, and those of `where`."""
    chunk = tenant_documents
    passes = where(conditions)
    query = bindparam("embedding", type_=Vector(dimensions))
    distance = chunk.c.embedding.cosine_distance(query)
    columns = (chunk.c.id, chunk.c.chunk_key, chunk.c.content, chunk.c.doc_type, chunk.c.metadata, chunk.c.created_at)
    top_k = bindparam("top_k", type_=Integer)
    if kind == "nearest" and dimensions > INDEXED_AS_VECTOR:
        half = HalfVector(dimensions)
        by = cast(chunk.c.embedding, half).cosine_distance(cast(query, half))
        # Half precision can swap near neighbours: twice as many are taken and measured again in full.
        near = select(*columns, distance.label("distance")).where(*passes).order_by(by).limit(2 * top_k).cte("near")
        top = select(near).order_by(near.c.distance + literal(0.0), near.c.id, near.c.chunk_key).limit(top_k)
    elif kind == "nearest":
        top = select(*columns, distance.label("distance")).where(*passes).order_by(distance).limit(top_k)
    else:
        # "+ 0" keeps the index away: it is approximate. Shown and sorted by the same expression, it is computed once.
        measured = (distance + literal(0.0)).label("distance")
        top = select(*columns, measured).where(*passes).order_by(measured, chunk.c.id, chunk.c.chunk_key).limit(top_k)
    if kind == "few":
        bound = bindparam("bound", type_=Integer)
        counted = select(literal(1).label("one")).select_from(chunk).where(*passes).limit(bound).subquery("counted")
        size = select(func.count().label("candidates")).select_from(counted).cte("size").prefix_with("MATERIALIZED")
        hit = top.where(select(size.c.candidates).scalar_subquery() < bound).cte("hit").prefix_with("MATERIALIZED")
    else:
        hit = top.cte("hit").prefix_with("MATERIALIZED")
        size = select(func.count().label("candidates")).select_from(hit).cte("size")
    place = func.array_position(tenant_sources.c.chunk_keys, hit.c.chunk_key)
    similarity = 1 - hit.c.distance
    shown = (
        select(
            *(hit.c[column.name] for column in columns if column.name != "chunk_key"),
            (place - 1).label("chunk_index"),
            tenant_sources.c.start_offsets[place].label("start_offset"),
            similarity.label("similarity"),
        )
        .join(tenant_sources, tenant_sources.c.id == hit.c.id)
        .where(tenant_sources.c.tenant_id == bindparam("tenant_id", type_=Text))
    )
    if thresholded:
        shown = shown.where(similarity >= bindparam("threshold", type_=Float))
    found = shown.subquery("found")
    return (
        select(size.c.candidates, found)
        .select_from(size.outerjoin(found, true()))
        .order_by(found.c.similarity.desc(), found.c.id, found.c.chunk_index)
    )


def _values(
    tenant_id: str, embedding: npt.NDArray[np.float32], top_k: int, threshold: float | None, conditions: Conditions
) -> dict[str, Any]:
    asked: dict[str, Any] = {"embedding": embedding, "top_k": top_k}
    if threshold is not None:
        asked["threshold"] = threshold
    return asked | where_values(tenant_id, conditions)


async def _rows(
    database: Database, tenant_id: str, statement: Statement, config: dict[str, str]
) -> list[dict[str, Any]]:
    (rows,) = await database.fetch(tenant_id, [statement], config)
    return rows


def _hits(rows: list[dict[str, Any]]) -> list[Hit]:
    return [
        Hit(**{name: value for name, value in row.items() if name != "candidates"})
        for row in rows
        if row["id"] is not None
    ]


_CACHE: dict[Hashable, tuple[Rendered, Rendered, Rendered]] = {}
_CACHED = 1_000


def _statements(conditions: Conditions, thresholded: bool, dimensions: int) -> tuple[Rendered, Rendered, Rendered]:
    shape = (
        conditions.doc_types is not None,
        conditions.created_after is not None,
        conditions.created_before is not None,
        None if conditions.metadata is None else filters.shape(conditions.metadata),
        thresholded,
        dimensions,
    )
    if shape not in _CACHE:
        if len(_CACHE) >= _CACHED:
            _CACHE.clear()
        few, nearest, exact = (
            rendered(build(kind, conditions, thresholded=thresholded, dimensions=dimensions))
            for kind in ("few", "nearest", "exact")
        )
        _CACHE[shape] = (few, nearest, exact)
    return _CACHE[shape]

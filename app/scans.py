"""The vector leg: how the chunks nearest to a vector are found, each way one statement, built apart from being run.

    few      measures up to `bound` rows that pass the filter; if there are no more, that is the exact answer.
    nearest  walks the HNSW index of the tenant's bucket, filtering as it goes (pgvector's iterative scan), takes
             `candidates` rows in the index's order and measures those again with the stored vectors.
    exact    measures every row that passes.

All give the same columns, but for `different` (`nearest` only), `candidates` among them (how many rows were measured; for `few` how many were counted, up to
the bound), and compare the threshold after the top k are found.

A tenant's rows are all in one *bucket*, one of BUCKETS partial HNSW indexes: in a graph of the whole table a tenant of
1 % is one node in a hundred, in its bucket it is one in six. docs/search.md has the figures.
"""

from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    CTE,
    ColumnElement,
    Float,
    FromClause,
    Integer,
    Numeric,
    Select,
    Text,
    bindparam,
    cast,
    func,
    literal,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import distinct_on

from app.conditions import VIEWS, Conditions, Relations
from app.tables import Kind, Vector, bucket_of, indexed

Strategy = Literal["few", "nearest", "exact"]

MAX_EF_SEARCH = 1_000
"""pgvector takes no more; nor can more candidates come out of one walk at full quality."""

TELLING = 40
"""Candidates that are looked at for copies of one text, however few hits are asked for."""

REPETITIVE = 3
"""Candidates for each different distance from which on a walk is taken to be caught among copies of one text."""

EXACT = {"plan_cache_mode": "force_custom_plan", "jit": "off", "max_parallel_workers_per_gather": "0"}
"""A generic plan for the average tenant turns 5 ms into 127 ms (DESIGN §2)."""


class Wanted(NamedTuple):
    """What a statement is built for; statements of equal wants have the same text."""

    dimensions: int
    kind: Kind = "full"
    thresholded: bool = False
    grouped: bool = False  # the best chunk of each document
    vectors: bool = False  # the vectors come along


def index_config(ef_search: int, candidates: int) -> dict[str, str]:
    """Settings under which the planner can only order by the HNSW index, and the index goes on until it has enough."""
    return EXACT | {
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.ef_search": str(min(max(ef_search, candidates), MAX_EF_SEARCH)),
        "enable_sort": "off",
    }


def build(strategy: Strategy, conditions: Conditions, wanted: Wanted, relations: Relations = VIEWS) -> Select[Any]:
    """One of the three statements. Its parameters: embedding, top_k, candidates (nearest), bound (few), threshold, `where`'s."""
    near, size = leg(strategy, conditions, wanted, relations=relations)
    return shown(near, size, wanted, relations)


def leg(
    strategy: Strategy, conditions: Conditions, wanted: Wanted, limit: str = "top_k", relations: Relations = VIEWS
) -> tuple[CTE, CTE]:
    """The `limit` nearest as (id, chunk_key, distance) and, apart, how many `candidates` there were."""
    chunk = relations.documents
    passes = relations.where(conditions)
    distance = chunk.c.embedding.cosine_distance(_query(wanted))
    bound = bindparam("bound", type_=Integer)
    if strategy == "nearest":
        walked = select(chunk.c.id, chunk.c.chunk_key, distance.label("distance")).where(*passes, _in_bucket(relations))
        walked = walked.order_by(by_index(wanted, relations)).limit(bindparam("candidates", type_=Integer))
        near = walked.cte("near").prefix_with("MATERIALIZED")
        return _best(near, near.c.distance + literal(0.0), wanted, limit), _size(near, _different(near.c.distance))
    # "+ 0" keeps the index away: it is approximate. Shown and sorted by the same expression, it is computed once.
    measured = select(chunk.c.id, chunk.c.chunk_key, (distance + literal(0.0)).label("distance")).where(*passes)
    if strategy == "exact":
        every = measured.subquery("near")
        hit = _best(every, every.c.distance, wanted, limit)
        return hit, _size(hit)
    if conditions.metadata is None:
        # An index alone tells how many there are.
        size = _size(select(literal(1).label("one")).select_from(chunk).where(*passes).limit(bound).subquery("counted"))
        every = measured.where(_fewer(size, bound)).subquery("near")
        return _best(every, every.c.distance, wanted, limit), size
    # Only the rows themselves tell which of them pass: they are measured in the same visit.
    near = measured.limit(bound).cte("near").prefix_with("MATERIALIZED")
    size = _size(near)
    return _best(near, near.c.distance, wanted, limit, _fewer(size, bound)), size


def _size(counted: FromClause, *more: ColumnElement[Any]) -> CTE:
    size = select(func.count().label("candidates"), *more).select_from(counted)
    return size.cte("size").prefix_with("MATERIALIZED")


def _different(distance: ColumnElement[Any]) -> ColumnElement[int]:
    """How many distances there are to the third digit: few among many rows are one text over and over."""
    return func.count(func.round(cast(distance, Numeric()), 3).distinct()).label("different")


def _fewer(size: CTE, bound: ColumnElement[int]) -> ColumnElement[bool]:
    return select(size.c.candidates).scalar_subquery() < bound


def _best(
    near: FromClause, distance: ColumnElement[Any], wanted: Wanted, limit: str, *conditions: ColumnElement[bool]
) -> CTE:
    """The first `limit` of `near`, or of its documents' best chunks; ties by id, then by chunk."""
    best = select(near.c.id, near.c.chunk_key, near.c.distance).where(*conditions)
    if wanted.grouped:
        each = best.ext(distinct_on(near.c.id)).order_by(near.c.id, distance, near.c.chunk_key).subquery("each")
        best = select(each).order_by(each.c.distance, each.c.id)
    else:
        best = best.order_by(distance, near.c.id, near.c.chunk_key)
    return best.limit(bindparam(limit, type_=Integer)).cte("hit").prefix_with("MATERIALIZED")


def shown(hit: CTE, size: CTE, wanted: Wanted, relations: Relations = VIEWS) -> Select[Any]:
    """The hits with what a caller sees of a chunk; at least one row, whatever was found: `candidates` stands in each."""
    chunk, source = relations.documents, relations.sources
    tenant = bindparam("tenant_id", type_=Text)
    place = func.array_position(source.c.chunk_keys, hit.c.chunk_key)
    similarity = 1 - hit.c.distance
    found = (
        select(
            chunk.c.id,
            chunk.c.content,
            chunk.c.doc_type,
            chunk.c.metadata,
            chunk.c.created_at,
            (place - 1).label("chunk_index"),
            source.c.start_offsets[place].label("start_offset"),
            similarity.label("similarity"),
            *([chunk.c.embedding] if wanted.vectors else []),
        )
        .select_from(hit)
        .join(chunk, (chunk.c.id == hit.c.id) & (chunk.c.chunk_key == hit.c.chunk_key))
        .join(source, source.c.id == hit.c.id)
        .where(chunk.c.tenant_id == tenant, source.c.tenant_id == tenant)
    )
    if wanted.thresholded:
        found = found.where(similarity >= bindparam("threshold", type_=Float))
    rows = found.subquery("found")
    return (
        select(*size.c, rows)
        .select_from(size.outerjoin(rows, true()))
        .order_by(rows.c.similarity.desc(), rows.c.id, rows.c.chunk_index)
    )


def _query(wanted: Wanted) -> ColumnElement[Any]:
    return bindparam("embedding", type_=Vector(wanted.dimensions))


def by_index(wanted: Wanted, relations: Relations) -> ColumnElement[Any]:
    """What an index of this kind orders by."""
    column, query = (
        indexed(each, wanted.kind, wanted.dimensions) for each in (relations.documents.c.embedding, _query(wanted))
    )
    return column.op("<~>" if wanted.kind == "binary" else "<=>", return_type=Float())(query)


def _in_bucket(relations: Relations) -> ColumnElement[bool]:
    return bucket_of(relations.documents.c.tenant_id) == bucket_of(bindparam("tenant_id", type_=Text))

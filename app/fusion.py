"""Search by words, and by words and vectors together: two legs under the same conditions, fused in one statement.

Each leg gives its best `leg_k` chunks. Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009) adds 1 / (RANK_CONSTANT
+ rank) of each, times the leg's weight; `relative` adds the legs' scores, each brought to 0..1 between its worst and best
hit (what Weaviate calls relative score fusion). The threshold is on cosine similarity here as everywhere.
"""

from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    CTE,
    ColumnElement,
    Float,
    FromClause,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, distinct_on
from sqlalchemy.sql.selectable import LateralFromClause

from app import scans, text
from app.conditions import Conditions
from app.scans import Strategy, Wanted
from app.tables import Vector, tenant_documents, tenant_sources

Method = Literal["rrf", "relative"]

RANK_CONSTANT = 60
"""The k of reciprocal rank fusion, as in its paper."""

LEG = 100
"""Chunks each leg gives at least."""


class Mixed(NamedTuple):
    """What a statement is built for beside the conditions. `strategy` None: by words only."""

    wanted: Wanted
    strategy: Strategy | None
    method: Method = "rrf"
    similarity: bool = True  # there is a vector to compare with


def build(conditions: Conditions, mixed: Mixed) -> Select[Any]:
    """The statement.

    Parameters: those of `text.ranked`; with a vector leg those of `scans.leg` with the limit leg_k, vector_weight and
    text_weight; embedding, top_k, and threshold where one is wanted.
    """
    words = text.ranked(conditions)
    if mixed.strategy is None:
        size = select(func.count().label("candidates")).select_from(words).cte("size")
        fused = _words_only(words)
    else:
        hit, size = scans.leg(mixed.strategy, conditions, mixed.wanted._replace(grouped=False), "leg_k")
        fused = _fused(hit, words, mixed.method)
    return _shown(fused, size, mixed)


def _words_only(words: CTE) -> CTE:
    score = words.c.text_score
    return select(words.c.id, words.c.chunk_key, score, score.label("score")).cte("fused")


def _fused(hit: CTE, words: CTE, method: Method) -> CTE:
    """id, chunk_key, text_score and the fused score of every chunk that one of the legs found."""
    vector = select(
        hit.c.id, hit.c.chunk_key, _share(method, 1 - hit.c.distance, hit.c.distance, hit).label("share")
    ).cte("vector_leg")
    worded = select(
        words.c.id,
        words.c.chunk_key,
        words.c.text_score,
        _share(method, words.c.text_score, words.c.text_score.desc(), words).label("share"),
    ).cte("word_leg")
    same = and_(vector.c.id == worded.c.id, vector.c.chunk_key == worded.c.chunk_key)
    shares = [
        func.coalesce(leg.c.share, literal(0.0)) * bindparam(weight, type_=Float)
        for leg, weight in ((vector, "vector_weight"), (worded, "text_weight"))
    ]
    return (
        select(
            func.coalesce(vector.c.id, worded.c.id).label("id"),
            func.coalesce(vector.c.chunk_key, worded.c.chunk_key).label("chunk_key"),
            worded.c.text_score,
            (shares[0] + shares[1]).label("score"),
        )
        .select_from(vector.join(worded, same, full=True))
        .cte("fused")
        .prefix_with("MATERIALIZED")
    )


def _share(method: Method, score: ColumnElement[Any], order: ColumnElement[Any], leg: CTE) -> ColumnElement[Any]:
    if method == "rrf":
        rank = func.row_number().over(order_by=(order, leg.c.id, leg.c.chunk_key))
        return literal(1.0) / (RANK_CONSTANT + rank)
    least, most = func.min(score).over(), func.max(score).over()
    return func.coalesce((score - least) / func.nullif(most - least, 0), literal(1.0))


def _shown(fused: CTE, size: CTE, mixed: Mixed) -> Select[Any]:
    """The best with what a caller sees of a chunk; at least one row: `candidates` stands in each."""
    passing: FromClause = fused
    if mixed.wanted.thresholded:
        near = _chunk(fused, _similarity(mixed).label("similarity"))
        above = near.c.similarity >= bindparam("threshold", type_=Float)
        passing = select(fused).select_from(fused.join(near, true())).where(above).subquery("passing")
    ordered = (passing.c.score.desc(), passing.c.id, passing.c.chunk_key)
    best = select(passing).order_by(*ordered)
    if mixed.wanted.grouped:
        first = select(passing).ext(distinct_on(passing.c.id)).order_by(passing.c.id, *ordered).subquery("first")
        best = select(first).order_by(first.c.score.desc(), first.c.id, first.c.chunk_key)
    top = best.limit(bindparam("top_k", type_=Integer)).cte("best").prefix_with("MATERIALIZED")
    columns = tenant_documents.c
    chunk = _chunk(
        top,
        columns.content,
        columns.doc_type,
        columns.metadata,
        columns.created_at,
        _similarity(mixed).label("similarity"),
        *([columns.embedding] if mixed.wanted.vectors else []),
    )
    source = tenant_sources
    place = func.array_position(source.c.chunk_keys, top.c.chunk_key)
    found = (
        select(
            top.c.id,
            top.c.text_score,
            top.c.score,
            *chunk.c,
            (place - 1).label("chunk_index"),
            source.c.start_offsets[place].label("start_offset"),
        )
        .select_from(top.join(chunk, true()).join(source, source.c.id == top.c.id))
        .where(source.c.tenant_id == bindparam("tenant_id", type_=Text))
        .subquery("found")
    )
    return (
        select(size.c.candidates, found)
        .select_from(size.outerjoin(found, true()))
        .order_by(found.c.score.desc(), found.c.id, found.c.chunk_index)
    )


def _chunk(of: CTE, *columns: ColumnElement[Any]) -> LateralFromClause:
    """The row of each chunk in `of`, one lookup each: LIMIT keeps the planner from reading a whole tenant to join it."""
    chunk = tenant_documents
    return (
        select(*columns)
        .where(
            chunk.c.tenant_id == bindparam("tenant_id", type_=Text),
            chunk.c.id == of.c.id,
            chunk.c.chunk_key == of.c.chunk_key,
        )
        .correlate(of)
        .limit(1)
        .lateral("chunk")
    )


def _similarity(mixed: Mixed) -> ColumnElement[Any]:
    if not mixed.similarity:
        return cast(null(), DOUBLE_PRECISION)
    query = bindparam("embedding", type_=Vector(mixed.wanted.dimensions))
    similarity: ColumnElement[float] = 1 - tenant_documents.c.embedding.cosine_distance(query)
    return similarity

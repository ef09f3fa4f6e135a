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
    )


def _share(method: Method, score: ColumnElement[Any], order: ColumnElement[Any], leg: CTE) -> ColumnElement[Any]:
    if method == "rrf":
        rank = func.row_number().over(order_by=(order, leg.c.id, leg.c.chunk_key))
        return literal(1.0) / (RANK_CONSTANT + rank)
    least, most = func.min(score).over(), func.max(score).over()
    return func.coalesce((score - least) / func.nullif(most - least, 0), literal(1.0))


def _shown(fused: CTE, size: CTE, mixed: Mixed) -> Select[Any]:
    chunk, source = tenant_documents, tenant_sources
    tenant = bindparam("tenant_id", type_=Text)
    similarity: ColumnElement[Any] = cast(null(), DOUBLE_PRECISION)
    if mixed.similarity:
        query = bindparam("embedding", type_=Vector(mixed.wanted.dimensions))
        similarity = 1 - chunk.c.embedding.cosine_distance(query)
    placed = (
        select(
            fused.c.id,
            fused.c.chunk_key,
            fused.c.text_score,
            fused.c.score,
            similarity.label("similarity"),
            chunk.c.content,
            chunk.c.doc_type,
            chunk.c.metadata,
            chunk.c.created_at,
            *([chunk.c.embedding] if mixed.wanted.vectors else []),
        )
        .join(chunk, and_(chunk.c.id == fused.c.id, chunk.c.chunk_key == fused.c.chunk_key))
        .where(chunk.c.tenant_id == tenant)
    )
    if mixed.wanted.thresholded:
        placed = placed.where(similarity >= bindparam("threshold", type_=Float))
    if mixed.wanted.grouped:
        placed = placed.ext(distinct_on(fused.c.id)).order_by(fused.c.id, fused.c.score.desc(), fused.c.chunk_key)
    every = placed.subquery("placed")
    top = select(every).order_by(every.c.score.desc(), every.c.id, every.c.chunk_key)
    best = top.limit(bindparam("top_k", type_=Integer)).subquery("best")
    place = func.array_position(source.c.chunk_keys, best.c.chunk_key)
    found = (
        select(
            *(column for column in best.c if column.name != "chunk_key"),
            (place - 1).label("chunk_index"),
            source.c.start_offsets[place].label("start_offset"),
        )
        .join(source, source.c.id == best.c.id)
        .where(source.c.tenant_id == tenant)
        .subquery("found")
    )
    return (
        select(size.c.candidates, found)
        .select_from(size.outerjoin(found, true()))
        .order_by(found.c.score.desc(), found.c.id, found.c.chunk_index)
    )

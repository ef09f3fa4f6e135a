"""Search by words, and by words and vectors together: two legs under the same conditions, fused in one statement.

Each leg gives its best `leg_k` chunks. `relative` takes the similarity and the BM25 of every chunk that either leg found,
whichever it was, brings each to 0..1 and adds them; then again, with nearness to the mean of the best three beside the
similarity (Rocchio's feedback, over what was found already). `rrf`, reciprocal rank fusion (Cormack, Clarke and Buettcher
2009), adds 1 / (RANK_CONSTANT + rank) of each leg. Both take the legs' weights. The threshold is on cosine similarity here
as everywhere. docs/search.md has what each finds.
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
from app.conditions import VIEWS, Conditions, Relations
from app.scans import Strategy, Wanted
from app.tables import Vector

Method = Literal["rrf", "relative"]

RANK_CONSTANT = 60
"""The k of reciprocal rank fusion, as in its paper."""

LEG = 100
"""Chunks each leg gives at least."""

SHARES = (0.6, 0.4)
"""What similarity and words count in `relative` before the caller's weights."""

FEEDBACK, FEEDBACK_WEIGHT = 3, 0.3
"""How many of the best chunks are taken to be relevant, and what nearness to their mean counts beside similarity."""


class Mixed(NamedTuple):
    """What a statement is built for beside the conditions. `strategy` None: by words only."""

    wanted: Wanted
    strategy: Strategy | None
    method: Method = "relative"
    similarity: bool = True  # there is a vector to compare with


def build(conditions: Conditions, mixed: Mixed, relations: Relations = VIEWS) -> Select[Any]:
    """The statement.

    Parameters: those of `text.ranked`; with a vector leg those of `scans.leg` with the limit leg_k, vector_weight and
    text_weight; embedding, top_k, and threshold where one is wanted.
    """
    question = text.words(relations)
    words = text.ranked(conditions, question, relations=relations)
    if mixed.strategy is None:
        size = select(func.count().label("candidates")).select_from(words).cte("size")
        fused = _words_only(words)
    else:
        hit, size = scans.leg(mixed.strategy, conditions, mixed.wanted._replace(grouped=False), "leg_k", relations)
        fused = _by_ranks(hit, words) if mixed.method == "rrf" else _by_scores(hit, words, question, mixed, relations)
    return _shown(fused, size, mixed, relations)


def _words_only(words: CTE) -> CTE:
    score = words.c.text_score
    return select(words.c.id, words.c.chunk_key, score, score.label("score")).cte("fused")


def _by_ranks(hit: CTE, words: CTE) -> CTE:
    """id, chunk_key, text_score and the sum of the reciprocal ranks of every chunk that one of the legs found."""

    def ranked(leg: CTE, order: ColumnElement[Any], name: str) -> CTE:
        rank = func.row_number().over(order_by=(order, leg.c.id, leg.c.chunk_key))
        return select(leg, (literal(1.0) / (RANK_CONSTANT + rank)).label("share")).cte(name)

    vector = ranked(hit, hit.c.distance, "vector_leg")
    worded = ranked(words, words.c.text_score.desc(), "word_leg")
    vector_share, word_share = (func.coalesce(leg.c.share, literal(0.0)) for leg in (vector, worded))
    return (
        _met(vector, worded, _weighted(vector_share, word_share).label("score"))
        .cte("fused")
        .prefix_with("MATERIALIZED")
    )


def _by_scores(hit: CTE, words: CTE, question: CTE, mixed: Mixed, relations: Relations) -> CTE:
    """The same of the scores: both of them of every chunk, whichever leg found it, then the vectors' once more.

    Looked up rather than joined, as in `_chunk`: a chunk that only the words found has its vector measured, one that only
    the vectors found has its words scored.
    """
    met = _met(hit, words).cte("met").prefix_with("MATERIALIZED")
    similarity = _similarity(mixed, relations).label("similarity")
    chunk = _chunk(relations, met, relations.documents.c.embedding, similarity)
    scored = text.score_of(met, question, relations)
    measured = (
        select(
            met.c.id,
            met.c.chunk_key,
            func.nullif(func.coalesce(met.c.text_score, scored.c.score), literal(0.0)).label("text_score"),
            chunk.c.embedding,
            chunk.c.similarity,
        )
        .select_from(met.join(question, true()).join(chunk, true()).outerjoin(scored, true()))
        .cte("measured")
        .prefix_with("MATERIALIZED")
    )
    first = select(measured, _weighted(*_shares(measured, measured.c.similarity)).label("score")).cte("first")
    relevant = (
        select(first.c.embedding).order_by(first.c.score.desc(), first.c.id, first.c.chunk_key).limit(FEEDBACK)
    ).subquery("relevant")
    middle = select(func.avg(relevant.c.embedding)).scalar_subquery()
    nearness = measured.c.similarity + FEEDBACK_WEIGHT * (1 - measured.c.embedding.cosine_distance(middle))
    second = (
        select(measured.c.id, measured.c.chunk_key, measured.c.text_score, nearness.label("nearness"))
        .cte("second")
        .prefix_with("MATERIALIZED")
    )
    score = _weighted(*_shares(second, second.c.nearness)).label("score")
    fused = select(second.c.id, second.c.chunk_key, second.c.text_score, score)
    return fused.cte("fused").prefix_with("MATERIALIZED")


def _met(vector: CTE, worded: CTE, *columns: ColumnElement[Any]) -> Select[Any]:
    """id, chunk_key and text_score of what either leg found."""
    same = and_(vector.c.id == worded.c.id, vector.c.chunk_key == worded.c.chunk_key)
    return select(
        func.coalesce(vector.c.id, worded.c.id).label("id"),
        func.coalesce(vector.c.chunk_key, worded.c.chunk_key).label("chunk_key"),
        worded.c.text_score,
        *columns,
    ).select_from(vector.join(worded, same, full=True))


def _weighted(vector: ColumnElement[float], worded: ColumnElement[float]) -> ColumnElement[float]:
    sum_: ColumnElement[float] = vector * bindparam("vector_weight", type_=Float) + worded * bindparam(
        "text_weight", type_=Float
    )
    return sum_


def _shares(scored: CTE, nearness: ColumnElement[Any]) -> tuple[ColumnElement[float], ColumnElement[float]]:
    """What vectors and words add, each brought to 0..1: between the least and the most of `scored`, and from no word on."""
    least, most, words = func.min(nearness).over(), func.max(nearness).over(), scored.c.text_score
    # The first division is 0 / 0 where all are equally near, the second where no chunk holds a word.
    vector = func.coalesce(_divided(nearness - least, func.nullif(most - least, literal(0.0))), literal(1.0))
    worded = func.coalesce(_divided(words, func.max(words).over()), literal(0.0))
    return SHARES[0] * vector, SHARES[1] * worded


def _divided(part: ColumnElement[Any], whole: ColumnElement[Any]) -> ColumnElement[float]:
    """In double precision, where SQLAlchemy's own division would go by way of numeric."""
    return part.op("/", precedence=8, return_type=Float())(whole)


def _shown(fused: CTE, size: CTE, mixed: Mixed, relations: Relations) -> Select[Any]:
    """The best with what a caller sees of a chunk; at least one row: `candidates` stands in each."""
    passing: FromClause = fused
    if mixed.wanted.thresholded:
        near = _chunk(relations, fused, _similarity(mixed, relations).label("similarity"))
        above = near.c.similarity >= bindparam("threshold", type_=Float)
        passing = select(fused).select_from(fused.join(near, true())).where(above).subquery("passing")
    ordered = (passing.c.score.desc(), passing.c.id, passing.c.chunk_key)
    best = select(passing).order_by(*ordered)
    if mixed.wanted.grouped:
        first = select(passing).ext(distinct_on(passing.c.id)).order_by(passing.c.id, *ordered).subquery("first")
        best = select(first).order_by(first.c.score.desc(), first.c.id, first.c.chunk_key)
    top = best.limit(bindparam("top_k", type_=Integer)).cte("best").prefix_with("MATERIALIZED")
    columns = relations.documents.c
    chunk = _chunk(
        relations,
        top,
        columns.content,
        columns.doc_type,
        columns.metadata,
        columns.created_at,
        _similarity(mixed, relations).label("similarity"),
        *([columns.embedding] if mixed.wanted.vectors else []),
    )
    source = relations.sources
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
        select(*size.c, found)
        .select_from(size.outerjoin(found, true()))
        .order_by(found.c.score.desc(), found.c.id, found.c.chunk_index)
    )


def _chunk(relations: Relations, of: CTE, *columns: ColumnElement[Any]) -> LateralFromClause:
    """The row of each chunk in `of`, one lookup each: LIMIT keeps the planner from reading a whole tenant to join it."""
    chunk = relations.documents
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


def _similarity(mixed: Mixed, relations: Relations) -> ColumnElement[Any]:
    if not mixed.similarity:
        return cast(null(), DOUBLE_PRECISION)
    query = bindparam("embedding", type_=Vector(mixed.wanted.dimensions))
    similarity: ColumnElement[float] = 1 - relations.documents.c.embedding.cosine_distance(query)
    return similarity

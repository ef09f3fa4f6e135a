"""Full-text search: exact BM25 (k1 = 1.2, b = 0.75) within one tenant, under the same conditions as the vector search.

One statement. `text_question` gives the question's words, their weights and the most each can add to a score. Then
passes: the index finds the chunks whose words could together reach a threshold, those are scored, and the best are the
answer if the last of them reaches the threshold, for then nothing outside can. If not, its score, or less where too few
were found, is the threshold of the next pass. docs/text-search.md tells it with sources and figures.

Words are alternatives; a "phrase" or -exclusion restricts what is found and adds nothing to a score but its words.
"""

from collections.abc import Hashable
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Float,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    func,
    literal,
    null,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, REAL, TSQUERY, aggregate_order_by

from app import filters
from app.database import Database, Rendered, rendered
from app.drafts import check_text
from app.search import EXACT, MAX_QUERY_BYTES, Conditions, where, where_values
from app.settings import Settings
from app.tables import Vector, tenant_document_terms, tenant_documents, tenant_sources

K1, B = 1.2, 0.75

MOST_TERMS = 12
"""Words of a question that count: the most selective. The scoring expression is written out for so many."""

FIRST = 0.6
"""First threshold, as a share of the sum of the words' upper bounds. Too high costs a cheap pass, too low a dear one."""

LOWER = (0.42, 0.3, 0.2, 0.1)
"""The next ones where too few chunks were found; then every chunk that holds a word is scored."""

CONFIG = EXACT | {"enable_seqscan": "off", "jit": "off", "max_parallel_workers_per_gather": "0"}
"""Settings under which the planner takes the index of the words whatever it believes of an unknown query."""

_Numbers = ARRAY(DOUBLE_PRECISION)
_Keys = ARRAY(Text(collation="C"))
_tenant = bindparam("tenant_id", type_=Text)


class TextHit(NamedTuple):
    """One chunk found. `text_score` is its BM25 score, above 0 and without an upper limit.

    `similarity` is its cosine similarity to the embedding in [-1, 1], None where none was given.
    """

    id: str
    chunk_index: int
    content: str
    text_score: float
    doc_type: str | None
    metadata: dict[str, Any]
    created_at: datetime
    start_offset: int
    similarity: float | None = None


async def search(
    database: Database,
    settings: Settings,
    tenant_id: str,
    question: str,
    *,
    top_k: int = 10,
    conditions: Conditions | None = None,
    embedding: npt.NDArray[np.float32] | None = None,
) -> list[TextHit]:
    """The chunks of `tenant_id` with the highest BM25 score, best first; ties by id, then by place in the document.

    Fewer than `top_k` where fewer satisfy the conditions and hold one of the words. `embedding`, shape (dimensions,):
    for `similarity`. Raises BadInput for a question that is blank or longer than MAX_QUERY_BYTES.
    """
    check_text("query", question, 1, MAX_QUERY_BYTES)
    conditions = conditions or Conditions()
    statement = _statement(conditions, None if embedding is None else len(embedding))
    asked = {} if embedding is None else {"embedding": embedding}
    asked |= values(settings, tenant_id, question, top_k, conditions)
    (rows,) = await database.fetch(tenant_id, [statement.with_values("text", asked)], CONFIG)
    return [TextHit(**row) for row in rows]


def values(
    settings: Settings, tenant_id: str, question: str, top_k: int, conditions: Conditions
) -> dict[str, Any]:
    """The values of `ranked`."""
    asked = {"question": question, "text_k": top_k}
    if _narrowed(conditions):
        asked["text_bound"] = settings.exact_rows
    return asked | where_values(tenant_id, conditions)


def build(conditions: Conditions, *, dimensions: int | None = None) -> Select[Any]:
    """The statement of a search. Parameters: those of `ranked`, and embedding where `dimensions` are given."""
    leg = ranked(conditions)
    chunk = tenant_documents
    place = func.array_position(tenant_sources.c.chunk_keys, leg.c.chunk_key)
    shown = (
        select(
            leg.c.id,
            (place - 1).label("chunk_index"),
            chunk.c.content,
            leg.c.text_score,
            chunk.c.doc_type,
            chunk.c.metadata,
            chunk.c.created_at,
            tenant_sources.c.start_offsets[place].label("start_offset"),
        )
        .select_from(leg)
        .join(chunk, and_(chunk.c.id == leg.c.id, chunk.c.chunk_key == leg.c.chunk_key, chunk.c.tenant_id == _tenant))
        .join(tenant_sources, and_(tenant_sources.c.id == leg.c.id, tenant_sources.c.tenant_id == _tenant))
        .order_by(leg.c.text_score.desc(), leg.c.id, place)
    )
    if dimensions is not None:
        distance = chunk.c.embedding.cosine_distance(bindparam("embedding", type_=Vector(dimensions)))
        shown = shown.add_columns((1 - distance).label("similarity"))
    return shown


def ranked(conditions: Conditions, name: str = "text_leg") -> CTE:
    """The best `text_k` chunks: id, chunk_key, text_score. For any statement under CONFIG.

    Parameters: question, text_k, those of `where`, and text_bound where there are conditions: up to so many rows that
    satisfy them, all of these are scored instead of searching for the words.
    """
    top_k = bindparam("text_k", type_=Integer)
    question = _question()
    threshold: ColumnElement[Any] = question.c.total * literal(FIRST, DOUBLE_PRECISION)
    size = _size(conditions) if _narrowed(conditions) else None
    begun = select(
        literal(0).label("step"),
        threshold.label("threshold"),
        literal(False).label("proven"),
        cast(null(), _Keys).label("ids"),
        cast(null(), _Keys).label("keys"),
        cast(null(), _Numbers).label("scores"),
    ).where(question.c.total > 0)
    if size is not None:
        begun = begun.with_only_columns(
            *(
                case((size.c.rows <= _bound(), 0.0), else_=threshold).label("threshold") if c.name == "threshold" else c
                for c in begun.selected_columns
            )
        ).join_from(question, size, true())
    done = begun.cte("pass", recursive=True)
    found = _found(conditions, question, done, size)
    lowest = found.c.scores[top_k]
    lower = cast(func.array([]), _Numbers)
    steps = func.coalesce(cast(list(LOWER), _Numbers)[done.c.step + 1], 0.0)
    del lower
    done = done.union_all(
        select(
            done.c.step + 1,
            func.coalesce(lowest, func.least(done.c.threshold, question.c.total * steps)),
            or_(done.c.threshold <= 0, func.coalesce(lowest >= done.c.threshold, literal(False))),
            found.c.ids,
            found.c.keys,
            found.c.scores,
        )
        .select_from(done.join(question, true()).join(found, true()))
        .where(~done.c.proven)
    )
    best = (
        func.unnest(done.c.ids, done.c.keys, done.c.scores)
        .table_valued(
            column("id", Text(collation="C")),
            column("chunk_key", Text(collation="C")),
            column("text_score", DOUBLE_PRECISION),
            name="best",
        )
        .render_derived()
    )
    return (
        select(best.c.id, best.c.chunk_key, best.c.text_score)
        .select_from(done.join(best, true()))
        .where(done.c.proven)
        .cte(name)
    )


def _narrowed(conditions: Conditions) -> bool:
    return conditions != Conditions()


def _bound() -> ColumnElement[int]:
    return bindparam("text_bound", type_=Integer)


def _question() -> CTE:
    asked = func.text_question(_tenant, bindparam("question", type_=Text), literal(MOST_TERMS, Integer)).table_valued(
        column("terms", ARRAY(Text)),
        column("queries", ARRAY(TSQUERY)),
        column("weights", _Numbers),
        column("bounds", _Numbers),
        column("total", DOUBLE_PRECISION),
        column("mean_length", DOUBLE_PRECISION),
        column("required", Text),
        column("restriction", TSQUERY),
        name="asked",
    )
    return select(asked).cte("question").prefix_with("MATERIALIZED")


def _size(conditions: Conditions) -> CTE:
    counted = (
        select(literal(1).label("one"))
        .select_from(tenant_documents)
        .where(*where(conditions))
        .limit(_bound() + 1)
        .subquery("counted")
    )
    return select(func.count().label("rows")).select_from(counted).cte("size").prefix_with("MATERIALIZED")


def _found(conditions: Conditions, question: CTE, done: CTE, size: CTE | None) -> Any:
    """The best chunks of one pass, as three arrays."""
    chunk = tenant_document_terms
    length = chunk.c.length.cast(DOUBLE_PRECISION) / question.c.mean_length
    shown = select(
        chunk.c.id,
        chunk.c.chunk_key,
        chunk.c.terms,
        (literal(K1 * (1 - B), DOUBLE_PRECISION) + literal(K1 * B, DOUBLE_PRECISION) * length).label("norm"),
    ).where(
        chunk.c.tenant_id == _tenant,
        or_(question.c.restriction.is_(None), chunk.c.terms.op("@@")(question.c.restriction)),
    )
    formula = func.text_candidates(question.c.terms, question.c.bounds, done.c.threshold, question.c.required)
    holds = func.tenant_terms(chunk.c.tenant_id, chunk.c.terms).op("@@")(formula)
    by_words = shown.where(holds)
    source: Any
    if size is None:
        source = by_words
    else:
        passing = and_(chunk.c.id == tenant_documents.c.id, chunk.c.chunk_key == tenant_documents.c.chunk_key)
        both = chunk.join(tenant_documents, passing)
        clauses = where(conditions)
        rows = select(size.c.rows).scalar_subquery()
        source = union_all(
            by_words.select_from(both).where(*clauses, rows > _bound()),
            shown.select_from(both).where(*clauses, rows <= _bound()),
        )
    # OFFSET keeps the norm from being computed again for every word.
    candidate = (
        source.offset(0).correlate(question, done) if size is None else source.offset(0)
    ).lateral("candidate")
    score = _score(candidate, question).label("score")
    scored = select(candidate.c.id, candidate.c.chunk_key, score).subquery("scored")
    return scored


def _score(candidate: Any, question: CTE) -> ColumnElement[float]:
    raise NotImplementedError

"""Full-text search: exact BM25 (k1 = 1.2, b = 0.75) within one tenant, under the same conditions as the vector search.

One statement. `text_question` gives the question's words, their weights and the most each can add to a score. Then
passes: the index finds the chunks whose words could together reach a threshold, those are scored, and the best are the
answer if the last of them reaches the threshold, for then nothing outside can. If not, its score, or less where too few
were found, is the threshold of the next pass. docs/text-search.md tells it with sources and figures.

Words are alternatives; a "phrase" or -exclusion restricts what is found and adds nothing to a score but its words.
"""

import re
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Integer,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    false,
    func,
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    text,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, TSQUERY, aggregate_order_by
from sqlalchemy.sql.selectable import LateralFromClause

from app.conditions import VIEWS, Conditions, Relations
from app.drafts import MAX_QUERY_BYTES, check_text, is_blank
from app.errors import BadInput
from app.settings import Settings

K1, B = 1.2, 0.75

TERMS = (6, 12, 24)
"""The score is written out for so many words, in parts: a question of few words does not look at the later ones.

Of a question with more than the last the most selective count.
"""

READING = 12_000
"""Chunks that hold a question's words, counted word by word: past so many only the 8 most selective words count."""

FIRST = 0.8
"""First threshold, as a share of the sum of the words' upper bounds. Too high costs a cheap pass, too low a dear one."""

LOWER = (0.42, 0.3, 0.2, 0.1)
"""The next ones where too few chunks were found; then every chunk that holds a word is scored."""

EXACT_ROWS = 5_000
"""Rows that satisfy the conditions up to which all of them are scored, where PGRECALL_EXACT_ROWS is not set."""

CONFIG = {"enable_seqscan": "off"}
"""Settings under which the planner takes the index of the words whatever it believes of an unknown query."""

TERM_SCORE = (
    "coalesce(question.weights[{n}] / (1 + candidate.norm / nullif(round(1 / (1.64493406685 - 1.64493406685"
    " * ts_rank('{{1,1,1,1}}', candidate.terms, question.queries[{n}])) - 0.5), 0)), 0)"
)
"""What one word adds to a chunk's score: weight * tf / (tf + norm), with idf and k1 + 1 in the weight.

With even weights, `ts_rank` of one word that stands tf times is (1 + 1/4 + ... + 1/tf^2) / 1.64493406685, pi squared by
six, and what that sum lacks in the end is nearly 1 / (tf + 1/2). So tf is read out of a tsvector exactly, in a tenth of
the time that `unnest` takes.
"""

_NUMBERS: ARRAY[Any] = ARRAY(DOUBLE_PRECISION)
_KEYS: ARRAY[Any] = ARRAY(Text)
_NO_KEYS = literal_column('null::text[] collate "C"', _KEYS)
_LOWER = literal_column(f"(array{list(LOWER)})", _NUMBERS)
_tenant = bindparam("tenant_id", type_=Text)


def plain(question: str) -> str:
    """The question without what quotation marks and minus signs would ask: for prose that nobody wrote as a search."""
    return re.sub(r'"|(?<!\S)-', " ", question)


def values(settings: Settings, question: str, text_k: int, conditions: Conditions) -> dict[str, Any]:
    """The values of `ranked` but for those of `where`. Raises BadInput for a question that is blank or too long."""
    check_text("query", question, 1, MAX_QUERY_BYTES)
    if is_blank(question):
        raise BadInput("query", "is white space only; allowed: a text")
    asked = {"question": question, "text_k": text_k}
    if conditions != Conditions():
        asked["text_bound"] = EXACT_ROWS if settings.exact_rows is None else settings.exact_rows
    return asked


def ranked(conditions: Conditions, question: CTE, name: str = "text_leg", relations: Relations = VIEWS) -> CTE:
    """The best `text_k` chunks: id, chunk_key, text_score. For any statement that is run under CONFIG.

    `question` is what `words` gives. Parameters: question, text_k, those of `where`, and text_bound where there are
    conditions: up to so many rows that satisfy them are all scored, rather than found by their words.
    """
    size = _size(conditions, relations) if conditions != Conditions() and relations.word_index else None
    # Without an index of the words every pass would look at every row: there is one.
    first: ColumnElement[float] = (
        question.c.total * _number(FIRST) if relations.word_index else cast(0, DOUBLE_PRECISION)
    )
    if size is not None:
        first = case((select(size.c.rows).scalar_subquery() <= _bound(), _number(0)), else_=first)
    passes = (
        select(
            literal(0, Integer).label("step"),
            first.label("threshold"),
            false().label("proven"),
            _NO_KEYS.label("ids"),
            _NO_KEYS.label("chunk_keys"),
            cast(null(), _NUMBERS).label("scores"),
        )
        .where(question.c.total > 0)
        .cte("pass", recursive=True)
    )
    found = _found(question, passes, _candidates(conditions, question, passes, size, relations))
    last_score = found.c.scores[bindparam("text_k", type_=Integer)]
    lower = question.c.total * func.coalesce(_LOWER[passes.c.step + 1], _number(0))
    passes = passes.union_all(
        select(
            passes.c.step + 1,
            func.coalesce(last_score, func.least(passes.c.threshold, lower)),
            or_(passes.c.threshold <= 0, func.coalesce(last_score >= passes.c.threshold, false())),
            found.c.ids,
            found.c.chunk_keys,
            found.c.scores,
        )
        .select_from(passes.join(question, true()).join(found, true()))
        .where(not_(passes.c.proven))
    )
    best = (
        func.unnest(passes.c.ids, passes.c.chunk_keys, passes.c.scores)
        .table_valued(
            column("id", Text), column("chunk_key", Text), column("text_score", DOUBLE_PRECISION), name="best"
        )
        .render_derived()
    )
    return (
        select(best.c.id, best.c.chunk_key, best.c.text_score)
        .select_from(passes.join(best, true()))
        .where(passes.c.proven)
        .cte(name)
    )


def _number(value: float) -> ColumnElement[float]:
    return literal(value, DOUBLE_PRECISION)


def _bound() -> ColumnElement[int]:
    return bindparam("text_bound", type_=Integer)


def score_of(met: CTE, question: CTE, relations: Relations = VIEWS) -> LateralFromClause:
    """For each chunk of `met` without a text_score its BM25, as `ranked` would give it: `score`; no row where none is due.

    `met` has id, chunk_key and text_score. A chunk that a phrase or an exclusion forbids has no score.
    """
    chunk = relations.terms
    candidate = (
        select(chunk.c.terms, _norm(question, relations))
        .where(
            met.c.text_score.is_(None),
            chunk.c.tenant_id == _tenant,
            chunk.c.id == met.c.id,
            chunk.c.chunk_key == met.c.chunk_key,
            _allowed(question, relations),
        )
        .correlate(met, question)
        .offset(0)
        .lateral("candidate")
    )
    return select(score().label("score")).select_from(candidate).correlate(met, question).lateral("scored")


def words(relations: Relations = VIEWS) -> CTE:
    """The question's words with weights and bounds, for `ranked` and `score_of`. Parameters: tenant_id, question."""
    asked = getattr(func, relations.question)(
        _tenant, bindparam("question", type_=Text), literal(TERMS[-1], Integer), literal(READING, Integer)
    ).table_valued(
        column("terms", ARRAY(Text)),
        column("queries", ARRAY(TSQUERY)),
        column("weights", _NUMBERS),
        column("bounds", _NUMBERS),
        column("total", DOUBLE_PRECISION),
        column("mean_length", DOUBLE_PRECISION),
        column("required", Text),
        column("restriction", TSQUERY),
        name="asked",
    )
    read = select(asked)
    if not relations.word_index:
        alternatives = func.array_to_string(cast(asked.c.queries, ARRAY(Text)), "|")
        read = read.add_columns(cast(alternatives, TSQUERY).label("alternatives"))
    return read.cte("question").prefix_with("MATERIALIZED")


def _size(conditions: Conditions, relations: Relations) -> CTE:
    counted = select(literal(1).label("one")).select_from(relations.documents).where(*relations.where(conditions))
    rows = func.count().label("rows")
    return select(rows).select_from(counted.limit(_bound() + 1).subquery("counted")).cte("text_size")


def _candidates(
    conditions: Conditions, question: CTE, passes: CTE, size: CTE | None, relations: Relations
) -> LateralFromClause:
    """The chunks one pass scores: id, chunk_key, terms, and `norm`, by which BM25 lets long chunks count less."""
    chunk, document = relations.terms, relations.documents
    passing = (
        select(chunk.c.id, chunk.c.chunk_key, chunk.c.terms, _norm(question, relations))
        .where(chunk.c.tenant_id == _tenant, _allowed(question, relations))
        .correlate(question, passes)
    )
    if relations.chunk_passes is not None:
        held = chunk.c.terms.op("@@")(question.c.alternatives)
        return passing.where(held, *relations.chunk_passes(conditions)).offset(0).lateral("candidate")
    formula = func.text_candidates(question.c.terms, question.c.bounds, passes.c.threshold, question.c.required)
    holding = func.tenant_terms(chunk.c.tenant_id, chunk.c.terms).op("@@")(formula)
    if size is None:
        # OFFSET keeps `norm` from being computed again for every word.
        return passing.where(holding).offset(0).lateral("candidate")
    filtered = passing.select_from(
        chunk.join(document, and_(document.c.id == chunk.c.id, document.c.chunk_key == chunk.c.chunk_key))
    ).where(*relations.where(conditions))
    rows = select(size.c.rows).scalar_subquery()
    return union_all(filtered.where(holding, rows > _bound()), filtered.where(rows <= _bound())).lateral("candidate")


def _norm(question: CTE, relations: Relations) -> ColumnElement[float]:
    length = cast(relations.terms.c.length, DOUBLE_PRECISION) / question.c.mean_length
    return (_number(K1 * (1 - B)) + _number(K1 * B) * length).label("norm")


def _allowed(question: CTE, relations: Relations) -> ColumnElement[bool]:
    restriction = question.c.restriction
    return or_(restriction.is_(None), relations.terms.c.terms.op("@@")(restriction))


def _found(question: CTE, passes: CTE, candidate: LateralFromClause) -> LateralFromClause:
    """The best of one pass as three arrays, best first."""
    top = (
        select(candidate.c.id, candidate.c.chunk_key, score().label("score"))
        .select_from(candidate)
        .correlate(question, passes)
        .order_by(text("score desc"), candidate.c.id, candidate.c.chunk_key)
        .limit(bindparam("text_k", type_=Integer))
        .lateral("top")
    )
    order = (top.c.score.desc(), top.c.id, top.c.chunk_key)
    return (
        select(
            *(
                func.array_agg(aggregate_order_by(top.c[name], *order), type_=kind).label(label)
                for name, kind, label in (
                    ("id", _KEYS, "ids"),
                    ("chunk_key", _KEYS, "chunk_keys"),
                    ("score", _NUMBERS, "scores"),
                )
            )
        )
        .where(top.c.score > 0)
        .lateral("found")
    )


def score() -> ColumnElement[float]:
    """BM25 of the row `candidate` for the words of the row `question`."""
    summed = "0"
    for first, last in reversed(list(pairwise((0, *TERMS)))):
        part = " + ".join(TERM_SCORE.format(n=n) for n in range(first + 1, last + 1))
        summed = f"{part} + case when cardinality(question.weights) > {last} then {summed} else 0 end"
    return literal_column(summed, DOUBLE_PRECISION)

"""Two embedding models side by side before one takes the other's place: the same queries, each space searched exactly.

Read as the tables' owner, without an index: what is compared is the models. With judged queries there are the figures of
`evaluate` with paired intervals; without, how much the nearest chunks of sampled ones have in common.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from pgvector.psycopg import register_vector

from app import comparison, statistics, swap
from app.change import Connection
from app.comparison import Comparison
from app.embedding import Embedder
from app.evaluation import Judged
from app.judgements import Question
from app.questions import vector as question_vector
from app.search import Scan
from app.statistics import Interval

OVERLAP = 10
"""Hits of which the common ones are counted."""

NEAREST_DOCUMENTS = """
select id, (1 - min(distance))::float8 as similarity
  from (select id, embedding <=> %(embedding)s as distance from {table} where tenant_id = %(tenant_id)s) d
 group by id order by similarity desc, id limit %(k)s
"""
"""The documents with the nearest chunks in one of the two tables."""

SAMPLED = """
select d.tenant_id, d.id, d.chunk_key from documents d
 where exists (select from pgrecall_run_documents r
                where r.tenant_id = d.tenant_id and r.id = d.id and r.chunk_key = d.chunk_key)
 order by hashtextextended(d.tenant_id || d.id || d.chunk_key, 0) limit %(sample)s
"""
"""Some chunks, the same ones each time."""

NEIGHBOURS = """
select d.id, d.chunk_key
  from {table} d, (select embedding from {table} where tenant_id = %(tenant_id)s and id = %(id)s and chunk_key = %(chunk_key)s) q
 where d.tenant_id = %(tenant_id)s and (d.id, d.chunk_key) <> (%(id)s, %(chunk_key)s)
 order by (d.embedding <=> q.embedding) + 0, d.id, d.chunk_key limit %(k)s
"""
"""The nearest other chunks of one in one of the two tables."""


class Overlap(NamedTuple):
    """Mean share of the first OVERLAP hits that both models have, and its 95 % interval (None for a single query)."""

    mean: float
    interval: Interval | None
    queries: int


class Trial(NamedTuple):
    """`judged`: the new model's figures against the former's, None without judged queries."""

    overlap: Overlap
    judged: Comparison | None


class Side(NamedTuple):
    """One of the two spaces: the table its vectors are in, and its embedder."""

    table: str
    embedder: Embedder


async def judged(
    connection: Connection,
    former: Side,
    new: Side,
    questions: Sequence[Question],
    k: int,
    advance: Callable[[], object],
) -> Trial:
    """The queries in both spaces. Raises BadInput, naming its line, for one that a model does not read whole."""
    register_vector(connection)
    found: dict[str, list[Judged]] = {former.table: [], new.table: []}
    for question in questions:
        for side in (former, new):
            vector = await question_vector(side.embedder, question.text, question.origin)
            values = {"tenant_id": question.tenant_id, "embedding": vector, "k": max(k, OVERLAP)}
            rows = connection.execute(_of(NEAREST_DOCUMENTS, side), values).fetchall()
            found[side.table].append(Judged(question, dict(rows), 0.0, Scan("exact")))
        advance()
    pairs = list(zip(found[former.table], found[new.table], strict=True))
    shares = [_share(list(a.found)[:OVERLAP], list(b.found)[:OVERLAP]) for a, b in pairs]
    rows = [[comparison.row(_first(one, k), k) for one in found[side.table]] for side in (new, former)]
    return Trial(_mean(shares), comparison.compare(*rows))


def sampled(connection: Connection, former: Side, new: Side, sample: int, advance: Callable[[], object]) -> Trial:
    """Sampled chunks, whose own vectors are the queries."""
    shares = []
    for tenant_id, document_id, chunk_key in connection.execute(SAMPLED, {"sample": sample}).fetchall():
        values = {"tenant_id": tenant_id, "id": document_id, "chunk_key": chunk_key, "k": OVERLAP}
        pair = [connection.execute(_of(NEIGHBOURS, side), values).fetchall() for side in (former, new)]
        if pair[0]:
            shares.append(_share(*pair))
        advance()
    return Trial(_mean(shares), None)


def ndcg(trial: Trial) -> comparison.Difference:
    """How the nDCG of judged queries differs."""
    if trial.judged is None:
        raise ValueError("there are no judged queries")
    return next(each for name, each in trial.judged.differences.items() if name.startswith("ndcg@"))


def _first(one: Judged, k: int) -> Judged:
    return one._replace(found=dict(list(one.found.items())[:k]))


def _share(left: Sequence[Any], right: Sequence[Any]) -> float:
    most = max(len(left), len(right))
    return len(set(left) & set(right)) / most if most else 1.0


def _mean(shares: Sequence[float]) -> Overlap:
    if not shares:
        return Overlap(1.0, None, 0)
    interval = statistics.intervals(np.array([[share] for share in shares]))[0] if len(shares) > 1 else None
    return Overlap(float(np.mean(shares)), interval, len(shares))


def _of(statement: str, side: Side) -> bytes:
    if side.table not in ("documents", swap.SHADOW):
        raise ValueError(side.table)
    return statement.replace("{table}", side.table).encode()

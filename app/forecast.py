"""What changing the embedding model would take, before anything is changed: rows, tokens, money, time, disk, obstacles."""

import time
from typing import NamedTuple

from app import change
from app.change import Connection
from app.embedding import Embedder
from app.errors import BadInput
from app.model import Recorded
from app.tables import Kind

SAMPLE = 1_000
"""Chunks whose tokens are counted."""

TRIED = 32
"""Chunks that are embedded, to see that the model answers and how fast."""

MOST = 4_000
"""Dimensions beyond which pgvector indexes nothing."""

PAGE = 8_150
"""Bytes of a page that an index can fill."""

COUNTS = """
select count(*) as chunks, count(*) filter (where s.embedding_origin = 'caller') as callers,
       count(distinct (s.tenant_id, s.id)) as documents, count(distinct s.tenant_id) as tenants
  from documents d join sources s on s.tenant_id = d.tenant_id and s.id = d.id
"""
"""How much there is, and how many vectors callers brought."""

SAMPLED = """
select d.content from documents d join sources s on s.tenant_id = d.tenant_id and s.id = d.id
 where s.embedding_origin = 'pgrecall' order by hashtextextended(d.id || d.chunk_key, 0) limit %(sample)s
"""
"""Texts of some chunks, the same ones each time."""

SIZES = """
select pg_table_size('documents')::bigint as rows,
       coalesce(sum(pg_relation_size(x.indexrelid)) filter (where c.relname !~ '^documents_embedding_'), 0)::bigint as indexes
  from pg_index x join pg_class c on c.oid = x.indexrelid where x.indrelid = 'documents'::regclass
"""
"""Bytes of the table, and of its indexes other than those of the vectors."""


class Forecast(NamedTuple):
    """`tokens` and `too_long` are extrapolated from a sample. `seconds`: for embedding alone; `bytes`: on disk until `finish`.

    `cost` is None without a price. `obstacles`: why it cannot be done yet; `notes`: what to know.
    """

    model: str
    dimensions: int
    documents: int
    tenants: int
    chunks: int
    callers: int
    tokens: int
    cost: float | None
    seconds: float
    bytes: int
    kind: Kind
    too_long: int
    obstacles: list[str]
    notes: list[str]


async def of(
    connection: Connection, new: Recorded, embedder: Embedder, *, price: float | None, rate: float | None
) -> Forecast:
    """The forecast. Embeds a few stored chunks with the new model. `price` is of a million tokens, `rate` in chunks a second.

    Raises BadInput for more dimensions than an index takes, EmbeddingFailed where the model does not answer as it should.
    """
    if new.dimensions > MOST:
        raise BadInput(
            "--dimensions", f"{new.dimensions:,} is more than pgvector's index takes; allowed: 1 to {MOST:,}"
        )
    row = connection.execute(COUNTS).fetchone()
    chunks, callers, documents, tenants = row or (0, 0, 0, 0)
    texts = [content for (content,) in connection.execute(SAMPLED, {"sample": SAMPLE})]
    sizes = embedder.count_tokens(texts)
    ours = chunks - callers
    too_long = round(ours * sum(size > embedder.max_tokens for size in sizes) / max(1, len(texts)))
    tokens = round(ours * sum(sizes) / max(1, len(texts)))
    tried = [text for text, size in zip(texts, sizes, strict=True) if size <= embedder.max_tokens][:TRIED]
    begun = time.perf_counter()
    await embedder.embed(tried or ["a text"], "document")
    speed = max(1, len(tried)) / (time.perf_counter() - begun)
    if rate is not None:
        speed = min(speed, rate)
    now = connection.execute("select kind from vector_indexes where state = 'active'").fetchone()
    kind = change.chosen_kind(now[0] if now else "full", new.dimensions)
    table, indexes = connection.execute(SIZES).fetchone() or (0, 0)
    old = change.active(connection).dimensions
    size = table + 4 * (new.dimensions - old) * chunks + indexes + node_bytes(kind, new.dimensions) * chunks
    return Forecast(
        new.name,
        new.dimensions,
        documents,
        tenants,
        chunks,
        callers,
        tokens,
        None if price is None else tokens / 1e6 * price,
        ours / speed,
        max(size, 0),
        kind,
        too_long,
        change.refusals(connection),
        list(_notes(new, kind, callers, too_long, embedder)),
    )


def node_bytes(kind: Kind, dimensions: int) -> int:
    """Bytes that one row takes in an HNSW index (m = 16): whole pages where few rows share one."""
    vector = {"full": 4 * dimensions, "half": 2 * dimensions, "binary": dimensions // 8}[kind]
    node = vector + 350
    return 8_192 // (PAGE // node) if node <= PAGE else 2 * 8_192


def _notes(new: Recorded, kind: Kind, callers: int, too_long: int, embedder: Embedder) -> list[str]:
    notes = []
    if kind == "half":
        notes.append(
            f"the index is half precision{': above 2,000 dimensions pgvector indexes no other' if new.dimensions > 2_000 else ''}"
        )
    if callers:
        notes.append(
            f"{callers:,} chunks have vectors that their callers brought: they have to put them again with vectors of "
            f"{new.name} before the switch"
        )
    if too_long:
        notes.append(
            f"about {too_long:,} chunks are longer than the {embedder.max_tokens:,} tokens this model reads: their documents "
            "are cut anew, so that both models read every chunk whole; what changes is embedded with both"
        )
    return notes

"""What must hold of a database whatever was killed: looked at as its owner, counted by brute force."""

import hashlib
from functools import lru_cache

import numpy as np
import psycopg
from pgvector.psycopg import register_vector

from app import chunking
from app.embedding import Embedder
from app.settings import Settings
from tests import openai_server

Rows = list[tuple]

NOT_SO = {
    "chunks that no source lists, or lists twice": """
        select tenant_id, id, chunk_key from documents
        except all select tenant_id, id, unnest(chunk_keys) from sources""",
    "chunks listed and not there": """
        select tenant_id, id, unnest(chunk_keys) from sources
        except all select tenant_id, id, chunk_key from documents""",
    "labels of a chunk that are not its document's": """
        select d.tenant_id, d.id, d.chunk_key from documents d join sources s using (tenant_id, id)
         where (d.doc_type, d.metadata, d.created_at) is distinct from (s.doc_type, s.metadata, s.created_at)""",
    "chunks that are not ready": "select tenant_id, id, state, error from sources where state <> 'ready'",
    "digests that are not the text's": """
        select tenant_id, id from sources where content_sha256 is distinct from sha256(convert_to(content, 'UTF8'))""",
    "chunks without their words": """
        select tenant_id, id, chunk_key from documents except select tenant_id, id, chunk_key from document_terms""",
    "words that are not the chunk's": """
        select t.tenant_id, t.id, t.chunk_key from document_terms t left join documents d using (tenant_id, id, chunk_key)
         where d.content is null or t.terms <> chunk_terms(d.content)
            or t.length <> (select coalesce(sum(cardinality(positions)), 0) from unnest(t.terms))""",
    "words counted otherwise than they are": """
        with kept as (select tenant_id, term, sum(chunks) as chunks, max(peak) as peak, max(density) as density
                        from term_statistics group by 1, 2),
             counted as (select t.tenant_id, w.lexeme as term, count(*) as chunks, max(cardinality(w.positions)) as peak,
                                max(cardinality(w.positions)::float8 / t.length)::real as density
                           from document_terms t cross join unnest(t.terms) w group by 1, 2)
        select * from kept full join counted using (tenant_id, term)
         where coalesce(kept.chunks, 0) <> coalesce(counted.chunks, 0) or kept.peak < counted.peak
            or kept.density < counted.density""",
    "totals counted otherwise than they are": """
        with kept as (select tenant_id, sum(chunks) as chunks, sum(length) as length from collection_statistics group by 1),
             counted as (select tenant_id, count(*) as chunks, sum(length) as length from document_terms group by 1)
        select * from kept full join counted using (tenant_id)
         where coalesce(kept.chunks, 0) <> coalesce(counted.chunks, 0)
            or coalesce(kept.length, 0) <> coalesce(counted.length, 0)""",
    "transactions left open": """
        select pid, state, query from pg_stat_activity
         where datname = current_database() and state like 'idle in transaction%'
           and state_change < now() - interval '5 seconds'""",
}
"""What must not be found, each as a query that finds it."""

INDEXES = """
select c.relname, bt_index_check(c.oid, true) from pg_class c join pg_am a on a.oid = c.relam join pg_index i on i.indexrelid = c.oid
  join pg_class t on t.oid = i.indrelid
 where a.amname = 'btree' and t.relnamespace = (select relnamespace from pg_class where oid = 'sources'::regclass)
"""


def faults(connection: psycopg.Connection, settings: Settings, embedder: Embedder) -> list[str]:
    """Everything that is not as it must be, in words."""
    register_vector(connection)
    found = [f"{what}: {rows[:5]}" for what, query in NOT_SO.items() if (rows := connection.execute(query).fetchall())]
    chunks: dict[tuple[str, str], dict[str, tuple[str, np.ndarray]]] = {}
    for tenant, document, key, content, vector in connection.execute(
        "select tenant_id, id, chunk_key, content, embedding from documents"
    ):
        chunks.setdefault((tenant, document), {})[key] = content, vector.to_numpy()
    for tenant, document, text, keys, starts in connection.execute(
        "select tenant_id, id, content, chunk_keys, start_offsets from sources where state = 'ready'"
    ):
        expected = cut(text, embedder, settings.chunk_max_tokens, settings.chunk_overlap_tokens)
        if [(chunk.key, chunk.start) for chunk in expected] != list(zip(keys, starts, strict=True)):
            found.append(f"{tenant}/{document} is not cut as its text is")
        for chunk in expected:
            stored = chunks.get((tenant, document), {}).get(chunk.key)
            if stored is None or stored[0] != text[chunk.start : chunk.start + len(chunk.content)]:
                found.append(f"{tenant}/{document} chunk {chunk.key} is not a part of its text")
            elif not np.allclose(stored[1], vector_of(chunk.content, len(stored[1])), atol=1e-6):
                found.append(f"{tenant}/{document} chunk {chunk.key} has another text's vector")
    texts = {
        hashlib.sha256(content.encode()).digest(): content for each in chunks.values() for content, _ in each.values()
    }
    for digest, vector in connection.execute("select content_sha256, embedding from embedding_cache"):
        text = texts.get(bytes(digest))
        if text is not None and not np.allclose(vector.to_numpy(), vector_of(text, len(vector.to_numpy())), atol=1e-6):
            found.append(f"the cache has another vector for {text!r}")
    return found


def stored(connection: psycopg.Connection) -> dict[tuple[str, str], tuple[str, int]]:
    """Text and mark of every document."""
    rows = connection.execute("select tenant_id, id, content, (metadata ->> 'mark')::int from sources").fetchall()
    return {(tenant, document): (content, mark) for tenant, document, content, mark in rows}


@lru_cache(maxsize=20_000)
def vector_of(text: str, dimensions: int) -> np.ndarray:
    return openai_server.embedding(text, dimensions)


@lru_cache(maxsize=5_000)
def cut(text: str, embedder: Embedder, max_tokens: int, overlap_tokens: int) -> list[chunking.Chunk]:
    return chunking.chunk(text, embedder.count_tokens, max_tokens=max_tokens, overlap_tokens=overlap_tokens)

"""One peer in a process and an environment of its own, driven by bench/peers.py; imports numpy and the peer, no pgrecall.

    python -m bench.peer qdrant|chroma|langchain FOLDER ROWS ADDRESS

Loads what is not loaded yet and says so in a line of JSON. Then every line of JSON on standard input is a turn and is
answered by one: {"tenant", "filter", "clients", "seconds"} by {"latencies", "elapsed", "cpu", "ids"}, the ids by the
query's number. Chroma is only loaded here: its server is asked over HTTP by the same load as pgrecall's.

Each is set up as its documentation says for many tenants in one store, its indexes on every field that is filtered by;
otherwise at its defaults.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench import data
from bench.data import FILTERS, TENANTS, Corpus, Narrowing

TOP_K = 10
BATCH = 2_000
Search = Callable[[int, str | None, Narrowing], list[str]]


def batches(corpus: Corpus, chosen: Any = None) -> Iterator[list[tuple[int, data.Row]]]:
    """Rows with their numbers, BATCH at a time."""
    kept = set(range(len(corpus.vectors)) if chosen is None else chosen.tolist())
    part: list[tuple[int, data.Row]] = []
    for number, row in enumerate(corpus.rows()):
        if number in kept:
            part.append((number, row))
        if len(part) == BATCH:
            yield part
            part = []
    if part:
        yield part


def fields(corpus: Corpus, number: int, row: data.Row) -> dict[str, Any]:
    """What is filtered by, flat; `day` counts from data.EPOCH."""
    return {"tenant": row.tenant, "doc_type": row.doc_type, **row.metadata, "day": float(corpus.day[number])}


def progress(text: str) -> None:
    """A line for the person."""
    print(text, file=sys.stderr, flush=True)


def qdrant(corpus: Corpus, folder: Path, _: str) -> tuple[Search, dict[str, Any]]:
    """Qdrant's engine: keyword and float payload indexes, the tenant's marked `is_tenant`, then optimised."""
    import qdrant_edge as edge  # noqa: PLC0415  each process has only one of the peers in it

    done = folder / "loaded"
    if done.exists():
        shard = edge.EdgeShard.load(str(folder / "shard"))
    else:
        (folder / "shard").mkdir(parents=True)
        vectors = edge.EdgeVectorParams(size=corpus.vectors.shape[1], distance=edge.Distance.Cosine)
        shard = edge.EdgeShard.create(str(folder / "shard"), edge.EdgeConfig(vectors=vectors))
        kinds: dict[str, Any] = dict.fromkeys(("doc_type", "lang", "batch"), edge.PayloadSchemaType.Keyword)
        kinds |= {"tenant": edge.KeywordIndexParams(is_tenant=True), "day": edge.PayloadSchemaType.Float}
        for name, kind in kinds.items():
            shard.update(edge.UpdateOperation.create_field_index(name, kind))
        for part in batches(corpus):
            points = [
                edge.Point(n, corpus.vectors[n].tolist(), {"content": row.content, **fields(corpus, n, row)})
                for n, row in part
            ]
            shard.update(edge.UpdateOperation.upsert_points(points))
            progress(f"qdrant: {part[-1][0] + 1:,} points")
        shard.optimize()
        shard.flush()
        done.touch()
    progress(f"qdrant: {shard.info().indexed_vectors_count:,} vectors indexed")

    def search(number: int, tenant: str | None, narrowing: Narrowing) -> list[str]:
        must = [edge.FieldCondition(k, match=edge.MatchValue(v)) for k, v in equal(tenant, narrowing).items()]
        if narrowing.days is not None:
            low, high = narrowing.days
            must.append(edge.FieldCondition("day", range=edge.RangeFloat(gte=low, lt=high)))
        asked = edge.SearchRequest(
            query=edge.Query.Nearest(QUERIES[number]),
            limit=TOP_K,
            filter=edge.Filter(must=must) if must else None,
            with_payload=True,
        )
        return [f"d{point.id}" for point in shard.search(asked)]

    return search, {}


def equal(tenant: str | None, narrowing: Narrowing) -> dict[str, str]:
    """The conditions of equality."""
    given = {} if tenant is None else {"tenant": tenant}
    if narrowing.doc_type is not None:
        given["doc_type"] = narrowing.doc_type
    return given | dict(narrowing.metadata or {})


def chroma(corpus: Corpus, _: Path, address: str) -> tuple[Search | None, dict[str, Any]]:
    """Chroma's server: one collection for all, and for each tenant that is searched one of its own."""
    import chromadb  # noqa: PLC0415

    host, port = address.removeprefix("http://").split(":")
    client = chromadb.HttpClient(host, int(port))
    ids = {}
    for name in ("all", *TENANTS):
        chosen = None if name == "all" else corpus.passes(name, Narrowing())
        made = client.get_or_create_collection(f"tenant-{name}", configuration={"hnsw": {"space": "cosine"}})
        if made.count() != (len(corpus.vectors) if chosen is None else len(chosen)):
            for part in batches(corpus, chosen):
                made.upsert(
                    ids=[row.id for _, row in part],
                    embeddings=corpus.vectors[[n for n, _ in part]],
                    documents=[row.content for _, row in part],
                    metadatas=[fields(corpus, n, row) for n, row in part],
                )
                progress(f"chroma, {name}: {part[-1][0] + 1:,} rows")
        ids[name] = str(made.id)
    return None, {"collections": ids}


def langchain(corpus: Corpus, folder: Path, address: str) -> tuple[Search, dict[str, Any]]:
    """langchain-postgres: its table with a column for each field, its HNSW index, a b-tree on each field."""
    import psycopg  # noqa: PLC0415
    from langchain_core.embeddings import Embeddings  # noqa: PLC0415
    from langchain_postgres import Column, PGEngine, PGVectorStore  # noqa: PLC0415
    from langchain_postgres.v2.indexes import HNSWIndex  # noqa: PLC0415

    class Given(Embeddings):
        """Asked with vectors only."""

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            raise NotImplementedError

        def embed_query(self, text: str) -> list[float]:
            raise NotImplementedError

    engine = PGEngine.from_connection_string(address.replace("postgresql://", "postgresql+psycopg://", 1))
    columns = [Column(n, "text") for n in ("tenant", "doc_type", "lang", "batch")] + [Column("day", "float8")]
    names = [column.name for column in columns]

    def store() -> PGVectorStore:
        return PGVectorStore.create_sync(engine, Given(), "rows", metadata_columns=names, k=TOP_K)

    with psycopg.connect(address, autocommit=True) as owner:
        label = owner.execute("select obj_description(to_regclass('rows'))").fetchone()
        if label != (folder.parent.name,):
            owner.execute("drop table if exists rows")
            key = Column("langchain_id", "text", nullable=False)
            engine.init_vectorstore_table("rows", corpus.vectors.shape[1], metadata_columns=columns, id_column=key)
            # Its own way in is an INSERT for every row, which would take as long and make the same table.
            with owner.cursor().copy(
                f"copy rows (langchain_id, content, embedding, {', '.join(names)}) from stdin"
            ) as copy:
                for part in batches(corpus):
                    for n, row in part:
                        vector = "[" + ",".join(map(str, corpus.vectors[n].tolist())) + "]"
                        copy.write_row((row.id, row.content, vector, *fields(corpus, n, row).values()))
                    progress(f"langchain: {part[-1][0] + 1:,} rows")
            owner.execute("alter database langchain set maintenance_work_mem = '2GB'")
            for name in names:
                owner.execute(f"create index on rows ({name})")
            store().apply_vector_index(HNSWIndex())
            owner.execute("vacuum analyze rows")
            owner.execute(f"comment on table rows is '{folder.parent.name}'")
    opened = store()

    def search(number: int, tenant: str | None, narrowing: Narrowing) -> list[str]:
        given: dict[str, Any] = dict(equal(tenant, narrowing))
        if narrowing.days is not None:
            given["day"] = {"$between": list(narrowing.days)}
        found = opened.similarity_search_with_score_by_vector(QUERIES[number], k=TOP_K, filter=given or None)
        return [document.id or "" for document, _ in found]

    return search, {}


QUERIES: list[list[float]] = []


def turn(search: Search, tenant: str | None, narrowing: Narrowing, clients: int, seconds: float) -> dict[str, Any]:
    """Every client is a thread that asks one query after the other until the turn is over."""
    latencies: list[float] = []
    ids: dict[int, list[str]] = {}

    def client(first: int) -> None:
        number, now = first, time.perf_counter()
        while now < end:
            ids[number] = search(number, tenant, narrowing)
            before, now = now, time.perf_counter()
            latencies.append(now - before)
            number = (number + 1) % len(QUERIES)

    cpu, start = time.process_time(), time.perf_counter()
    end = start + seconds
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, (n * len(QUERIES) // clients for n in range(clients))))
    elapsed = time.perf_counter() - start
    return {"latencies": latencies, "elapsed": elapsed, "cpu": time.process_time() - cpu, "ids": ids}


def checksum(corpus: Corpus) -> list[float]:
    """Tells whether two processes made the same data."""
    sums = (corpus.vectors.sum(dtype=np.float64), corpus.queries.sum(dtype=np.float64), corpus.tenant.sum())
    return [round(float(each), 4) for each in sums]


def main(name: str, folder: str, rows: int, address: str) -> None:
    """Load, then serve turns until standard input ends."""
    corpus = data.corpus(rows)
    QUERIES.extend(corpus.queries.tolist())
    start = time.perf_counter()
    search, extra = {"qdrant": qdrant, "chroma": chroma, "langchain": langchain}[name](corpus, Path(folder), address)
    print(json.dumps({"loaded": time.perf_counter() - start, "checksum": checksum(corpus)} | extra), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        narrowing = FILTERS[asked["filter"]]
        if search is not None:
            print(json.dumps(turn(search, asked["tenant"], narrowing, asked["clients"], asked["seconds"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])

"""The corpus in an embedded PostgreSQL of its own, loaded once and found again by the next command.

Each layout is a database: migrated by the service's own migrations, filled by COPY as the owner, its vector and GIN
indexes built after, whatever they are in this release; then `vacuum analyze`.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pgvector.psycopg
import psycopg
from msgspec.structs import replace
from psycopg import sql
from psycopg.types.json import Jsonb

from app import embedded, local, schema, terminal
from app.api import search as api
from app.conditions import Conditions
from app.settings import LOCAL_DIMENSIONS, Settings
from bench import data
from bench.data import Corpus, Layout, Narrowing, chunk_key

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations" / "versions"
SEED = 11
TOP_K = 10

SLOW_INDEXES = """
select indexname, indexdef from pg_indexes
 where schemaname = current_schema and tablename = 'documents' and indexdef ~ ' USING (hnsw|gin) ' order by indexname
"""
"""The indexes that are built faster over rows that are there."""


class Loaded(NamedTuple):
    """A database with the corpus in it, the service's settings for it, and what loading took in seconds."""

    name: str
    settings: Settings
    corpus: Corpus
    took: dict[str, float]

    @property
    def owner_url(self) -> str:
        """As the tables' owner."""
        return self.settings.migration_url or ""

    @property
    def service_url(self) -> str:
        """As the service's login."""
        return self.settings.database_url or ""


@contextlib.contextmanager
def started(data_dir: Path) -> Iterator[embedded.Server]:
    """The server of this data folder, with the settings the embedded server has by default."""
    with contextlib.closing(embedded.start(data_dir / "pg")) as server:
        yield server


def empty(server: embedded.Server, name: str, dimensions: int = LOCAL_DIMENSIONS) -> Settings:
    """A new, migrated database in place of any of this name; the service's settings for it."""
    settings = Settings(
        database_url=server.url(local.SERVICE, name),
        migration_url=server.url(local.OWNER, name),
        openai_api_key="none",
        embedding_model="none",
        embedding_dimensions=dimensions,
    )
    if dimensions == LOCAL_DIMENSIONS:
        settings = Settings(database_url=settings.database_url, migration_url=settings.migration_url, embedder="local")
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
    local.bootstrap(server.url(), name)
    schema.migrate(settings)
    return settings


def made_by(*scripts: Path) -> str:
    """Another text when the generator, or one of these, is edited: what it had made is made again."""
    return sha256(b"".join(path.read_bytes() for path in (*scripts, Path(data.__file__)))).hexdigest()


def loaded(server: embedded.Server, rows: int, layout: Layout = "mixed") -> Loaded:
    """The database of this layout and size, as it was left or made now."""
    name = f"{layout}_{rows}"
    corpus = data.corpus(rows, layout=layout, dimensions=LOCAL_DIMENSIONS, seed=SEED)
    label = json.dumps(
        {"rows": rows, "layout": layout, "seed": SEED, "made_by": made_by(*sorted(MIGRATIONS.glob("*.py")))}
    )
    with psycopg.connect(server.url(), autocommit=True) as admin:
        found = admin.execute(
            "select shobj_description(oid, 'pg_database') from pg_database where datname = %s", (name,)
        ).fetchone()
        if found == (label,):
            urls = {"database_url": server.url(local.SERVICE, name), "migration_url": server.url(local.OWNER, name)}
            return Loaded(name, replace(Settings(embedder="local"), **urls), corpus, {})
        settings = empty(server, name)
        took = fill(server.url(local.OWNER, name), corpus, f"{layout}, {rows:,} rows")
        admin.execute(sql.SQL("comment on database {} is {}").format(sql.Identifier(name), sql.Literal(label)))
    return Loaded(name, settings, corpus, took)


def dropped(owner: psycopg.Connection[Any]) -> list[bytes]:
    """Drop the indexes that are better built later; the statements that build them."""
    found = owner.execute(SLOW_INDEXES).fetchall()
    for name, _ in found:
        owner.execute(sql.SQL("drop index {}").format(sql.Identifier(name)))
    return [definition.encode() for _, definition in found]


def fill(owner_url: str, corpus: Corpus, title: str, watch: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """COPY the corpus into `sources` and `documents`, build the indexes after; seconds of each step.

    `watch` is told the name of each step as it begins.
    """
    took: dict[str, float] = {}
    with psycopg.connect(owner_url, autocommit=True) as owner, terminal.progress("steps") as progress:
        pgvector.psycopg.register_vector(owner)
        indexes = dropped(owner)
        task = progress.add_task(title, total=2 * len(corpus.vectors) / 1e4 + len(indexes) * 10 + 1)

        @contextlib.contextmanager
        def step(name: str) -> Iterator[None]:
            watch(name)
            progress.update(task, description=f"{title}: {name}")
            start = time.perf_counter()
            yield
            took[name] = took.get(name, 0.0) + time.perf_counter() - start

        with step("copy"):
            for copy in (_copy_sources, _copy_documents):
                copy(owner, corpus, lambda: progress.advance(task, 0.1))
        owner.execute("set maintenance_work_mem = '2GB'")
        for definition in indexes:
            with step("hnsw" if b" USING hnsw " in definition else "gin"):
                owner.execute(definition)
            progress.advance(task, 10)
        with step("vacuum"):
            owner.execute("vacuum analyze sources, documents")
        progress.update(task, completed=progress.tasks[task].total)
    return took


def _copy_sources(owner: psycopg.Connection[Any], corpus: Corpus, advance: Callable[[], None]) -> None:
    with owner.cursor().copy(
        "copy sources (tenant_id, id, content, content_sha256, doc_type, metadata, created_at, chunk_keys, "
        "start_offsets, state, embedding_origin) from stdin (format binary)"
    ) as rows:
        rows.set_types(
            ["text", "text", "text", "bytea", "text", "jsonb", "timestamptz", "text[]", "int4[]", "text", "text"]
        )
        for number, row in enumerate(corpus.rows()):
            digest = sha256(row.content.encode()).digest()
            given = (row.tenant, row.id, row.content, digest, row.doc_type, Jsonb(row.metadata), row.created_at)
            rows.write_row((*given, [chunk_key(row.content)], [0], "ready", "caller"))
            if number % 1_000 == 0:
                advance()


def _copy_documents(owner: psycopg.Connection[Any], corpus: Corpus, advance: Callable[[], None]) -> None:
    with owner.cursor().copy(
        "copy documents (tenant_id, id, chunk_key, doc_type, metadata, created_at, content, embedding) "
        "from stdin (format binary)"
    ) as rows:
        rows.set_types(["text", "text", "text", "text", "jsonb", "timestamptz", "text", "vector"])
        for number, (row, vector) in enumerate(zip(corpus.rows(), corpus.vectors, strict=True)):
            key = chunk_key(row.content)
            rows.write_row(
                (row.tenant, row.id, key, row.doc_type, Jsonb(row.metadata), row.created_at, row.content, vector)
            )
            if number % 1_000 == 0:
                advance()


def conditions(narrowing: Narrowing) -> Conditions:
    """A narrowing as the service takes it."""
    after, before = narrowing.window or (None, None)
    return api.conditions(narrowing.doc_type, dict(narrowing.metadata or {}), after, before)


def body(tenant: str, narrowing: Narrowing, **asked: Any) -> dict[str, Any]:
    """The body of `POST /search` for a narrowing."""
    given: dict[str, Any] = {"tenant_id": tenant, "top_k": TOP_K} | asked
    if narrowing.doc_type is not None:
        given["doc_type"] = narrowing.doc_type
    if narrowing.metadata is not None:
        given["metadata"] = dict(narrowing.metadata)
    if narrowing.window is not None:
        given["created_after"], given["created_before"] = narrowing.window
    return given

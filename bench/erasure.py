"""How long it takes to erase a large tenant beside another: python -m bench.erasure --chunks 100000."""

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import psycopg
from msgspec.structs import replace

from app import embedded, erasure, local, schema
from app.database import Database
from app.settings import Settings

DIMENSIONS = 64
PER_DOCUMENT = 5

SOURCES = """
insert into sources (tenant_id, id, content, content_sha256, chunk_keys, start_offsets, state, embedding_model)
select %(tenant)s, 'd' || g, 'x', sha256('x'), array(select 'k' || k from generate_series(0, 4) k), array[0, 1, 2, 3, 4],
       'ready', 'm' from generate_series(1, %(chunks)s / 5) g
"""
CHUNKS = """
insert into documents (tenant_id, id, chunk_key, content, embedding)
select %(tenant)s, 'd' || (g / 5 + 1), 'k' || (g %% 5),
       (select string_agg('word' || (random() * random() * 20000)::int, ' ') from generate_series(1, 25) where g >= 0),
       (select array_agg(random() - 0.5) from generate_series(1, 64) where g >= 0)::vector
  from generate_series(0, %(chunks)s - 1) g
"""
WORDS = (
    "select learn_terms(%(tenant)s, array_agg(id), array_agg(chunk_key)) from documents where tenant_id = %(tenant)s"
)
CACHE = """
insert into embedding_cache (tenant_id, model, dimensions, input_type, content_sha256, embedding)
select tenant_id, 'm', 64, 'document', sha256(convert_to(content, 'UTF8')), embedding from documents
 where tenant_id = %(tenant)s on conflict do nothing
"""
INDEXES = "select indexname, indexdef from pg_indexes where indexname like 'documents_embedding_%'"


def fill(url: str, chunks: int) -> None:
    """The tenants `large` and `other`, a fifth as large; the vector indexes are built afterwards."""
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("set maintenance_work_mem = '512MB'")
        indexes = owner.execute(INDEXES).fetchall()
        for name, _ in indexes:
            owner.execute(f"drop index {name}".encode())
        for tenant, count in (("large", chunks), ("other", chunks // 5)):
            for statement in (SOURCES, CHUNKS, WORDS, CACHE):
                owner.execute(statement.encode(), {"tenant": tenant, "chunks": count})
        for _, definition in indexes:
            owner.execute(definition.encode())
        owner.execute("vacuum analyze")


async def erase(settings: Settings) -> None:
    """Erase the large tenant, then one document of the other."""
    database = Database(settings, settings.database_url or "")
    for name, erasing in (
        ("tenant", lambda: erasure.tenant(database, settings, "large")),
        ("document", lambda: erasure.document(database, settings, "other", "d7")),
    ):
        began = time.perf_counter()
        erased = await erasing()
        print(f"{name}: {time.perf_counter() - began:.2f} s, complete: {erased.complete}, removed: {erased.removed}")
    await database.close()


def main() -> None:
    """Fill an embedded database of its own, erase, vacuum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    chunks = parser.parse_args().chunks // PER_DOCUMENT * PER_DOCUMENT
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(embedded.start(Path(folder) / "pg")) as server:
        local.bootstrap(server.url(), local.DATABASE)
        owner_url = server.url(local.OWNER, local.DATABASE)
        settings = Settings(
            database_url=server.url(local.SERVICE, local.DATABASE),
            openai_api_key="none",
            embedding_model="text-embedding-3-small",
            embedding_dimensions=DIMENSIONS,
        )
        schema.migrate(replace(settings, migration_url=owner_url))
        began = time.perf_counter()
        fill(server.url(database=local.DATABASE), chunks)
        print(f"filled in {time.perf_counter() - began:.0f} s")
        asyncio.run(erase(settings))
        print(f"vacuum: {erasure.vacuum(owner_url):.1f} s")


if __name__ == "__main__":
    main()

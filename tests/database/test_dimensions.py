"""Vectors of other lengths: put, searched exactly and through the index, which is half precision above 2,000."""

import numpy as np
import psycopg
import pytest
from psycopg import sql

from app import questions, search
from app.conditions import Conditions
from app.database import Database
from app.drafts import Draft
from app.embedding import open_embedder
from app.upsert import put
from tests.conftest import migrated, settings_for

COUNT = 260


@pytest.mark.parametrize("dimensions", [256, 384, 1_536, 3_072, 4_000])
async def test_put_and_search_at_this_length(cluster, openai, dimensions):
    name = f"long_{dimensions}_{id(openai)}"
    migrated(cluster, name, settings_for(None, openai.url, embedding_dimensions=dimensions))
    settings = settings_for(
        cluster.service(name), openai.url, embedding_dimensions=dimensions, exact_rows=100, ef_search=200
    )
    database, embedder = Database(settings, settings.database_url), open_embedder(settings)
    try:
        generator = np.random.default_rng(dimensions)
        vectors = generator.standard_normal((COUNT, dimensions)).astype(np.float32)
        drafts = [Draft(f"d{n:03}", f"text {n}", embedding=vector) for n, vector in enumerate(vectors)]
        await put(database, embedder, settings, "acme", drafts)
        await put(database, embedder, settings, "acme", [Draft("words", "Otters eat fish in the river.")])
        query = vectors[7] + 0.1 * generator.standard_normal(dimensions).astype(np.float32)
        similarity = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        found = await search.search(database, settings, "acme", query, top_k=10)
        assert found.scan == search.Scan("index", kind="full" if dimensions <= 2_000 else "half")
        expected = [f"d{n:03}" for n in np.argsort(-similarity)[:10]]
        assert found.hits[0].id == "d007"
        assert found.hits[0].similarity == pytest.approx(similarity[7], abs=1e-5)
        assert len({hit.id for hit in found.hits} & set(expected)) >= 9
        exact = await search.search(database, settings, "acme", query, conditions=Conditions(doc_types=("none",)))
        assert (exact.hits, exact.scan.strategy) == ([], "exact")
        words = await search.search(
            database, settings, "acme", await questions.vector(embedder, "what do otters eat"), top_k=1
        )
        assert words.hits[0].id == "words"
    finally:
        await database.close()
        await embedder.aclose()
        with psycopg.connect(cluster.admin, autocommit=True) as admin:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

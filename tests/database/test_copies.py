"""Copies of one text: in the graph each is near to nothing but the others, and a walk that meets them sees nothing else."""

import numpy as np
import pytest

from app import search, upsert
from app.database import Database
from app.drafts import Draft
from app.embedding import Embedder
from app.search import Options
from app.settings import Settings
from tests.conftest import DIMENSIONS

COPIES, OTHERS = 700, 10


@pytest.mark.parametrize("top_k", [1, 10])
async def test_a_tenant_full_of_copies_hides_nothing_else(
    database: Database, embedder: Embedder, settings: Settings, top_k: int
):
    made = np.random.default_rng(5).standard_normal((OTHERS + 1, DIMENSIONS)).astype(np.float32)
    blank, others = made[0], made[1:]
    copies = [Draft(f"blank/{n}", "This page is left blank.", embedding=blank) for n in range(COPIES)]
    rest = [Draft(f"page/{n}", f"Page {n}.", embedding=vector) for n, vector in enumerate(others)]
    await upsert.put(database, embedder, settings, "acme", copies)
    await upsert.put(database, embedder, settings, "acme", rest)
    for number, vector in enumerate(others):
        asked = 0.5 * vector + 0.5 * blank
        found = await search.search(database, settings, "acme", asked, top_k=top_k)
        exact = await search.search(database, settings, "acme", asked, top_k=top_k, options=Options(exact=True))
        assert [hit.similarity for hit in found.hits] == pytest.approx([hit.similarity for hit in exact.hits]), number
        asked = vector
        found = await search.search(database, settings, "acme", asked, top_k=1)
        assert [hit.id for hit in found.hits] == [f"page/{number}"], found.scan

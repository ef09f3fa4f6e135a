"""Documents ranked by their best chunk, until k of them are found."""

import numpy as np
import pytest
from msgspec.structs import replace

from app import evaluation
from tests.conftest import DIMENSIONS

QUERY = np.eye(1, DIMENSIONS, dtype=np.float32)[0]


def add(owner, document, similarities):
    """A document with a chunk of each of these similarities to QUERY."""
    keys = [f"k{n}" for n in range(len(similarities))]
    owner.execute(
        "insert into sources (tenant_id, id, content, chunk_keys, start_offsets, state) values ('t', %s, 'x', %s, %s, 'ready')",
        (document, keys, [0] * len(keys)),
    )
    copy = "copy documents (tenant_id, id, chunk_key, metadata, created_at, content, embedding) from stdin"
    with owner.cursor().copy(copy) as rows:
        for key, similarity in zip(keys, similarities, strict=True):
            vector = [similarity, (1 - similarity**2) ** 0.5, *[0] * (DIMENSIONS - 2)]
            rows.write_row(("t", document, key, "{}", "2026-01-01T00:00:00Z", "x", str(vector)))


@pytest.mark.parametrize("exact_rows", [5_000, 100], ids=["exact", "index"])
async def test_a_document_of_many_chunks_hides_no_other(database, settings, owner, exact_rows):
    add(owner, "long", np.linspace(0.9, 0.99, 1_200).tolist())
    for n in range(12):
        add(owner, f"short{n:02}", [0.1, 0.8 - n / 100])
    found = (await evaluation.best_documents(database, replace(settings, exact_rows=exact_rows), "t", QUERY, 10)).found
    assert list(found) == ["long", *(f"short{n:02}" for n in range(9))]
    assert list(found.values()) == pytest.approx([0.99, *(0.8 - n / 100 for n in range(9))], abs=1e-3)


async def test_fewer_documents_than_asked_for_and_none(database, settings, owner):
    assert (await evaluation.best_documents(database, settings, "t", QUERY, 10)).found == {}
    add(owner, "a", [0.5] * 30)
    assert list((await evaluation.best_documents(database, settings, "t", QUERY, 10)).found) == ["a"]


async def test_stored_tells_how_many_there_are_and_which_of_those_asked_for(database, owner):
    add(owner, "a", [0.5])
    add(owner, "b", [0.5])
    assert await evaluation.stored(database, "t", ["a", "z"]) == (2, {"a"})
    assert await evaluation.stored(database, "other", ["a"]) == (0, set())

"""Documents ranked by their best chunk, until k of them are found."""

import asyncio

import numpy as np
import pytest
from msgspec.structs import replace

from app import ann, evaluation, indexes, search
from app.judgements import Question
from app.search import Scan
from tests.conftest import DIMENSIONS

QUERY = np.eye(1, DIMENSIONS, dtype=np.float32)[0]
ASKED = Question("1", "one", "t", {"long": 1}, "f:1")


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
    changed = replace(settings, exact_rows=exact_rows)
    found, scan = await evaluation.best_documents(database, changed, ASKED, QUERY, 10)
    assert (scan == Scan("exact")) == (exact_rows == 5_000)
    assert list(found) == ["long", *(f"short{n:02}" for n in range(9))]
    assert list(found.values()) == pytest.approx([0.99, *(0.8 - n / 100 for n in range(9))], abs=1e-3)


async def test_fewer_documents_than_asked_for_and_none(database, settings, owner):
    assert await evaluation.best_documents(database, settings, ASKED, QUERY, 10) == ({}, Scan("exact"))
    add(owner, "a", [0.5] * 30)
    assert list((await evaluation.best_documents(database, settings, ASKED, QUERY, 10)).found) == ["a"]


async def test_stored_tells_how_many_there_are_and_which_of_those_asked_for(database, owner):
    add(owner, "a", [0.5])
    add(owner, "b", [0.5])
    assert await evaluation.stored(database, "t", ["a", "z"]) == (2, {"a"})
    assert await evaluation.stored(database, "other", ["a"]) == (0, set())


async def test_the_best_passage_of_each_document_found_or_not(database, owner):
    add(owner, "a", [0.2, 0.7])
    add(owner, "b", [-0.5])
    found = await evaluation.passages(database, "t", QUERY, ["a", "b", "missing"])
    assert {name: passage.similarity for name, passage in found.items()} == pytest.approx(
        {"a": 0.7, "b": -0.5}, abs=1e-3
    )
    assert found["a"].text == "x"
    assert await evaluation.passages(database, "other", QUERY, ["a"]) == {}


async def test_the_same_questions_under_other_settings(database, embedder, settings, owner):
    questions = [Question("1", "one", "t", {"d3": 1}, "f:1"), Question("2", "two", "t", {"d3": 1, "gone": 1}, "f:2")]
    for n in range(8):
        add(owner, f"d{n}", [n / 10])
    tried = await evaluation.alternatives(database, embedder, settings, questions, 10)
    assert [each.name for each in tried] == ["exact", *(f"ef_search {width}" for width in (20, 40, 100, 200, 250, 400))]
    for each in tried:
        assert (each.recall, each.agreement) == (0.75, 1.0)
        assert 0 < each.latency_ms["p50"] <= each.latency_ms["p95"]


async def test_a_quantised_index_is_tried_with_several_oversamplings(database, embedder, settings, owner, owner_url):
    vectors = np.random.default_rng(2).standard_normal((1_000, DIMENSIONS)).astype(np.float32)
    fill(owner, vectors)
    await asyncio.to_thread(
        indexes.change, owner_url, "binary", oversampling=3, told=lambda _what, _share: None, patience=0
    )
    questions = [Question(str(n), f"question {n}", "t", {"d0003": 1}, f"f:{n}") for n in range(20)]
    tried = {each.name: each for each in await evaluation.alternatives(database, embedder, settings, questions, 10)}
    assert [name for name in tried if name.startswith("oversampling")] == [
        f"oversampling {factor}" for factor in (1, 2, 3, 4, 10)
    ]
    shares = [tried[f"oversampling {factor}"].agreement for factor in (1, 3, 10)]
    assert shares[0] < shares[1] < shares[2]


def fill(owner, vectors, tenant="t"):
    """A document of one chunk for each vector."""
    with owner.cursor() as cursor:
        with cursor.copy("copy sources (tenant_id, id, content, chunk_keys, start_offsets, state) from stdin") as rows:
            for n in range(len(vectors)):
                rows.write_row((tenant, f"d{n:04}", "x", ["k"], [0], "ready"))
        copy = "copy documents (tenant_id, id, chunk_key, metadata, created_at, content, embedding) from stdin"
        with cursor.copy(copy) as rows:
            for n, vector in enumerate(vectors):
                rows.write_row((tenant, f"d{n:04}", "k", "{}", "2026-01-01T00:00:00Z", "x", str(vector.tolist())))


async def test_the_index_is_held_to_what_measuring_every_vector_finds(database, settings, owner):
    vectors = np.random.default_rng(1).standard_normal((1_500, DIMENSIONS)).astype(np.float32)
    fill(owner, vectors)
    queries = await ann.sample(database, "t", 40)
    assert np.array_equal(queries, await ann.sample(database, "t", 40))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    truth = [{f"d{n:04}" for n in np.argsort(-(unit @ query))[:10]} for query in queries]
    recalls = {}
    for ef_search in (10, 400):
        changed = replace(settings, exact_rows=100, ef_search=ef_search)
        compared = [one async for one in ann.run(database, changed, "t", list(queries), 10)]
        assert evaluation.scans([one.scan for one in compared]) == {"exact": 0, "index": 40, "completed": 0}
        served = [await search.search(database, changed, "t", query, top_k=10) for query in queries]
        by_hand = [len({hit.id for hit in one.hits} & ids) / 10 for one, ids in zip(served, truth, strict=True)]
        assert [one.recall for one in compared] == pytest.approx(by_hand)
        recalls[ef_search] = np.mean(by_hand)
    assert recalls[10] < recalls[400]


async def test_equal_chunks_are_found_whichever_comes_last(database, settings, owner):
    fill(owner, np.tile(np.eye(1, DIMENSIONS, dtype=np.float32), (300, 1)))
    queries = await ann.sample(database, "t", 2)
    compared = [one async for one in ann.run(database, replace(settings, exact_rows=100), "t", list(queries), 10)]
    assert [one.recall for one in compared] == [1, 1]


def test_a_vector_is_turned_away_by_as_much_as_is_asked_for():
    vectors = 7 * np.random.default_rng(1).standard_normal((5, DIMENSIONS))
    made = ann.turned(vectors, 0.5)
    assert np.linalg.norm(made, axis=1) == pytest.approx(np.ones(5))
    assert (made * vectors).sum(axis=1) / np.linalg.norm(vectors, axis=1) == pytest.approx(np.full(5, 0.5), abs=1e-6)

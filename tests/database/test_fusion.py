"""Words and vectors fused: what the statement gives is what the two legs give, added up by hand."""

import numpy as np
import pytest

from app import filters, fusion, search, upsert
from app.conditions import Conditions
from app.drafts import Draft
from app.errors import BadInput
from app.search import Options
from tests.conftest import DIMENSIONS

WORDS = ["otter", "river", "heron", "lake", "stone", "moss", "trout", "reed"]
COUNT = 60


def drafted():
    random = np.random.default_rng(5)
    return [
        Draft(
            f"d{n:02}",
            " ".join(random.choice(WORDS, 6)),
            doc_type="odd" if n % 2 else "even",
            metadata={"n": n},
            embedding=random.standard_normal(DIMENSIONS).astype(np.float32),
        )
        for n in range(COUNT)
    ]


@pytest.fixture
async def stored(database, embedder, settings):
    await upsert.put(database, embedder, settings, "acme", drafted())
    return np.random.default_rng(9).standard_normal(DIMENSIONS).astype(np.float32)


@pytest.fixture
def ask(database, settings, stored):
    async def ask(top_k=10, conditions=None, threshold=None, question="otter lake", **options):
        found = await search.search(
            database,
            settings,
            "acme",
            stored,
            question=question,
            top_k=top_k,
            threshold=threshold,
            conditions=conditions,
            options=Options(**options),
        )
        return found.hits

    return ask


def ranks(hits):
    return {hit.id: rank for rank, hit in enumerate(hits, 1)}


@pytest.mark.parametrize(
    "conditions", [None, Conditions(doc_types=("odd",)), Conditions(metadata=filters.parse({"n": {"$lt": 30}}))]
)
@pytest.mark.parametrize(("vector_weight", "text_weight"), [(1.0, 1.0), (0.3, 2.0), (1.0, 0.0)])
async def test_reciprocal_ranks_of_both_legs_are_added(ask, conditions, vector_weight, text_weight):
    vector = ranks(await ask(100, conditions, mode="vector"))
    words = ranks(await ask(100, conditions, mode="text"))
    expected = {
        id_: (vector_weight / (60 + vector[id_]) if id_ in vector else 0)
        + (text_weight / (60 + words[id_]) if id_ in words else 0)
        for id_ in vector | words
    }
    best = sorted(expected, key=lambda id_: (-round(expected[id_], 12), id_))[:10]
    hits = await ask(10, conditions, mode="hybrid", fusion="rrf", vector_weight=vector_weight, text_weight=text_weight)
    assert [hit.score for hit in hits] == pytest.approx([expected[id_] for id_ in best])
    assert {hit.id for hit in hits} == set(best)


def brought_to_one(values, least, most):
    return {id_: (value - least) / (most - least) for id_, value in values.items()}


def blended(vector, words, leg, weights):
    """`relative` by hand: both scores of what either leg found, then the vectors' again beside the three best."""
    embeddings = {draft.id: draft.embedding / np.linalg.norm(draft.embedding) for draft in drafted()}
    met = set(list(vector)[:leg]) | set(list(words)[:leg])
    lexical = {id_: words.get(id_, 0.0) / max(words.get(i, 0.0) for i in met) for id_ in met}

    def summed(nearness):
        shares = brought_to_one(nearness, min(nearness.values()), max(nearness.values()))
        return {id_: weights[0] * 0.6 * shares[id_] + weights[1] * 0.4 * lexical[id_] for id_ in met}

    first = summed({id_: vector[id_] for id_ in met})
    # The mean is of the stored vectors, whatever their lengths.
    stored = {draft.id: draft.embedding for draft in drafted()}
    middle = np.mean([stored[id_] for id_ in sorted(met, key=lambda id_: (-first[id_], id_))[:3]], axis=0)
    middle /= np.linalg.norm(middle)
    return summed({id_: vector[id_] + 0.3 * float(embeddings[id_] @ middle) for id_ in met})


@pytest.mark.parametrize(
    "conditions", [None, Conditions(doc_types=("odd",)), Conditions(metadata=filters.parse({"n": {"$lt": 30}}))]
)
@pytest.mark.parametrize(("leg", "weights"), [(100, (1.0, 1.0)), (6, (1.0, 1.0)), (6, (0.3, 2.0))])
async def test_relative_weighs_both_scores_of_every_chunk_that_either_leg_found(
    ask, monkeypatch, conditions, leg, weights
):
    vector = {hit.id: hit.score for hit in await ask(100, conditions, mode="vector")}
    words = {hit.id: hit.score for hit in await ask(100, conditions, mode="text")}
    monkeypatch.setattr(fusion, "LEG", leg)
    expected = blended(vector, words, leg, weights)
    best = sorted(expected, key=lambda id_: (-round(expected[id_], 9), id_))[:6]
    hits = await ask(6, conditions, mode="hybrid", vector_weight=weights[0], text_weight=weights[1])
    assert [hit.score for hit in hits] == pytest.approx([expected[id_] for id_ in best])
    assert {hit.id: hit.text_score for hit in hits} == pytest.approx({hit.id: words.get(hit.id) for hit in hits})
    assert {hit.id: hit.similarity for hit in hits} == pytest.approx({hit.id: vector[hit.id] for hit in hits})


async def test_relative_gives_nothing_for_words_beside_an_excluded_one(ask, monkeypatch):
    monkeypatch.setattr(fusion, "LEG", 6)
    held = {hit.id for hit in await ask(100, question="heron", mode="text")}
    hits = await ask(6, question="otter lake -heron", mode="hybrid", text_weight=0.0)
    assert {hit.id for hit in hits} & held
    assert all(hit.text_score is None for hit in hits if hit.id in held)


async def test_relative_without_a_word_that_is_stored_orders_by_the_vectors(ask):
    hits = await ask(60, question="zeppelin", mode="hybrid")
    assert len(hits) == COUNT
    assert all(hit.text_score is None for hit in hits)
    assert hits[0].score == pytest.approx(0.6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


async def test_a_threshold_is_on_cosine_similarity_in_every_mode(ask):
    every = await ask(100, mode="vector")
    threshold = every[20].similarity
    allowed = {hit.id for hit in every if hit.similarity >= threshold}
    for mode in ("vector", "text", "hybrid"):
        hits = await ask(50, threshold=threshold, mode=mode)
        assert hits
        assert {hit.id for hit in hits} <= allowed
        assert all(hit.similarity >= threshold for hit in hits)


async def test_each_score_stands_in_a_field_of_its_own(ask):
    hits = await ask(40, mode="hybrid")
    words = {hit.id: hit.text_score for hit in await ask(100, mode="text")}
    assert {hit.text_score for hit in hits} - {None} <= set(words.values())
    assert all(hit.text_score == words.get(hit.id) for hit in hits)
    assert all(-1 <= hit.similarity <= 1 for hit in hits)
    assert all(hit.text_score is None for hit in await ask(5, mode="vector"))


async def test_diversity_takes_the_best_first_and_then_what_is_unlike_it(ask):
    plain = await ask(10, mode="vector")
    varied = await ask(10, mode="vector", diversity=0.9)
    assert varied[0].id == plain[0].id
    assert [hit.id for hit in varied] != [hit.id for hit in plain]
    assert [hit.id for hit in await ask(10, mode="vector", diversity=1e-9)] == [hit.id for hit in plain]


async def test_a_question_of_white_space_is_refused_by_name(database, settings, stored):
    with pytest.raises(BadInput, match="white space"):
        await search.search(database, settings, "acme", stored, question="  ", options=Options(mode="hybrid"))

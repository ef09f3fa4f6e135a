"""Words and vectors fused: what the statement gives is what the two legs give, added up by hand."""

import numpy as np
import pytest

from app import filters, search, upsert
from app.conditions import Conditions
from app.drafts import Draft
from app.errors import BadInput
from app.search import Options
from tests.conftest import DIMENSIONS

WORDS = ["otter", "river", "heron", "lake", "stone", "moss", "trout", "reed"]
COUNT = 60


@pytest.fixture
async def stored(database, embedder, settings):
    random = np.random.default_rng(5)
    drafts = [
        Draft(
            f"d{n:02}",
            " ".join(random.choice(WORDS, 6)),
            doc_type="odd" if n % 2 else "even",
            metadata={"n": n},
            embedding=random.standard_normal(DIMENSIONS).astype(np.float32),
        )
        for n in range(COUNT)
    ]
    await upsert.put(database, embedder, settings, "acme", drafts)
    return np.random.default_rng(9).standard_normal(DIMENSIONS).astype(np.float32)


@pytest.fixture
def ask(database, settings, stored):
    async def ask(top_k=10, conditions=None, threshold=None, **options):
        found = await search.search(
            database,
            settings,
            "acme",
            stored,
            question="otter lake",
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
    hits = await ask(10, conditions, mode="hybrid", vector_weight=vector_weight, text_weight=text_weight)
    assert [hit.score for hit in hits] == pytest.approx([expected[id_] for id_ in best])
    assert {hit.id for hit in hits} == set(best)


async def test_relative_scores_are_brought_to_the_same_range(ask):
    vector = {hit.id: hit.score for hit in await ask(100, mode="vector")}
    words = {hit.id: hit.score for hit in await ask(100, mode="text")}

    def share(scores, id_):
        least, most = min(scores.values()), max(scores.values())
        return (scores[id_] - least) / (most - least) if id_ in scores else 0.0

    hits = await ask(10, mode="hybrid", fusion="relative")
    assert [hit.score for hit in hits] == pytest.approx([share(vector, h.id) + share(words, h.id) for h in hits])
    assert hits[0].score == pytest.approx(max(share(vector, i) + share(words, i) for i in vector))


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

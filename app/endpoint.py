"""One request to a server that speaks OpenAI's protocol, and what its answer means."""

import base64
import email.utils
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from app.batching import Vectors
from app.errors import EmbeddingFailed
from app.meter import Meter
from app.settings import Settings

MAX_INPUTS = 2048
TOO_LARGE, RATE_LIMITED, BROKEN = 413, 429, 500
REFUSALS = frozenset({400, TOO_LARGE, 422})
PASSING = frozenset({408, 409, RATE_LIMITED})
"""Statuses, beside those from 500 on, after which the same request may succeed."""


class Reply(NamedTuple):
    """Vectors in the order of the texts, NaN where `faults` says by position what is wrong with one; tokens read, if told."""

    vectors: Vectors
    faults: dict[int, str]
    tokens: int | None


class Refused(Exception):
    """The server will not embed these texts together; fewer of them, or others, it may."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Passing(Exception):
    """This try failed, the next may not. `wait`: seconds the server asks for, if it does."""

    def __init__(self, message: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.wait = wait


class Garbled(Passing):
    """An answer that is none."""


class _Item(msgspec.Struct):
    index: int
    embedding: str | list[float]


class _Answer(msgspec.Struct):
    data: list[_Item]
    usage: Any = None

    @property
    def tokens(self) -> int | None:
        """What the server says it has read; servers that do not count leave it out or say zero."""
        said = self.usage.get("prompt_tokens") if isinstance(self.usage, dict) else None
        return said if isinstance(said, int) and said > 0 else None


class Endpoint:
    """The server's `/embeddings`. Learns what the server does not know and how much it takes.

    `recorded`: its address is the one in embedding_models, so that faults name that and the key that goes with it.
    """

    def __init__(self, settings: Settings, *, recorded: bool = False) -> None:
        import openai  # noqa: PLC0415 - takes 0.6 s, which the local model need not pay

        self.most_texts = MAX_INPUTS
        self.settled = False
        """Whether it has answered once."""
        self._model = settings.model
        self._address = f"base_url of {self._model} in embedding_models" if recorded else "OPENAI_BASE_URL"
        self._key = "PGRECALL_OTHER_API_KEY" if recorded else "OPENAI_API_KEY"
        self._dimensions = settings.dimensions
        self._timeout = settings.embedding_timeout
        self._client = openai.AsyncOpenAI(
            # Servers without keys still want the header, and the client will not start without one.
            api_key=settings.openai_api_key or "none",
            base_url=settings.openai_base_url or "https://api.openai.com/v1",
            timeout=settings.embedding_timeout,
            max_retries=0,  # it would not count them, nor tell the other requests
        )
        # Halves the answer. Servers that do not know it send lists of numbers.
        self._options: dict[str, Any] = {"encoding_format": "base64"}
        if self._model != "text-embedding-ada-002":
            self._options["dimensions"] = self._dimensions

    async def close(self) -> None:
        """Close the client's connections."""
        await self._client.close()

    async def embed(self, texts: list[str], meter: Meter) -> Reply:
        """One try. Raises Refused, Passing, and EmbeddingFailed where no other try is worth it."""
        try:
            answer = await self._answer(texts, meter)
        except Refused as refusal:
            if refusal.status == TOO_LARGE:
                self.most_texts = max(1, min(self.most_texts, len(texts) // 2))
            raise
        return self._checked(answer, len(texts))

    async def _answer(self, texts: list[str], meter: Meter) -> _Answer:
        """Ask; until the server has answered once, what it refuses is asked again without the options it may not know."""
        if self.settled:
            return await self._decoded(texts, self._options, meter)
        refusals = []
        for options in _fewer(self._options, self._model):
            try:
                answer = await self._decoded(texts, options, meter)
            except Refused as refusal:
                refusals.append(refusal)
                if refusal.status == TOO_LARGE:
                    break
            else:
                self._options, self.settled = options, True
                return answer
        raise refusals[0]

    async def _decoded(self, texts: list[str], options: dict[str, Any], meter: Meter) -> _Answer:
        meter.requests += 1
        body = await self._post(texts, options)
        try:
            return msgspec.json.decode(body, type=_Answer)
        except msgspec.MsgspecError:
            raise Garbled(
                f"the server of {self._model} answered with something other than embeddings; is {self._address} right?"
            ) from None

    async def _post(self, texts: list[str], options: dict[str, Any]) -> bytes:
        """The answer's body; errors carry nothing of the server's own words, which may repeat texts and keys."""
        import openai  # noqa: PLC0415 - as above

        server = f"the server of {self._model}"
        try:
            # Not `embeddings.create`, which sends an encoding_format whether it is given one or not.
            body: bytes = await self._client.post(
                "/embeddings", cast_to=bytes, body={"model": self._model, "input": texts, **options}
            )
        except openai.APITimeoutError:
            raise Passing(f"{server} did not answer within {self._timeout:g} s (PGRECALL_EMBEDDING_TIMEOUT)") from None
        except openai.APIConnectionError:
            raise Passing(f"{server} cannot be reached or hangs up; look at {self._address}") from None
        except openai.APIStatusError as error:
            raise self._meaning(error.status_code, error.response.headers, error.code) from None
        except openai.APIError:
            raise EmbeddingFailed(f"{server} failed") from None
        return body

    def _meaning(self, status: int, headers: Mapping[str, str], code: str | None) -> Exception:
        """What is to be done about a status."""
        server = f"the server of {self._model}"
        if status in REFUSALS:
            return Refused(
                f"{server} refuses this text (status {status}); where it refuses every text, look at "
                "PGRECALL_EMBEDDING_MODEL and PGRECALL_EMBEDDING_DIMENSIONS",
                status,
            )
        advice = _ADVICE.get(status, "").format(key=self._key, address=self._address)
        fault = f"{server} answered with status {status}{advice}"
        hint = headers.get("x-should-retry")  # OpenAI's servers know best
        passing = hint == "true" if hint in ("true", "false") else status in PASSING or status >= BROKEN
        if not passing or code == "insufficient_quota":
            return EmbeddingFailed(fault)
        return Passing(fault, status, retry_after(headers))

    def _checked(self, answer: _Answer, count: int) -> Reply:
        """The answer's vectors in the order of the texts, normalised, and what is wrong with those that are wrong.

        Raises Garbled where they cannot be told apart, EmbeddingFailed where none has the right length.
        """
        items = {item.index: item.embedding for item in answer.data}
        if len(answer.data) != count or items.keys() != set(range(count)):
            raise Garbled(f"the server of {self._model}: {len(answer.data)} embeddings came back for {count} texts")
        vectors = np.full((count, self._dimensions), np.nan, np.float32)
        faults: dict[int, str] = {}
        lengths = set()
        for place in range(count):
            vector = _numbers(items[place])
            if vector is None or vector.size != self._dimensions:
                lengths.add(0 if vector is None else vector.size)
                found = "no vector" if vector is None else f"{vector.size} dimensions"
                faults[place] = f"its embedding has {found}; PGRECALL_EMBEDDING_DIMENSIONS says {self._dimensions}"
                continue
            length = float(np.linalg.norm(vector))
            if math.isfinite(length) and length != 0:
                vectors[place] = vector / length
            else:
                faults[place] = "its embedding is zero or holds NaN or infinity"
        if len(faults) == count and len(lengths) == 1 and lengths != {0}:
            raise EmbeddingFailed(
                f"the embeddings of {self._model} have {lengths.pop()} dimensions; "
                f"PGRECALL_EMBEDDING_DIMENSIONS says {self._dimensions}"
            )
        return Reply(vectors, faults, answer.tokens)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `retry-after-ms` or `Retry-After`, as a number or a date, ask for; None where they say nothing clear."""
    for name, unit in (("retry-after-ms", 1_000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if seconds >= 0:  # NaN is not
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


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
    401: ": it does not accept the key; look at {key}",
    403: ": it does not let this key use this model; look at {key} and PGRECALL_EMBEDDING_MODEL",
    404: ": it does not know this model or this address, which mostly ends in /v1; look at PGRECALL_EMBEDDING_MODEL and "
    "{address}",
    429: ": too many requests, or the quota is used up",
}


def _numbers(embedding: str | list[float]) -> npt.NDArray[np.float64] | None:
    """Decode base64 of little-endian float32; servers that do not know `encoding_format` send a list."""
    if isinstance(embedding, list):
        return np.array(embedding, np.float64)
    try:
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").astype(np.float64)
    except ValueError:
        return None

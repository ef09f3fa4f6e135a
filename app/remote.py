"""Vectors from a server that speaks OpenAI's protocol: in batches, several at once, with patience and without losing any."""

import asyncio
import base64
import email.utils
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from app.batching import Attempt, Done, Kind, Vectors, spread
from app.errors import BadInput, BudgetSpent, EmbeddingFailed, PgrecallError
from app.meter import Meter
from app.settings import Settings
from app.throttle import Throttle
from app.tokens import estimated_tokens

MAX_INPUTS = 2048
MAX_REQUEST_TOKENS = 300_000
OPENAI_MAX_TOKENS = 8191

QUERY_PATIENCE = 10.0
"""Seconds after which no further try is begun for a question: somebody is waiting."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds between two tries: the first, and what doubling it ends at. Up to half of it is left to chance."""

TOO_LARGE, RATE_LIMITED, BROKEN = 413, 429, 500
REFUSALS = frozenset({400, TOO_LARGE, 422})
OVERLOADED = frozenset({RATE_LIMITED, 503, 529})
"""Statuses after which everybody slows down."""
PASSING = frozenset({408, 409, RATE_LIMITED})
"""Statuses, beside those from 500 on, after which the same request may succeed."""

HARMLESS = "text"
"""What a server is asked for to see whether it is the text that it refuses."""


class _Item(msgspec.Struct):
    index: int
    embedding: str | list[float]


class _Answer(msgspec.Struct):
    data: list[_Item]
    usage: Any = None

    def prompt_tokens(self, estimate: int) -> int:
        """What the server says it has read; servers that do not count leave it out or say zero."""
        said = self.usage.get("prompt_tokens") if isinstance(self.usage, dict) else None
        return said if isinstance(said, int) and said > 0 else estimate


class _Refused(Exception):
    """The server will not embed these texts together; fewer of them, or others, it may."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Passing(Exception):
    """This try failed, the next may not. `wait`: seconds the server asks for, if it does."""

    def __init__(self, message: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.wait = wait


class _Garbled(_Passing):
    """An answer that is none."""


@dataclass
class _Job:
    """One call: distinct texts, what is known of them, and what has come of them so far, by row."""

    kind: Kind
    texts: list[str]
    tokens: list[int]
    vectors: Vectors
    meter: Meter
    done: Done | None
    faults: dict[int, PgrecallError] = field(default_factory=dict)
    failure: EmbeddingFailed | BudgetSpent | None = None
    """What ended the call: requests that have not begun by then are not sent."""

    def ended_by(self) -> EmbeddingFailed | BudgetSpent | None:
        return self.failure

    def fail(self, rows: Sequence[int], fault: PgrecallError) -> None:
        self.faults |= dict.fromkeys(rows, fault)


class OpenAIEmbedder:
    """Embeds through the OpenAI protocol. One throttle for all its calls: what one is told to wait, all others wait."""

    def __init__(self, settings: Settings) -> None:
        import openai  # noqa: PLC0415 - takes 0.6 s, which the local model need not pay

        self.model = settings.model
        self.dimensions = settings.dimensions
        self.max_tokens = OPENAI_MAX_TOKENS
        self._timeout = settings.embedding_timeout
        self._retries = settings.embedding_retries
        self._patience = settings.embedding_patience
        self._client = openai.AsyncOpenAI(
            # Servers without keys still want the header, and the client will not start without one.
            api_key=settings.openai_api_key or "none",
            base_url=settings.openai_base_url or "https://api.openai.com/v1",
            timeout=settings.embedding_timeout,
            max_retries=0,  # it would not count them, nor tell the other requests
        )
        self._lanes = settings.embedding_concurrency
        self._throttle = Throttle(self._lanes)
        self._most_texts = MAX_INPUTS
        # Halves the answer. Servers that do not know it send lists of numbers.
        self._options: dict[str, Any] = {"encoding_format": "base64"}
        if self.model != "text-embedding-ada-002":
            self._options["dimensions"] = self.dimensions
        self._settled = False

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Estimate from above, see `estimated_tokens`."""
        return [estimated_tokens(text) for text in texts]

    async def embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """As in `Embedder`."""
        return (await self.embed_each(texts, kind)).complete()

    async def embed_each(
        self, texts: Sequence[str], kind: Kind, meter: Meter | None = None, done: Done | None = None
    ) -> Attempt:
        """As in `Embedder`. A server that fails for good ends the call: what has not been sent by then is not sent."""
        first: dict[str, int] = {}
        for position, text in enumerate(texts):
            first.setdefault(text, position)
        distinct = list(first)
        tokens = await asyncio.to_thread(self.count_tokens, distinct)
        vectors = np.full((len(distinct), self.dimensions), np.nan, np.float32)
        job = _Job(kind, distinct, tokens, vectors, meter or Meter(), done)
        fitting = []
        for row, size in enumerate(tokens):
            if size <= self.max_tokens:
                fitting.append(row)
                continue
            fault = f"is about {size:,} tokens long; allowed: at most {self.max_tokens:,}"
            job.faults[row] = BadInput("query", fault) if kind == "query" else EmbeddingFailed(f"the text {fault}", row)
        runs = spread([tokens[row] for row in fitting], self._lanes, self._most_texts, MAX_REQUEST_TOKENS)
        async with asyncio.TaskGroup() as group:
            for run in runs:
                group.create_task(self._fill(job, fitting[run.start : run.stop]))
        rows = {text: row for row, text in enumerate(distinct)}
        faults: dict[int, PgrecallError] = {}
        for position, text in enumerate(texts):
            found = job.faults.get(rows[text])
            if isinstance(found, EmbeddingFailed) and found.index is not None:
                found = EmbeddingFailed(str(found), position)
            if found is not None:
                faults[position] = found
        return Attempt(vectors[[rows[text] for text in texts]], faults)

    async def aclose(self) -> None:
        """Close the client's connections."""
        await self._client.close()

    async def _fill(self, job: _Job, rows: list[int]) -> None:
        """Embed these rows of a job; cut them in half where the server refuses them or the budget is too small for them.

        That finds every text a server refuses, makes do with servers whose limits are lower than OpenAI's, and spends
        what is left of a budget.
        """
        if job.failure is not None:
            job.fail(rows, job.failure)
            return
        if len(rows) <= self._most_texts:
            try:
                vectors, faults = await self._answer(job, rows)
            except (_Refused, BudgetSpent) as refusal:
                ended_by = job.ended_by()
                if ended_by is not None:
                    job.fail(rows, ended_by)
                    return
                if isinstance(refusal, _Refused) and refusal.status == TOO_LARGE:
                    self._most_texts = max(1, min(self._most_texts, len(rows) // 2))
                if len(rows) == 1:
                    await self._give_up(job, rows, refusal)
                    return
            except EmbeddingFailed as failure:
                job.failure = job.failure or failure
                job.fail(rows, failure)
                return
            else:
                self._store(job, rows, vectors, faults)
                return
        middle = len(rows) // 2
        await self._fill(job, rows[:middle])
        await self._fill(job, rows[middle:])

    async def _give_up(self, job: _Job, rows: list[int], refusal: _Refused | BudgetSpent) -> None:
        """One text is left of what was refused: it is at fault, unless the server refuses every text."""
        if isinstance(refusal, BudgetSpent):
            job.failure = job.failure or refusal
            job.fail(rows, refusal)
            return
        if not self._settled and job.texts[rows[0]] != HARMLESS:
            try:
                async with self._throttle.turn(urgent=job.kind == "query"):
                    await self._request([HARMLESS], job.meter)
            except (_Refused, _Passing, EmbeddingFailed):
                failure = EmbeddingFailed(
                    f"the server of {self.model} refuses every text (status {refusal.status}); look at "
                    "PGRECALL_EMBEDDING_MODEL and PGRECALL_EMBEDDING_DIMENSIONS"
                )
                job.failure = job.failure or failure
                job.fail(rows, failure)
                return
        job.fail(rows, EmbeddingFailed(str(refusal), rows[0]))

    @staticmethod
    def _store(job: _Job, rows: list[int], vectors: Vectors, faults: dict[int, str]) -> None:
        good = [place for place in range(len(rows)) if place not in faults]
        job.vectors[[rows[place] for place in good]] = vectors[good]
        for place, fault in faults.items():
            job.faults[rows[place]] = EmbeddingFailed(fault, rows[place])
        job.meter.texts += len(good)
        if job.done is not None and good:
            job.done([job.texts[rows[place]] for place in good], vectors[good])

    async def _answer(self, job: _Job, rows: list[int]) -> tuple[Vectors, dict[int, str]]:
        """The vectors of these rows, and faults by their place among them, after as many tries as are worth it.

        Raises _Refused, BudgetSpent, and EmbeddingFailed when patience is at an end.
        """
        texts, estimate = [job.texts[row] for row in rows], sum(job.tokens[row] for row in rows)
        urgent = job.kind == "query"
        patience = min(self._patience, QUERY_PATIENCE) if urgent else self._patience
        garbled = False
        deadline: float | None = None
        for attempt in range(self._retries + 1):
            async with self._throttle.turn(urgent=urgent) as began:
                if job.failure is not None:
                    raise job.failure
                job.meter.retries += attempt > 0
                deadline = began + patience if deadline is None else deadline
                try:
                    result = await self._tried(job, texts, estimate)
                except _Passing as fault:
                    failed = fault
                else:
                    self._throttle.succeeded()
                    return result
            wait = _wait(attempt) if failed.wait is None else failed.wait * (1 + random.random() / 10)  # noqa: S311 - spreads
            if failed.status in OVERLOADED:
                job.meter.rate_limited += failed.status == RATE_LIMITED
                self._throttle.slow_down(began, wait)
            twice = garbled and isinstance(failed, _Garbled)
            garbled = isinstance(failed, _Garbled)
            if twice or attempt == self._retries or time.monotonic() + wait > deadline:
                break
            await asyncio.sleep(wait)
        raise EmbeddingFailed(str(failed))

    async def _tried(self, job: _Job, texts: list[str], estimate: int) -> tuple[Vectors, dict[int, str]]:
        reserved = job.meter.reserve(estimate)
        try:
            answer = await self._request(texts, job.meter)
        except BaseException:
            job.meter.settle(reserved)
            raise
        job.meter.settle(reserved, estimate, answer.prompt_tokens(estimate))
        return self._checked(answer, len(texts))

    async def _request(self, texts: list[str], meter: Meter) -> _Answer:
        """Ask; until the server has answered once, what it refuses is asked again without the options it may not know."""
        if self._settled:
            return await self._decoded(texts, self._options, meter)
        refusals = []
        for options in _fewer(self._options, self.model):
            try:
                answer = await self._decoded(texts, options, meter)
            except _Refused as refusal:
                refusals.append(refusal)
                if refusal.status == TOO_LARGE:
                    break
            else:
                self._options, self._settled = options, True
                return answer
        raise refusals[0]

    async def _decoded(self, texts: list[str], options: dict[str, Any], meter: Meter) -> _Answer:
        meter.requests += 1
        body = await self._post(texts, options)
        try:
            return msgspec.json.decode(body, type=_Answer)
        except msgspec.MsgspecError:
            raise _Garbled(
                f"the server of {self.model} answered with something other than embeddings; is OPENAI_BASE_URL right?"
            ) from None

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
            raise _Passing(f"{server} did not answer within {self._timeout:g} s (PGRECALL_EMBEDDING_TIMEOUT)") from None
        except openai.APIConnectionError:
            raise _Passing(f"{server} cannot be reached or hangs up; look at OPENAI_BASE_URL") from None
        except openai.APIStatusError as error:
            raise self._meaning(error.status_code, error.response.headers, error.code) from None
        except openai.APIError:
            raise EmbeddingFailed(f"{server} failed") from None
        return body

    def _meaning(self, status: int, headers: Mapping[str, str], code: str | None) -> Exception:
        """What is to be done about a status."""
        server = f"the server of {self.model}"
        if status in REFUSALS:
            return _Refused(
                f"{server} refuses this text (status {status}); where it refuses every text, look at "
                "PGRECALL_EMBEDDING_MODEL and PGRECALL_EMBEDDING_DIMENSIONS",
                status,
            )
        fault = f"{server} answered with status {status}{_ADVICE.get(status, '')}"
        hint = headers.get("x-should-retry")  # OpenAI's servers know best
        passing = hint == "true" if hint in ("true", "false") else status in PASSING or status >= BROKEN
        if not passing or code == "insufficient_quota":
            return EmbeddingFailed(fault)
        return _Passing(fault, status, retry_after(headers))

    def _checked(self, answer: _Answer, count: int) -> tuple[Vectors, dict[int, str]]:
        """The answer's vectors in the order of the texts, normalised, and what is wrong with those that are wrong.

        Raises _Garbled where they cannot be told apart, EmbeddingFailed where none has the right length.
        """
        items = {item.index: item.embedding for item in answer.data}
        if len(answer.data) != count or items.keys() != set(range(count)):
            raise _Garbled(f"the server of {self.model}: {len(answer.data)} embeddings came back for {count} texts")
        vectors = np.full((count, self.dimensions), np.nan, np.float32)
        faults: dict[int, str] = {}
        lengths = set()
        for place in range(count):
            vector = _numbers(items[place])
            if vector is None or vector.size != self.dimensions:
                lengths.add(0 if vector is None else vector.size)
                found = "no vector" if vector is None else f"{vector.size} dimensions"
                faults[place] = f"its embedding has {found}; PGRECALL_EMBEDDING_DIMENSIONS says {self.dimensions}"
                continue
            length = float(np.linalg.norm(vector))
            if math.isfinite(length) and length != 0:
                vectors[place] = vector / length
            else:
                faults[place] = "its embedding is zero or holds NaN or infinity"
        if len(faults) == count and len(lengths) == 1 and lengths != {0}:
            raise EmbeddingFailed(
                f"the embeddings of {self.model} have {lengths.pop()} dimensions; "
                f"PGRECALL_EMBEDDING_DIMENSIONS says {self.dimensions}"
            )
        return vectors, faults


def _wait(attempt: int) -> float:
    longest: float = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
    return longest * (0.5 + random.random() / 2)  # noqa: S311 - only to come back at different moments


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
    401: ": it does not accept the key; look at OPENAI_API_KEY",
    403: ": it does not let this key use this model; look at OPENAI_API_KEY and PGRECALL_EMBEDDING_MODEL",
    404: ": it does not know this model or this address, which mostly ends in /v1; look at PGRECALL_EMBEDDING_MODEL and "
    "OPENAI_BASE_URL",
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

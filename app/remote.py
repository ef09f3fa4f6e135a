"""Vectors from a server that speaks OpenAI's protocol: in batches, several at once, with patience and without losing any."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from app.batching import Attempt, Done, Kind, Vectors, spread
from app.endpoint import BROKEN, RATE_LIMITED, Endpoint, Garbled, Passing, Refused, Reply
from app.errors import BadInput, BudgetSpent, EmbeddingFailed, PgrecallError
from app.meter import Meter
from app.settings import Settings
from app.throttle import Throttle
from app.tokens import estimated_tokens

MAX_REQUEST_TOKENS = 300_000
OPENAI_MAX_TOKENS = 8191

QUERY_PATIENCE = 10.0
"""Seconds after which no further try is begun for a question: somebody is waiting."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds between two tries: the first, and what doubling it ends at. Up to half of it is left to chance."""

OVERLOADED = frozenset({RATE_LIMITED, 503, 529})
"""Statuses after which everybody slows down."""

HARMLESS = "text"
"""What a server is asked for to see whether it is the text that it refuses."""


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

    def end(self, rows: Sequence[int], failure: EmbeddingFailed | BudgetSpent) -> None:
        self.failure = self.failure or failure
        self.faults |= dict.fromkeys(rows, failure)

    def store(self, rows: list[int], reply: Reply) -> None:
        good = [place for place in range(len(rows)) if place not in reply.faults]
        self.vectors[[rows[place] for place in good]] = reply.vectors[good]
        for place, fault in reply.faults.items():
            self.faults[rows[place]] = EmbeddingFailed(fault, rows[place])
        self.meter.texts += len(good)
        if self.done is not None and good:
            self.done([self.texts[rows[place]] for place in good], reply.vectors[good])


class OpenAIEmbedder:
    """Embeds through the OpenAI protocol. One throttle for all its calls: what one is told to wait, all others wait.

    `recorded`: the server's address is the one in embedding_models.
    """

    def __init__(self, settings: Settings, *, recorded: bool = False) -> None:
        self.model = settings.model
        self.dimensions = settings.dimensions
        self.max_tokens = OPENAI_MAX_TOKENS
        self._endpoint = Endpoint(settings, recorded=recorded)
        self._retries = settings.embedding_retries
        self._patience = settings.embedding_patience
        self._lanes = settings.embedding_concurrency
        self._throttle = Throttle(self._lanes)

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
        runs = spread([tokens[row] for row in fitting], self._lanes, self._endpoint.most_texts, MAX_REQUEST_TOKENS)
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
        """Close connections."""
        await self._endpoint.close()

    async def _fill(self, job: _Job, rows: list[int], *, suspect: bool = False) -> None:
        """Embed these rows of a job; cut them in half where the server refuses them or the budget is too small for them.

        That finds every text a server refuses, makes do with servers whose limits are lower than OpenAI's, and spends
        what is left of a budget. `suspect`: there is a text among them that breaks the server, which else is well.
        """
        if job.failure is not None:
            job.end(rows, job.failure)
            return
        refusal: Refused | BudgetSpent | None = None
        if len(rows) <= self._endpoint.most_texts:
            try:
                job.store(rows, await self._reply(job, rows, suspect=suspect))
            except (Refused, BudgetSpent) as caught:
                refusal = caught
            except EmbeddingFailed as failure:
                job.end(rows, failure)
                return
            else:
                return
        if len(rows) == 1 and refusal is not None:
            await self._alone(job, rows, refusal, suspect=suspect)
            return
        suspect = suspect or (isinstance(refusal, Refused) and refusal.status == BROKEN)
        middle = len(rows) // 2
        await self._fill(job, rows[:middle], suspect=suspect)
        await self._fill(job, rows[middle:], suspect=suspect)

    async def _alone(self, job: _Job, rows: list[int], refusal: Refused | BudgetSpent, *, suspect: bool) -> None:
        """One text is left of what was refused: it is at fault, unless the server refuses every text."""
        if isinstance(refusal, BudgetSpent):
            job.end(rows, refusal)
        elif refusal.status == BROKEN and not suspect:
            await self._fill(job, rows, suspect=True)  # the server was well a moment later
        elif self._endpoint.settled or await self._is_well(job):
            job.faults[rows[0]] = EmbeddingFailed(str(refusal), rows[0])
        else:
            failure = EmbeddingFailed(
                f"the server of {self.model} refuses every text (status {refusal.status}); look at "
                "PGRECALL_EMBEDDING_MODEL and PGRECALL_EMBEDDING_DIMENSIONS"
            )
            job.end(rows, failure)

    async def _is_well(self, job: _Job) -> bool:
        """Whether the server embeds a text that nobody can object to."""
        try:
            async with self._throttle.turn(urgent=job.kind == "query"):
                await self._tried(job, [HARMLESS], 1)
        except (Refused, Passing, EmbeddingFailed):
            return False
        except BudgetSpent:
            return True
        return True

    async def _reply(self, job: _Job, rows: list[int], *, suspect: bool) -> Reply:
        """The reply for these rows, after as many tries as are worth it.

        Raises Refused, BudgetSpent, and EmbeddingFailed when patience is at an end.
        """
        texts, estimate = [job.texts[row] for row in rows], sum(job.tokens[row] for row in rows)
        urgent = job.kind == "query"
        patience = min(self._patience, QUERY_PATIENCE) if urgent else self._patience
        retries = min(self._retries, 1) if suspect else self._retries
        garbled = False
        deadline: float | None = None
        for attempt in range(retries + 1):
            async with self._throttle.turn(urgent=urgent) as began:
                if job.failure is not None:
                    raise job.failure
                job.meter.retries += attempt > 0
                deadline = began + patience if deadline is None else deadline
                try:
                    reply = await self._tried(job, texts, estimate)
                except Passing as fault:
                    failed = fault
                    wait = _wait(attempt, fault.wait)
                    too_long = time.monotonic() + wait > deadline
                    job.meter.rate_limited += fault.status == RATE_LIMITED
                    if fault.status in OVERLOADED:
                        # A wait that this request is not worth is none to impose on others.
                        self._throttle.slow_down(began, 0 if too_long else wait)
                else:
                    self._throttle.succeeded()
                    return reply
            twice = garbled and isinstance(failed, Garbled)
            garbled = isinstance(failed, Garbled)
            if twice or too_long or attempt == retries:
                break
            await asyncio.sleep(wait)
        if failed.status == BROKEN and (suspect or await self._is_well(job)):
            raise Refused(f"{failed}; it fails so for this text, not for others", BROKEN)
        raise EmbeddingFailed(str(failed))

    async def _tried(self, job: _Job, texts: list[str], estimate: int) -> Reply:
        reserved = job.meter.reserve(estimate)
        try:
            reply = await self._endpoint.embed(texts, job.meter)
        except BaseException as error:
            # What cannot be read was paid for like the rest.
            job.meter.settle(reserved, spent=estimate if isinstance(error, Garbled) else 0)
            raise
        job.meter.settle(reserved, estimate, estimate if reply.tokens is None else reply.tokens)
        return reply


def _wait(attempt: int, asked: float | None) -> float:
    """Seconds until the next try: what the server asks for and a little more, else longer each time."""
    chance = random.random()  # noqa: S311 - only to come back at different moments
    if asked is not None:
        return asked * (1 + chance / 10)
    longest: float = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
    return longest * (1 + chance) / 2

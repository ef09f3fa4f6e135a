"""The optional third stage: a model that reads question and chunk together scores the candidates a search has found.

Spoken is the contract of Cohere, Jina, vLLM and others: POST {base}/rerank with {"model", "query", "documents", "top_n"}
gives {"results": [{"index", "relevance_score"}]}, in any order.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from app.errors import BadInput, RerankFailed
from app.settings import Settings

RETRIES = 2
"""Further attempts after 429, 5xx and broken connections, all of them within the time limit."""

CANDIDATES = 50
"""Chunks that are scored unless the caller says otherwise."""

MAX_CANDIDATES = 100


class Reranker(Protocol):
    """A model that tells how well texts answer a question."""

    async def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """A finite score for each text, in their order, the higher the better; the scale is the model's own.

        Raises RerankFailed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """What is done to the candidates of one search; at least top_k of them are taken."""

    reranker: Reranker
    query: str
    candidates: int = CANDIDATES


def required(reranker: Reranker | None) -> Reranker:
    """The reranker. Raises BadInput where none is configured."""
    if reranker is None:
        raise BadInput(
            "rerank", "no reranker is configured; allowed with PGRECALL_RERANK_URL and PGRECALL_RERANK_MODEL set"
        )
    return reranker


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Reranker | None]:
    """The reranker that is configured, None where there is none. Connects to nothing yet."""
    if settings.rerank_url is None or settings.rerank_model is None:
        yield None
        return
    reranker = HTTPReranker(
        settings.rerank_model,
        base_url=settings.rerank_url,
        api_key=settings.rerank_key,
        timeout=settings.embedding_timeout,
    )
    try:
        yield reranker
    finally:
        await reranker.aclose()


class _Result(msgspec.Struct):
    index: int
    relevance_score: float


class _Answer(msgspec.Struct):
    results: list[_Result]


class HTTPReranker:
    """A reranker behind HTTP. `timeout` is in seconds, for one search's candidates, retries included."""

    def __init__(self, model: str, *, base_url: str, api_key: str | None, timeout: float) -> None:
        import openai  # noqa: PLC0415 - takes 0.6 s, which nobody pays who has no reranker

        self._model = model
        self._timeout = timeout
        # Not OpenAI's protocol; but its client retries, heeds Retry-After and is here already.
        self._client = openai.AsyncOpenAI(
            api_key=api_key or "none", base_url=base_url, timeout=timeout, max_retries=RETRIES
        )

    async def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """See Reranker. One request, whatever the number of texts; none for no text."""
        if not texts:
            return []
        body = await self._post(query, texts)
        try:
            # JSON has no NaN and no infinity, and msgspec takes none.
            results = msgspec.json.decode(body, type=_Answer).results
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise RerankFailed(
                f"the server of {self._model} answered with something other than scores; is PGRECALL_RERANK_URL right?"
            ) from None
        found = {each.index: each.relevance_score for each in results}
        if len(results) != len(texts) or found.keys() != set(range(len(texts))):
            raise RerankFailed(
                f"the server of {self._model} gave {len(results)} scores for {len(texts)} texts"
                + ("" if len(results) != len(texts) else ", not one for each")
            )
        return [found[index] for index in range(len(texts))]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _post(self, query: str, texts: Sequence[str]) -> bytes:
        """The answer's body; errors carry nothing of the server's own words, which may repeat texts and keys."""
        import openai  # noqa: PLC0415 - as above

        asked = {"model": self._model, "query": query, "documents": list(texts), "top_n": len(texts)}
        server = f"the server of {self._model}"
        try:
            async with asyncio.timeout(self._timeout):
                body: bytes = await self._client.post("/rerank", cast_to=bytes, body=asked)
        except (openai.APITimeoutError, TimeoutError):
            fault = f"{server} gave no answer within {self._timeout:g} s, retries included (PGRECALL_EMBEDDING_TIMEOUT)"
        except openai.APIConnectionError:
            fault = f"{server} cannot be reached or hangs up; look at PGRECALL_RERANK_URL"
        except openai.APIStatusError as error:
            fault = f"{server} answered with status {error.status_code}{_ADVICE.get(error.status_code, '')}"
        except openai.APIError:
            fault = f"{server} failed"
        else:
            return body
        raise RerankFailed(fault)


_REFUSED = ": it refuses these texts; fewer candidates or smaller chunks may fit"
_KEY = ": it does not accept the key; look at PGRECALL_RERANK_KEY"
_ADVICE = {
    400: _REFUSED,
    401: _KEY,
    403: _KEY,
    404: ": it does not know this model or this address; look at PGRECALL_RERANK_MODEL and PGRECALL_RERANK_URL, to which "
    "/rerank is added",
    413: _REFUSED,
    422: _REFUSED,
    429: ": too many requests, or the quota is used up",
}

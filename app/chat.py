"""The chat model behind any OpenAI-compatible server: messages in, the answer in pieces and its token counts out."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from app.errors import ChatFailed
from app.settings import Settings

if TYPE_CHECKING:
    from openai import AsyncStream
    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletionChunk

OPENAI_URL = "https://api.openai.com/v1"
RETRIES = 2
"""Further attempts before the first token, all of them within the time limit."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user"]
    content: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens an answer took, as its model counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatModel(Protocol):
    """A model that answers messages."""

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    def reply(self, messages: Sequence[Message]) -> AsyncGenerator[str | Usage]:
        """The answer in pieces, none of them empty, then its Usage where the server tells.

        Closing the generator stops the model. Raises ChatFailed, before the first piece or after any.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


def open_chat(settings: Settings) -> ChatModel | None:
    """The chat model that is configured, None where answers are extractive. Connects to nothing yet."""
    if settings.chat is None:
        return None
    return OpenAIChat(
        settings.chat,
        base_url=settings.openai_base_url,
        api_key=settings.openai_api_key,
        timeout=settings.chat_timeout,
        answer_tokens=settings.rag_answer_tokens,
    )


class OpenAIChat:
    """A chat model behind an OpenAI-compatible server.

    `timeout` is the seconds to the first token, retries included, and from one token to the next.
    """

    def __init__(
        self, model: str, *, base_url: str | None, api_key: str | None, timeout: float, answer_tokens: int
    ) -> None:
        import openai  # noqa: PLC0415 - takes 0.6 s, which nobody pays who asks no chat model

        self.model = model
        self._timeout = timeout
        # OpenAI's newer models refuse max_tokens; Ollama, LM Studio and older servers know nothing else.
        limit = "max_completion_tokens" if base_url is None else "max_tokens"
        self._options: dict[str, Any] = {limit: answer_tokens, "stream_options": {"include_usage": True}}
        # Everything is given, so that the client takes nothing from the environment behind the settings' back.
        self._client = openai.AsyncOpenAI(
            api_key=api_key or "none", base_url=base_url or OPENAI_URL, timeout=timeout, max_retries=RETRIES
        )

    async def reply(self, messages: Sequence[Message]) -> AsyncGenerator[str | Usage]:
        """See ChatModel."""
        import openai  # noqa: PLC0415 - as above

        usage, finish, empty = None, None, True
        try:
            async with asyncio.timeout(self._timeout):
                stream = await self._open(messages)
            async with stream:
                while True:
                    async with asyncio.timeout(self._timeout):
                        chunk = await anext(stream, None)
                    if chunk is None:
                        break
                    usage = chunk.usage or usage
                    for choice in chunk.choices or ():
                        finish = choice.finish_reason or finish
                        if choice.delta.content:
                            empty = False
                            yield choice.delta.content
        except (openai.OpenAIError, TimeoutError, ValueError, AttributeError) as error:
            raise ChatFailed(_fault(error, self._timeout)) from None
        if finish is None:
            raise ChatFailed("the chat model's server broke its answer off, or does not stream: see OPENAI_BASE_URL")
        if empty:
            reason = (
                "spent PGRECALL_RAG_ANSWER_TOKENS before it said anything" if finish == "length" else "said nothing"
            )
            raise ChatFailed(f"the chat model {reason}")
        if counts := _usage(usage):
            yield counts

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _open(self, messages: Sequence[Message]) -> "AsyncStream[ChatCompletionChunk]":
        """Start the answer; a server that refuses one of our options is asked again without it, now and later."""
        import openai  # noqa: PLC0415 - as above

        options = self._options
        while True:
            try:
                # Any: the client knows one class for each role.
                said: list[Any] = [asdict(message) for message in messages]
                stream: AsyncStream[ChatCompletionChunk] = await self._client.chat.completions.create(
                    model=self.model, messages=said, stream=True, **options
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                fewer = _without_refused(options, error.message)
                if fewer is None:
                    raise
                options = fewer
            else:
                self._options = options
                return stream


# Never the server's own words: they may quote texts and keys.
_REFUSED = "refused the request: see PGRECALL_CHAT_MODEL, PGRECALL_RAG_CONTEXT_TOKENS and PGRECALL_RAG_ANSWER_TOKENS"
_FAULTS = {
    400: _REFUSED,
    401: "refused the key: see OPENAI_API_KEY",
    403: "refused the key: see OPENAI_API_KEY",
    404: "knows no such model or address: see PGRECALL_CHAT_MODEL and OPENAI_BASE_URL",
    413: _REFUSED,
    422: _REFUSED,
    429: "is over its rate limit or quota: try again later, or see the account of OPENAI_API_KEY",
}


def _fault(error: Exception, timeout: float) -> str:
    """What happened, and which setting to look at."""
    import openai  # noqa: PLC0415 - as above

    server = "the chat model's server"
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return f"{server} sent nothing for {timeout:g} s: see PGRECALL_CHAT_TIMEOUT"
    if isinstance(error, openai.APIStatusError):
        return f"{server} answered {error.status_code}: it {_FAULTS.get(error.status_code, 'failed')}"
    if isinstance(error, openai.APIConnectionError):
        return f"{server} cannot be reached or broke the connection: see OPENAI_BASE_URL"
    if isinstance(error, openai.OpenAIError):
        return f"{server} reported an error in the middle of its answer"
    # What is no JSON, or JSON of another shape, the client library lets through.
    return f"{server} does not speak the OpenAI protocol: see OPENAI_BASE_URL"


def _without_refused(options: dict[str, Any], complaint: str) -> dict[str, Any] | None:
    """The options as a server wants them that refused them so, None where it complains of something else."""
    fewer = dict(options)
    if "stream_options" in options and "stream_options" in complaint:
        del fewer["stream_options"]
    elif "max_tokens" in options and "max_completion_tokens" in complaint:
        fewer["max_completion_tokens"] = fewer.pop("max_tokens")
    else:
        return None
    return fewer


def _usage(usage: "CompletionUsage | None") -> Usage | None:
    if usage is None:
        return None
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    return Usage(*counts) if all(isinstance(count, int) for count in counts) else None

"""The chat model behind any OpenAI-compatible server: messages in, the answer in pieces and its token counts out."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import openai
from openai import AsyncOpenAI, AsyncStream
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionChunk

from app.errors import ChatFailed
from app.settings import Settings

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
        self.model = model
        self._timeout = timeout
        # OpenAI's newer models refuse max_tokens; Ollama, LM Studio and older servers know nothing else.
        limit = "max_completion_tokens" if base_url is None else "max_tokens"
        self._options: dict[str, Any] = {limit: answer_tokens, "stream_options": {"include_usage": True}}
        # Everything is given, so that the client takes nothing from the environment behind the settings' back.
        self._client = AsyncOpenAI(
            api_key=api_key or "none", base_url=base_url or OPENAI_URL, timeout=timeout, max_retries=RETRIES
        )

    async def reply(self, messages: Sequence[Message]) -> AsyncGenerator[str | Usage]:
        """See ChatModel."""
        try:
            async with asyncio.timeout(self._timeout):
                stream = await self._open(messages)
            async with stream:
                async for piece in self._pieces(stream):
                    yield piece
        except (openai.APITimeoutError, TimeoutError):
            raise ChatFailed(
                f"the chat model sent nothing for {self._timeout:g} s: see PGRECALL_CHAT_TIMEOUT"
            ) from None
        except openai.APIStatusError as error:
            raise ChatFailed(_refusal(error.status_code)) from None
        except openai.APIConnectionError:
            raise ChatFailed(
                "the chat model's server cannot be reached, or the connection broke: see OPENAI_BASE_URL"
            ) from None
        except openai.APIError:
            raise ChatFailed("the chat model's server reported an error in the middle of its answer") from None
        except (ValueError, AttributeError, TypeError):
            # Neither JSON nor of the protocol's shape; the client library does not wrap these.
            raise ChatFailed("the chat model's server does not speak the OpenAI protocol: see OPENAI_BASE_URL") from None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

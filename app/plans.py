"""What a draft becomes before it meets what is stored: checked against the limits, hashed and cut into chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app import cache, chunking
from app.chunking import Chunk
from app.drafts import Draft, check, check_model
from app.embedding import Embedder
from app.errors import BadInput, TooLarge
from app.outcomes import Fault, fault_of
from app.settings import Settings
from app.shadow import Cutter

MAX_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Plan:
    """A draft, checked and cut."""

    draft: Draft
    sha256: bytes
    chunks: list[Chunk]
    chunker: str
    model: str
    own: npt.NDArray[np.float32] | None
    later: bool = False
    """Stored now, cut and embedded by a worker."""

    @property
    def origin(self) -> str:
        """Who computed the vectors, as `embedding_origin` has it."""
        return "pgrecall" if self.own is None else "caller"

    def text(self) -> dict[str, Any]:
        """What the caller gave, but for created_at."""
        draft = self.draft
        return {
            "title": draft.title,
            "content": draft.content,
            "doc_type": draft.doc_type,
            "metadata": draft.metadata,
        }

    def places(self) -> dict[str, Any]:
        """What is known once the text has been cut and embedded."""
        return {
            "content_sha256": None if self.later else self.sha256,
            "chunk_keys": [chunk.key for chunk in self.chunks],
            "start_offsets": [chunk.start for chunk in self.chunks],
            "state": "pending" if self.later else "ready",
            "chunker": None if self.later else self.chunker,
            "embedding_origin": self.origin,
            "embedding_model": None if self.later else self.model,
        }


def check_count(drafts: Sequence[Draft]) -> None:
    """Raise BadInput unless there are 1 to MAX_BATCH."""
    if not 1 <= len(drafts) <= MAX_BATCH:
        raise BadInput("documents", f"{len(drafts)} items; allowed: 1 to {MAX_BATCH:,}")


def plan_all(
    embedder: Embedder | Cutter,
    settings: Settings,
    drafts: Sequence[Draft],
    token_limit: int | None,
    *,
    later: bool = False,
) -> list[Plan]:
    """All the drafts, checked and cut. Raises BadInput and TooLarge, naming the item where there are several."""
    check_count(drafts)
    own = []
    seen: dict[str, int] = {}
    for index, draft in enumerate(drafts):
        try:
            check_model(draft.embedding_model, draft.embedding, embedder.model)
            own.append(check(draft, embedder.dimensions))
        except BadInput as fault:
            raise (fault.under(f"documents[{index}]") if len(drafts) > 1 else fault) from None
        if draft.id in seen:
            raise BadInput(f"documents[{index}].id", f"{draft.id!r} is also the id of documents[{seen[draft.id]}]")
        seen[draft.id] = index
    if token_limit is not None and not later:
        _check_tokens(embedder, [draft.content for draft in drafts if draft.embedding is None], token_limit)
    return [cut(embedder, settings, draft, vector, later=later) for draft, vector in zip(drafts, own, strict=True)]


def plan_each(embedder: Embedder | Cutter, settings: Settings, drafts: Sequence[Draft]) -> list[Plan | Fault]:
    """Each draft, checked and cut, or what is wrong with it."""
    planned: list[Plan | Fault] = []
    seen: dict[str, int] = {}
    for index, draft in enumerate(drafts):
        try:
            check_model(draft.embedding_model, draft.embedding, embedder.model)
            own = check(draft, embedder.dimensions)
            if draft.id in seen:
                raise BadInput("id", f"{draft.id!r} is also the id of documents[{seen[draft.id]}]")  # noqa: TRY301
        except BadInput as error:
            planned.append(fault_of(draft, error))
        else:
            seen[draft.id] = index
            planned.append(cut(embedder, settings, draft, own))
    return planned


def cut(
    embedder: Embedder | Cutter,
    settings: Settings,
    draft: Draft,
    own: npt.NDArray[np.float32] | None,
    *,
    later: bool = False,
) -> Plan:
    """The plan of a draft that keeps the limits. `own`: the vector it brings, which makes it one chunk."""
    max_tokens = min(settings.chunk_max_tokens, embedder.max_tokens)
    if own is not None:
        chunks = [Chunk(chunking.key(draft.content), 0, draft.content)]
        return Plan(draft, cache.digest(draft.content), chunks, "whole", embedder.model, own)
    overlap = settings.chunk_overlap_tokens
    if later:
        return uncut(embedder, settings, draft, later=True)
    chunks = chunking.chunk(draft.content, embedder.count_tokens, max_tokens=max_tokens, overlap_tokens=overlap)
    return Plan(draft, cache.digest(draft.content), chunks, _chunker(embedder, settings), embedder.model, None)


def uncut(embedder: Embedder | Cutter, settings: Settings, draft: Draft, *, later: bool = False) -> Plan:
    """The same without its chunks."""
    own = None if draft.embedding is None else np.asarray(draft.embedding, np.float32)
    chunker = _chunker(embedder, settings) if own is None else "whole"
    return Plan(draft, cache.digest(draft.content), [], chunker, embedder.model, own, later)


def _chunker(embedder: Embedder | Cutter, settings: Settings) -> str:
    rules = f"{chunking.VERSION}/{min(settings.chunk_max_tokens, embedder.max_tokens)}/{settings.chunk_overlap_tokens}"
    return rules + (embedder.fits if isinstance(embedder, Cutter) else "")


def _check_tokens(embedder: Embedder | Cutter, texts: list[str], limit: int) -> None:
    # No tokenizer makes more tokens than bytes, so a small request is let through without counting.
    if sum(len(text.encode()) for text in texts) <= limit:
        return
    tokens = sum(embedder.count_tokens(texts))
    if tokens > limit:
        raise TooLarge(
            "",
            f"the texts have {tokens:,} tokens; allowed in one request: {limit:,} (PGRECALL_REQUEST_TOKENS). Send fewer",
        )

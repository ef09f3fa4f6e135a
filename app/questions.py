"""The vectors of questions. Those asked lately are remembered in this process, so a hot question skips the embedder."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from app.drafts import MAX_QUERY_BYTES, check_text, is_blank
from app.embedding import Embedder
from app.errors import BadInput, EmbeddingFailed

REMEMBERED = 2_000
"""Questions kept for each embedder, the longest unused go first: 12 MB at 1,536 dimensions."""

KEPT = 900.0
"""Seconds after its last use for which a question is remembered: an erased tenant's in other processes, too."""

Vector = npt.NDArray[np.float32]


class Embedded(NamedTuple):
    """The vector of a question, shape (dimensions,), and whether it was remembered."""

    vector: Vector
    remembered: bool


class _Memory:
    """The vectors of one embedder by tenant and text, those used last at the end."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[float, Vector]] = OrderedDict()

    def get(self, key: tuple[str, str]) -> Vector | None:
        used, vector = self._kept.get(key, (float("-inf"), None))
        if vector is None or time.monotonic() - used > KEPT:
            return None
        self.put(key, vector)
        return vector

    def put(self, key: tuple[str, str], vector: Vector) -> None:
        self._kept[key] = (time.monotonic(), vector)
        self._kept.move_to_end(key)

    def trim(self) -> None:
        oldest = time.monotonic() - KEPT
        while self._kept and (len(self._kept) > REMEMBERED or next(iter(self._kept.values()))[0] < oldest):
            self._kept.popitem(last=False)

    def forget(self, tenant_id: str) -> None:
        for key in [key for key in self._kept if key[0] == tenant_id]:
            del self._kept[key]


_known: WeakKeyDictionary[Embedder, _Memory] = WeakKeyDictionary()


def forget(tenant_id: str) -> None:
    """Forget what a tenant asked, in this process."""
    for memory in _known.values():
        memory.forget(tenant_id)


async def vector(embedder: Embedder, text: str, field: str = "query") -> Vector:
    """The vector of one question, embedded now; raises as `embed` does."""
    ((found, _),) = await embed(embedder, None, [text], [field])
    return found


async def embed(
    embedder: Embedder, tenant_id: str | None, texts: Sequence[str], fields: Sequence[str]
) -> list[Embedded]:
    """The vectors of these questions, in one call for those that are not remembered.

    Raises BadInput, naming the field of the text at fault, for one that is blank or longer than the model reads: the
    rest of it would be left out without a word. Memories belong to a tenant, so that no other can tell by the time it
    takes what was asked; None remembers nothing.
    """
    for text, field in zip(texts, fields, strict=True):
        check_text(field, text, 1, MAX_QUERY_BYTES)
        if is_blank(text):
            raise BadInput(field, "is white space only; allowed: a text")
    memory = _Memory() if tenant_id is None else _known.setdefault(embedder, _Memory())
    keys = [(tenant_id or "", text) for text in texts]
    remembered = {key: kept for key in keys if (kept := memory.get(key)) is not None}
    missing = [index for index, key in enumerate(keys) if key not in remembered]
    fresh: dict[tuple[str, str], Vector] = {}
    if missing:
        computed = await _computed(embedder, [texts[i] for i in missing], [fields[i] for i in missing])
        fresh = dict(zip((keys[index] for index in missing), computed, strict=True))
        for key, computed_vector in fresh.items():
            memory.put(key, computed_vector)
    known = remembered | fresh
    found = [Embedded(known[key], key in remembered) for key in keys]
    memory.trim()
    return found


async def _computed(embedder: Embedder, texts: Sequence[str], fields: Sequence[str]) -> list[Vector]:
    for field, tokens in zip(fields, embedder.count_tokens(list(texts)), strict=True):
        if tokens > embedder.max_tokens:
            raise BadInput(
                field, f"has {tokens:,} tokens; allowed: {embedder.max_tokens:,}, as much as {embedder.model} reads"
            )
    try:
        return list(await embedder.embed(texts, "query"))
    except EmbeddingFailed as error:
        if error.index is not None and len(texts) > 1:
            raise EmbeddingFailed(f"{fields[error.index]}: {error}", error.index) from error
        raise

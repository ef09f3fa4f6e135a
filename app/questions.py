"""The vectors of questions. Those asked lately are remembered in this process, so a hot question skips the embedder."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from app.drafts import MAX_QUERY_BYTES, check_text
from app.embedding import Embedder
from app.errors import BadInput, EmbeddingFailed

REMEMBERED = 2_000
"""Questions kept for each embedder, the longest unused go first: 12 MB at 1,536 dimensions."""

Vector = npt.NDArray[np.float32]


class Embedded(NamedTuple):
    """The vector of a question, shape (dimensions,), and whether it was remembered."""

    vector: Vector
    remembered: bool


_known: WeakKeyDictionary[Embedder, OrderedDict[tuple[str, str], Vector]] = WeakKeyDictionary()


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
        if not text.strip():
            raise BadInput(field, "is white space only; allowed: a text")
    memory = OrderedDict[tuple[str, str], Vector]() if tenant_id is None else _known.setdefault(embedder, OrderedDict())
    keys = [(tenant_id or "", text) for text in texts]
    remembered = {key: memory[key] for key in keys if key in memory}
    for key in remembered:
        memory.move_to_end(key)
    missing = [index for index, key in enumerate(keys) if key not in remembered]
    fresh: dict[tuple[str, str], Vector] = {}
    if missing:
        computed = await _computed(embedder, [texts[i] for i in missing], [fields[i] for i in missing])
        fresh = dict(zip((keys[index] for index in missing), computed, strict=True))
        memory.update(fresh)
    known = remembered | fresh
    found = [Embedded(known[key], key in remembered) for key in keys]
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
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

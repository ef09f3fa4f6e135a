"""Texts in batches, and what comes of asking a model for their vectors."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from app.errors import EmbeddingFailed, PgrecallError

Kind = Literal["document", "query"]
Vectors = npt.NDArray[np.float32]

Done = Callable[[Sequence[str], Vectors], None]
"""Is told of texts and their vectors, shape (texts, dimensions), as soon as the model has given them."""

WORTH_A_REQUEST = 64
"""Texts that are not spread over several requests: one answer for them comes as soon as one for a few of them."""
TOKENS_WORTH_A_REQUEST = 16_000
NAMED = 5
"""Texts at fault that a message names."""


class Attempt(NamedTuple):
    """Vectors of texts, shape (texts, dimensions), and why some have none: their rows are NaN.

    `faults` are by position. An EmbeddingFailed with `index` is that text's own fault and stays; any other error came in
    the way and may pass.
    """

    vectors: Vectors
    faults: dict[int, PgrecallError]

    def complete(self) -> Vectors:
        """The vectors, if every text has one. Raises EmbeddingFailed with `faults` for texts at fault, else what came in the way."""
        if not self.faults:
            return self.vectors
        refused = {
            position: str(fault)
            for position, fault in sorted(self.faults.items())
            if isinstance(fault, EmbeddingFailed) and fault.index is not None
        }
        if refused:
            raise EmbeddingFailed(named(refused, len(self.vectors), "text {}"), faults=refused)
        raise next(iter(self.faults.values()))


def named(faults: dict[int, str], of: int, name: str) -> str:
    """The faults of `of` things in one message, each behind its name; the only thing there is needs none."""
    if of == 1:
        return next(iter(faults.values()))
    more = f"; and {len(faults) - NAMED:,} more" if len(faults) > NAMED else ""
    first = list(faults.items())[:NAMED]
    return "; ".join(f"{name.format(position)}: {fault}" for position, fault in first) + more


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


def spread(tokens: Sequence[int], lanes: int, max_count: int, max_total: int) -> list[range]:
    """Batches as `batches`, about as even as many as can be under way at once, where the texts are worth that many."""
    if not tokens:
        return []
    total = sum(tokens)
    worthwhile = max(math.ceil(len(tokens) / WORTH_A_REQUEST), math.ceil(total / TOKENS_WORTH_A_REQUEST))
    parts = max(min(lanes, worthwhile), math.ceil(len(tokens) / max_count), math.ceil(total / max_total))
    # A text belongs to the part its middle lies in, which keeps the order.
    middles = np.cumsum(tokens) - np.array(tokens) / 2
    part = np.minimum(middles * parts / max(total, 1), parts - 1).astype(int)
    bounds = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(tokens)]
    return [
        range(start + run.start, start + run.stop)
        for start, stop in itertools.pairwise(bounds)
        for run in batches(tokens[start:stop], max_count, max_total)
    ]

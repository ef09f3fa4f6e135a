"""Maximal marginal relevance: of the best hits, those that tell something the ones above do not (pure).

Carbonell and Goldstein 1998: again and again the hit with the highest (1 - d) * relevance - d * likeness is taken, where
likeness is the highest cosine similarity to one already taken.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

CHOICE = 5
"""Hits looked at for each one taken."""


Hit = TypeVar("Hit")


def chosen(
    hits: Sequence[Hit],
    scores: Sequence[float],
    vectors: Sequence[npt.NDArray[np.float32]],
    top_k: int,
    diversity: float,
) -> list[Hit]:
    """At most `top_k` of the hits, in the order they are taken. A score and a vector for each; `diversity` in [0, 1].

    Scores count as shares of the largest one, so that similarities, text scores, fused ones and a reranker's weigh alike.
    """
    if not hits:
        return []
    stacked = np.stack(vectors).astype(np.float64)
    stacked /= np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)
    relevance = np.array(scores) / max(float(np.abs(scores).max()), 1e-12)
    likeness = np.full(len(hits), 0.0)
    taken: list[int] = []
    while len(taken) < min(top_k, len(hits)):
        worth = (1 - diversity) * relevance - diversity * likeness
        worth[taken] = -np.inf
        best = int(np.argmax(worth))
        taken.append(best)
        likeness = np.maximum(likeness, stacked @ stacked[best])
    return [hits[index] for index in taken]

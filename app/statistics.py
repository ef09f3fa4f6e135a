"""Figures about figures: bootstrap intervals, and what a similarity threshold keeps.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 (percentile interval) and 16 (paired data).
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

SEED = 20_261_123
"""The same figures give the same intervals."""

RESAMPLES = 10_000
LEVEL = 0.95

_AT_ONCE = 2_000_000

Item = TypeVar("Item")

Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """Bounds between which a mean lies with a confidence of 95 %."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


def intervals(values: Floats, *, seed: int = SEED) -> list[Interval]:
    """The interval of each column's mean, from resampling the rows (shape (queries, figures)) with replacement.

    For paired figures give the differences: their rows are drawn together. Raises ValueError for fewer than two rows,
    which say nothing about how others would differ.
    """
    count = len(values)
    if count < 2:
        raise ValueError("an interval takes two queries or more")
    random = np.random.default_rng(seed)
    means: list[Floats] = []
    for start in range(0, RESAMPLES, step := max(1, _AT_ONCE // count)):
        drawn = random.integers(0, count, (min(step, RESAMPLES - start), count))
        means.append(np.stack([column[drawn].mean(axis=1) for column in values.T], axis=1))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    return [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def sample(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of them, drawn at random, the same ones each time, in their order."""
    drawn = np.random.default_rng(SEED).permutation(len(items))[:count]
    return [items[place] for place in sorted(drawn)]


class Hits(NamedTuple):
    """One query's hits. `relevant`: similarities of the relevant ones; `wanted`: relevant documents, found or not."""

    relevant: Sequence[float]
    irrelevant: Sequence[float]
    wanted: int


class Curve(NamedTuple):
    """What a threshold keeps. All of one length; `precision` is NaN where no hit is left."""

    thresholds: Floats
    precision: Floats
    recall: Floats


def threshold_curve(queries: Sequence[Hits], thresholds: Floats) -> Curve:
    """Precision and recall of the hits at least as similar as each threshold.

    Precision is that of all hits together, recall the mean over the queries, as in recall@k: the curve starts there.
    """
    relevant = np.sort([similarity for query in queries for similarity in query.relevant])
    irrelevant = np.sort([similarity for query in queries for similarity in query.irrelevant])
    right = len(relevant) - np.searchsorted(relevant, thresholds, "left")
    kept = right + len(irrelevant) - np.searchsorted(irrelevant, thresholds, "left")
    weight = sorted((similarity, 1 / query.wanted) for query in queries for similarity in query.relevant)
    below = np.concatenate([[0.0], np.cumsum([share for _, share in weight])])
    recall = (below[-1] - below[np.searchsorted(relevant, thresholds, "left")]) / len(queries)
    precision = np.divide(right, kept, out=np.full(len(thresholds), np.nan), where=kept > 0)
    return Curve(thresholds, precision, recall)


def keeping_threshold(similarities: Sequence[float], share: float) -> float | None:
    """The highest threshold that still keeps `share` (above 0, at most 1) of these; None where there are none."""
    if not similarities:
        return None
    return sorted(similarities, reverse=True)[int(np.ceil(share * len(similarities) - 1e-9)) - 1]

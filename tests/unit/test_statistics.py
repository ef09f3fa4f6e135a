"""Intervals and thresholds against counting everything."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import statistics
from app.statistics import Hits

SIMILARITIES = st.lists(st.integers(-20, 20).map(lambda n: n / 20), max_size=6)
QUERY = st.builds(
    lambda relevant, others, more: Hits(relevant, others, max(1, len(relevant) + more)),
    SIMILARITIES,
    SIMILARITIES,
    st.integers(0, 3),
)


def test_an_interval_is_what_all_resamples_together_give():
    values = np.array([0.0, 0.2, 0.7, 1.0, 0.4, 0.95])
    means = [np.mean(drawn) for drawn in product(values, repeat=len(values))]
    ((low, high),) = statistics.intervals(values[:, None])
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.01)
    assert statistics.intervals(values[:, None]) == [(low, high)]


def test_an_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(3).normal(0.5, 0.2, (2_000, 2))
    for (low, high), mean, sd in zip(
        statistics.intervals(values), values.mean(axis=0), values.std(axis=0), strict=True
    ):
        reach = 1.96 * sd / 2_000**0.5
        assert (low, high) == pytest.approx((mean - reach, mean + reach), abs=reach / 20)


def test_pairs_are_drawn_together():
    other = np.random.default_rng(3).random((50, 1))
    assert statistics.intervals(other + 0.1 - other)[0] == pytest.approx((0.1, 0.1))


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="two queries"):
        statistics.intervals(np.array([[0.5]]))


@given(st.lists(QUERY, min_size=1, max_size=4), st.integers(-22, 22).map(lambda n: n / 20))
def test_a_threshold_keeps_what_counting_says(queries, threshold):
    curve = statistics.threshold_curve(queries, np.array([threshold]))
    kept = [sum(s >= threshold for s in query.relevant) for query in queries]
    others = sum(s >= threshold for query in queries for s in query.irrelevant)
    assert curve.recall[0] == pytest.approx(np.mean([n / q.wanted for n, q in zip(kept, queries, strict=True)]))
    if sum(kept) + others:
        assert curve.precision[0] == pytest.approx(sum(kept) / (sum(kept) + others))
    else:
        assert np.isnan(curve.precision[0])


@given(st.lists(st.integers(0, 30), min_size=1), st.sampled_from([0.5, 0.9, 0.95, 1.0]))
def test_the_keeping_threshold_is_the_highest_that_keeps_enough(values, share):
    kept = statistics.keeping_threshold(values, share)
    assert sum(value >= kept for value in values) >= share * len(values)
    assert sum(value > kept for value in values) < share * len(values)


def test_nothing_found_has_no_keeping_threshold():
    assert statistics.keeping_threshold([], 0.95) is None


def test_a_sample_is_the_same_each_time_and_in_order():
    drawn = statistics.sample(range(1_000), 50)
    assert drawn == statistics.sample(range(1_000), 50) == sorted(set(drawn))
    assert (len(drawn), statistics.sample([3, 1, 2], 10)) == (50, [3, 1, 2])

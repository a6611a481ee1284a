"""Intervals against published and independently computed figures."""

import math

import pytest
from scipy import stats

from limbeck.metrics.intervals import paired_wins, t_interval, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (81, 263), (15, 148), (1, 29), (347, 359)])
def test_wilson_agrees_with_scipy(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_at_the_borders():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == pytest.approx(0.0, abs=1e-15)
    assert wilson(5, 5)[1] == pytest.approx(1.0, abs=1e-15)
    assert wilson(50, 100, 0.99)[0] < wilson(50, 100, 0.9)[0]


def test_t_interval_agrees_with_scipy():
    values = [0.91, 0.93, 0.92, 0.95, 0.90]
    mean, half = t_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_seed_says_nothing_about_spread():
    assert t_interval([0.5]) == (0.5, math.inf)


def test_wins_are_strict_and_paired():
    assert paired_wins([1, 2, 3], [0, 2, 4]) == 1
    assert paired_wins([1, 2, 3], [0, 2, 4], higher_is_better=False) == 1
    with pytest.raises(ValueError, match="shorter"):
        paired_wins([1, 2], [1])

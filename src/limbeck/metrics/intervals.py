"""Intervals that say how far a figure can be trusted."""

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev


def wilson(successes: int | float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927), sound also near 0 and 1 and for few items.

    Args:
        successes: how many of the `n` items, in [0, n].
        n: number of items; without any the interval is (0, 1).
        confidence: probability that the interval covers the true share, in (0, 1).

    Returns:
        The ends of the interval, in [0, 1].
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, squared = successes / n, z * z / n
    centre = (share + squared / 2) / (1 + squared)
    half = z * math.sqrt(share * (1 - share) / n + squared / (4 * n)) / (1 + squared)
    return max(0.0, centre - half), min(1.0, centre + half)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean over seeds and the half-width of its interval (Student 1908); the half-width of one value is infinite."""
    if len(values) < 2:
        return mean(values), math.inf
    from scipy.stats import t  # scipy comes with scikit-learn, and is slow to import

    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def paired_wins(ours: Sequence[float], theirs: Sequence[float], higher_is_better: bool = True) -> int:
    """On how many seeds the first is strictly better than the second.

    Args:
        ours: a figure a seed.
        theirs: the other's figures, of the same seeds in the same order.
        higher_is_better: direction of the figure.

    Raises:
        ValueError: different numbers of seeds.
    """
    sign = 1 if higher_is_better else -1
    return sum(sign * (our - their) > 0 for our, their in zip(ours, theirs, strict=True))

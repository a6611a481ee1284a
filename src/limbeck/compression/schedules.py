"""When how many weights are zero."""


def cubic_sparsity(progress: float, end: float, start: float = 0.0) -> float:
    r"""Sparsity on the way from `start` to `end`: fast at first, while there is much that nobody misses.

    .. math:: s = s_e + (s_0 - s_e) (1 - p)^3

    Args:
        progress: share of the pruning done, in [0, 1]; values outside count as the nearer end.
        end: sparsity in the end, in [0, 1].
        start: sparsity in the beginning, in [0, 1].

    Source: Zhu, Gupta, *To prune, or not to prune*, 2017, arXiv 1710.01878.
    """
    left = 1 - min(max(progress, 0.0), 1.0)
    return end + (start - end) * left**3


def pruning_step(step: int, begin: int, end: int, interval: int) -> float | None:
    """Progress k / n of the pruning due at a step, of those at begin, begin + interval, ...; None if none is due.

    The last of them, k = n, is the last multiple that does not lie behind `end`; where only `begin` itself fits, that
    one does it all.

    Args:
        step: this step, from 0.
        begin: step of the first pruning.
        end: no pruning happens behind this step.
        interval: steps between prunings, at least 1.
    """
    last = max(0, end - begin) // interval
    place, rest = divmod(step - begin, interval)
    if rest or not 0 <= place <= last:
        return None
    return place / last if last else 1.0

"""Which items to ask a fallible teacher about: a distribution that an adversary cannot spoil, and draws from it."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LEAST_GAIN = 1e-12
"""Gains below are raised to this: a gain of 0 would make an infinite probability."""

_WHOLE = 1e-9  # a marginal this near to 0 or 1 is decided


class RobustDistribution(NamedTuple):
    """The solution of the game between who queries and who corrupts the teacher's answers.

    Attributes:
        probabilities: (items,) float64, sum 1.
        support: how many items have a positive probability.
        value: the least expected payoff of a query, whichever answers are wrong.
    """

    probabilities: Tensor
    support: int
    value: float


def worst_case_value(
    probabilities: Float[Tensor, "items"],
    gains: Float[Tensor, "items"],
    wrong: int,
    losses: Float[Tensor, "items"] | None = None,
) -> float:
    r"""The expected payoff of a query if those `wrong` answers are false that hurt most.

    .. math:: \sum_i p_i g_i - \max_{|W| = m} \sum_{i \in W} p_i (g_i + l_i)

    Args:
        probabilities: (items,), of asking about each item.
        gains: (items,), at least 0: what a right answer is worth.
        wrong: m, how many answers are false; all of them where there are fewer items.
        losses: (items,), at least 0: what a false answer costs; nothing if absent.
    """
    p, gain = probabilities.double(), gains.double()
    stake = p * (gain if losses is None else gain + losses.double())
    return float((p * gain).sum() - stake.topk(min(wrong, len(stake))).values.sum())


def rad_distribution(
    gains: Float[Tensor, "items"],
    wrong: int,
    losses: Float[Tensor, "items"] | None = None,
    *,
    at_least: int = 1,
    generator: torch.Generator | None = None,
) -> RobustDistribution:
    r"""The distribution over items that maximises `worst_case_value`, in closed form.

    With gains in descending order and :math:`H_k = \sum_{i \le k} 1 / (g_i + l_i)`,

    .. math::
        k^* = \arg\max_{k > m} \frac{\sum_{i \le k} g_i / (g_i + l_i) - m}{H_k}, \qquad
        p_i = \frac{1 / (g_i + l_i)}{H_{k^*}} \text{ for } i \le k^*, \text{ else } 0

    so that each item of the support is worth as much to the adversary. Where every such distribution is worth less
    than asking where a false answer costs least, or m covers all items, the items of the smallest loss share the mass
    equally; without losses that is the uniform distribution.

    Args:
        gains: (items,), at least 0; raised to `LEAST_GAIN`.
        wrong: m, how many answers may be false, at least 0.
        losses: (items,), at least 0: what a false answer costs; nothing if absent.
        at_least: a support smaller than this is not considered, for draws of so many items without replacement.
        generator: decides the order of equal gains; without one it is the items'.

    Raises:
        ValueError: no items, shapes that differ, or a negative number.

    Source: Baykal et al., *Robust Active Distillation*, ICLR 2023, arXiv 2210.01213; the form with losses and the
    case of no solution are limbeck's.
    """
    _check(gains, wrong, losses)
    items = len(gains)
    shuffle = torch.randperm(items, generator=generator) if generator is not None else torch.arange(items)
    gain = gains.detach().cpu().double().clamp_min(LEAST_GAIN)
    loss = torch.zeros_like(gain) if losses is None else losses.detach().cpu().double()
    order = shuffle[gain[shuffle].argsort(descending=True, stable=True)]
    weight = 1 / (gain + loss)[order]
    norms = weight.cumsum(0)  # float64: an item that is as good as known weighs 1e12
    values = ((gain[order] * weight).cumsum(0) - wrong) / norms
    first = max(wrong, min(at_least, items) - 1, 0)  # place of the smallest support
    best = float(values[first:].max()) if first < items else -torch.inf
    cheapest = (loss <= loss.kthvalue(min(max(at_least, 1), items)).values).double()
    retreat = cheapest / cheapest.sum()
    if best < (floor := worst_case_value(retreat, gain, wrong, loss)):
        return RobustDistribution(retreat, int(cheapest.sum()), floor)
    # Of equally good supports the largest, so that equal gains are treated alike.
    support = int((values[first:] >= best - 1e-12 * abs(best)).nonzero()[-1]) + first + 1
    probabilities = torch.zeros_like(gain)
    probabilities[order[:support]] = weight[:support] / norms[support - 1]
    return RobustDistribution(probabilities, support, float(values[support - 1]))


def inclusion_probabilities(probabilities: Float[Tensor, "items"], budget: int) -> Float[Tensor, "items"]:
    """The chance of each item to be among `budget` different ones: budget p, with what exceeds 1 shared by the others.

    Items at 1 are settled, the rest of the budget is spread over the others in proportion to p, and again until none
    exceeds 1.

    Args:
        probabilities: (items,), sum 1.
        budget: how many items are drawn, at least 0 and at most as many as have a positive probability.

    Returns:
        (items,) float64 in [0, 1], sum `budget`.

    Raises:
        ValueError: fewer items than the budget have a positive probability.
    """
    p = probabilities.detach().cpu().double()
    if budget > int((p > 0).sum()):
        raise ValueError(f"{int((p > 0).sum())} items can be drawn, not {budget}: enlarge the support or buy fewer")
    certain = torch.zeros(len(p), dtype=torch.bool)
    while True:
        free = p.masked_fill(certain, 0.0)
        left = budget - int(certain.sum())
        chance = torch.where(certain, 1.0, left * free / free.sum().clamp_min(torch.finfo(p.dtype).tiny))
        exceeding = (chance >= 1) & ~certain
        if left == 0 or not exceeding.any():
            return chance
        certain |= exceeding


def dep_round(chances: Float[Tensor, "items"], generator: torch.Generator | None = None) -> Bool[Tensor, "items"]:
    """Draws a set whose members have exactly these chances, and whose size is their sum (dependent rounding).

    Two undecided chances are moved by opposite amounts, at random and without bias, until one of them is 0 or 1; so on
    until at most one is left, which is drawn by itself.

    Args:
        chances: (items,) in [0, 1]; where they sum to a whole number the set has that many members.
        generator: source of the randomness.

    Returns:
        (items,), True for members.

    Raises:
        ValueError: a chance is outside [0, 1].

    Source: Gandhi et al., *Dependent Rounding and its Applications to Approximation Algorithms*, JACM 2006.
    """
    if not bool(((chances >= -_WHOLE) & (chances <= 1 + _WHOLE)).all()):
        raise ValueError("chances must be in [0, 1]: cap them with inclusion_probabilities")
    chance = chances.detach().cpu().double().tolist()
    draws = torch.rand(len(chance) + 1, generator=generator, dtype=torch.float64).tolist()
    open_item = -1
    for item, draw in zip(range(len(chance)), draws, strict=False):
        if _decided(chance[item]):
            continue
        if open_item >= 0:
            chance[open_item], chance[item] = _shifted(chance[open_item], chance[item], draw)
        if open_item < 0 or _decided(chance[open_item]):
            open_item = item
        if _decided(chance[open_item]):
            open_item = -1
    if open_item >= 0:
        chance[open_item] = float(draws[-1] < chance[open_item])
    return torch.tensor(chance) > 0.5


def _shifted(first: float, second: float, draw: float) -> tuple[float, float]:
    """Two chances of the same sum and the same expectations, of which at least one is decided."""
    up, down = min(1 - first, second), min(first, 1 - second)
    return (first + up, second - up) if draw < down / (up + down) else (first - down, second + down)


def _decided(chance: float) -> bool:
    return chance < _WHOLE or chance > 1 - _WHOLE


def _check(gains: Tensor, wrong: int, losses: Tensor | None) -> None:
    if not len(gains) or wrong < 0 or bool((gains < 0).any()):
        raise ValueError("there must be at least one item, and gains and the number of wrong answers at least 0")
    if losses is not None and (losses.shape != gains.shape or bool((losses < 0).any())):
        raise ValueError("losses must be at least 0, and one an item")

"""How many levels each tensor gets out of a common budget."""

from collections.abc import Sequence
from typing import Literal

Unit = Literal["points", "bits"]


def allocate(norms: Sequence[float], count: int, unit: Unit = "points") -> list[int]:
    """Points or bits of each tensor, `count` on average, more where the loss depends more on the weights.

    Every tensor keeps a base, half of `count` points or one bit less; the rest is shared in proportion to the norms of
    the tensors' gradients, rounded half to even. What is then too much is taken from the largest share, what is missing
    goes to the smallest, the first of several.

    Args:
        norms: of the gradient of each tensor, not negative; all 0 count as equal.
        count: points or bits a tensor, at least 1.
        unit: what is shared.

    Source: Polino et al., *Model Compression via Distillation and Quantization*, ICLR 2018, arXiv 1802.05668.
    """
    base = count // 2 if unit == "points" else count - 1
    total = count * len(norms)
    rest, whole = total - base * len(norms), sum(norms)
    shares = [norm / whole if whole else 1 / len(norms) for norm in norms]
    given = [base + round(rest * share) for share in shares]  # round() is half to even
    surplus = sum(given) - total
    place = given.index(max(given) if surplus > 0 else min(given))
    given[place] -= surplus
    return given

"""How unsure a classifier is of each item: what a student would gain from being told the answer."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.divergences import log_probabilities
from limbeck.objectives.operands import full_precision

Uncertainty = Literal["margin", "entropy", "least-confidence"]
"""Names of the scores of `uncertainty`."""


@full_precision
def uncertainty(logits: Float[Tensor, "items classes"], kind: Uncertainty = "margin") -> Float[Tensor, "items"]:
    r"""A score in [0, 1] of each item: 0 where the classifier is sure, 1 where it knows nothing.

    .. math::
        \text{margin: } 1 - (p_{(1)} - p_{(2)}), \qquad
        \text{entropy: } -\tfrac{1}{\log C} \sum_c p_c \log p_c, \qquad
        \text{least-confidence: } 1 - p_{(1)}

    Args:
        logits: (items, classes), at least two classes.
        kind: which score; that of the least confidence ends at 1 - 1/classes.

    Returns:
        (items,), float32 or better.

    Raises:
        ValueError: there is one class only, or no such score.

    Source: Settles, *Active Learning Literature Survey*, 2009.
    """
    if logits.shape[1] < 2:
        raise ValueError("uncertainty needs at least 2 classes")
    log_p = log_probabilities(logits)
    p = log_p.exp()
    if kind == "margin":
        first, second = p.topk(2, dim=1).values.unbind(1)
        return 1 - (first - second)
    if kind == "least-confidence":
        return 1 - p.amax(1)
    if kind == "entropy":
        log_classes = p.new_tensor(float(p.shape[1])).log()
        return (-(p * log_p.clamp_min(-1e30)).sum(1) / log_classes).clamp(0, 1)
    raise ValueError(f"unknown uncertainty {kind!r}; known: margin, entropy, least-confidence")

"""What synthetic data are matched by: class means of features and attention, and gradients of networks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional


def class_means(
    values: Float[Tensor, "items *shape"], labels: Int64[Tensor, " items"], classes: int
) -> tuple[Float[Tensor, "classes *shape"], Float[Tensor, " classes"]]:
    """The mean of each class, 0 for a class without items, and how many items each has.

    Args:
        values: of any shape an item.
        labels: class of each item; those below 0 count for none.
        classes: number of classes.
    """
    values = _precise(values)
    member = functional.one_hot(labels.clamp(min=0), classes).to(values) * (labels >= 0).to(values)[:, None]
    counts = member.sum(0)
    sums = member.T @ values.flatten(1)
    return (sums / counts.clamp(min=1)[:, None]).unflatten(1, values.shape[1:]), counts


def mean_gap(
    real: Float[Tensor, "classes *shape"],
    synthetic: Float[Tensor, "classes *shape"],
    present: Float[Tensor, " classes"],
) -> Float[Tensor, ""]:
    """Squared distance of class means, summed over the classes that are present: distribution matching's loss.

    Zhao and Bilen, 2023.

    Args:
        real: class means of the real data; no gradient flows to them.
        synthetic: class means of the synthetic data.
        present: which classes count: above 0 where real items were seen.
    """
    gaps = (_precise(real).detach() - _precise(synthetic)).flatten(1).square().sum(1)
    return torch.where(present > 0, gaps, 0.0).sum()


def spatial_attention(
    features: Float[Tensor, "items channels height width"], power: float = 4.0, norm: str = "l2"
) -> Float[Tensor, "items places"]:
    """Where an image activates a layer: sum over channels of |feature|**power, each image divided by its own norm.

    Sajedi et al., 2023 (DataDAM); the maps of attention transfer (Zagoruyko and Komodakis, 2017), summed.

    Args:
        features: a layer's map after its ReLU.
        power: above 0; the paper's 4, where the published code takes 1.
        norm: "l2" or "l1" of the flattened map, or "none".
    """
    # Each step that can be left out is a copy of the whole map less.
    sizes = _precise(features) if power % 2 == 0 else _precise(features).abs()
    attention = (sizes if power == 1 else sizes.pow(power)).sum(1).flatten(1)
    if norm == "none":
        return attention
    # A map that is 0 everywhere stays so, with a gradient of 0.
    return functional.normalize(attention, p=2.0 if norm == "l2" else 1.0, dim=1, eps=1e-12)


def gradient_gap(
    real: Sequence[Float[Tensor, "..."]], synthetic: Sequence[Float[Tensor, "..."]], measure: str = "rows"
) -> Float[Tensor, ""]:
    """How far two gradients of the same network are apart: gradient matching's loss (Zhao et al., 2021).

    Args:
        real: a gradient a weight; none flows to it.
        synthetic: likewise.
        measure: "rows" sums 1 - cosine over the rows (output channels) of all weights and leaves biases and norms out;
            "mse" is the squared difference of all numbers, summed; "cosine" is 1 - the one cosine of all numbers.
    """
    pairs = [(_precise(one).detach(), _precise(other)) for one, other in zip(real, synthetic, strict=True)]
    if measure == "mse":
        return torch.stack([(one - other).square().sum() for one, other in pairs]).sum()
    if measure == "cosine":
        one, other = (torch.cat([part.flatten() for part in side]) for side in zip(*pairs, strict=True))
        return _away(one[None], other[None]).sum()
    rows = [_away(one.flatten(1), other.flatten(1)).sum() for one, other in pairs if one.ndim > 1]
    return torch.stack(rows).sum()


def _away(one: Float[Tensor, "rows dims"], other: Float[Tensor, "rows dims"]) -> Float[Tensor, " rows"]:
    """1 - cosine of each row; the denominator is 1e-6 larger, so that a row of zeros is away from all by 1."""
    # The root of 0 has no gradient: vector_norm gives it 0.
    lengths = torch.linalg.vector_norm(one, dim=1) * torch.linalg.vector_norm(other, dim=1)
    return 1 - (one * other).sum(1) / (lengths + 1e-6)


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()

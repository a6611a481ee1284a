"""A tensor's weights cut into buckets, each with a scale of its own."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Scaling = Literal["linear", "absmax", "absnorm"]

FLAT = 1e-10
"""A bucket whose scale is smaller than this is scaled by 1."""


@dataclass(frozen=True)
class Scaled:
    """Weights as alpha v + beta, or, with their signs kept aside, as sign alpha v; v lies in [0, 1].

    Attributes:
        values: v, (buckets, size), with the padding of the last bucket.
        alpha: scale of each bucket, (buckets,).
        beta: least weight of each bucket, (buckets,); None where signs are kept aside.
        negative: which weights are below 0, (buckets, size); None for linear scaling.
        count: weights without padding.
    """

    values: Float[Tensor, "buckets size"]
    alpha: Float[Tensor, " buckets"]
    beta: Float[Tensor, " buckets"] | None
    negative: Bool[Tensor, "buckets size"] | None
    count: int

    def unscale(self, values: Float[Tensor, "buckets size"]) -> Float[Tensor, " weights"]:
        """The weights (weights,) that other values in the same places stand for, padding dropped."""
        return unscale(values, self.alpha, self.beta, self.negative, self.count)


def scale(weights: Float[Tensor, "*shape"], bucket: int | None, scaling: Scaling = "linear") -> Scaled:
    """Flattens a tensor, cuts it into buckets and scales each to [0, 1].

    Costs four passes over the weights, and one more where the last bucket is padded. Differentiable: the scales depend
    on the largest and the least entry of their bucket.

    Args:
        weights: at least one, of any shape; half precision is raised to float32.
        bucket: weights a bucket; the last one is filled up with its last weight. None, and any number larger than the
            tensor, makes the tensor one bucket.
        scaling: "linear": beta is the least weight, alpha the distance to the largest. "absmax", "absnorm": alpha is
            the largest magnitude, or the Euclidean norm, and signs are kept aside.

    Source: Polino et al., *Model Compression via Distillation and Quantization*, ICLR 2018, arXiv 1802.05668.
    """
    flat = weights.flatten().to(torch.promote_types(weights.dtype, torch.float32))
    rows = into_buckets(flat, bucket)
    if scaling == "linear":
        beta, largest = rows.min(1).values, rows.max(1).values
        alpha = _at_least(largest - beta)
        return Scaled((rows - beta[:, None]) / alpha[:, None], alpha, beta, None, len(flat))
    magnitudes = rows.abs()
    if scaling == "absmax":
        alpha = magnitudes.max(1).values
    else:  # without the padding, which would count the last weight several times
        alpha = torch.cat([rows[:-1].norm(dim=1), flat[rows.shape[1] * (len(rows) - 1) :].norm()[None]])
    alpha = _at_least(alpha)
    return Scaled(magnitudes / alpha[:, None], alpha, None, rows.detach() < 0, len(flat))


def unscale(
    values: Float[Tensor, "buckets size"],
    alpha: Float[Tensor, " buckets"],
    beta: Float[Tensor, " buckets"] | None,
    negative: Bool[Tensor, "buckets size"] | None,
    count: int,
) -> Float[Tensor, " weights"]:
    """alpha v + beta, or sign alpha v, without padding; two passes.

    A product and a sum, never fused: so that every device and a later reader come to the same bits.
    """
    weights = values * alpha[:, None]
    if negative is not None:
        weights = torch.where(negative, -weights, weights)
    if beta is not None:
        weights = weights + beta[:, None]
    return weights.flatten()[:count]


def into_buckets(flat: Float[Tensor, " weights"], bucket: int | None) -> Float[Tensor, "buckets size"]:
    """Rows of `bucket` weights; a view where they divide evenly, else the last weight fills the last row."""
    if bucket is None or bucket >= len(flat):
        return flat[None]
    missing = -len(flat) % bucket
    return (flat if not missing else torch.cat([flat, flat[-1:].expand(missing)])).view(-1, bucket)


def bucket_count(weights: int, bucket: int | None) -> int:
    """How many buckets so many weights make."""
    return 1 if bucket is None or bucket >= weights else -(-weights // bucket)


def _at_least(alpha: Tensor) -> Tensor:
    return torch.where(alpha < FLAT, torch.ones_like(alpha), alpha)

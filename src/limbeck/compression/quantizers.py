"""Quantisation of weights to evenly spaced levels, and gradients through it."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.compression.buckets import Scaling, scale
from limbeck.compression.quantized import QuantizedTensor, indices_of

Gradient = Literal["none", "truncated", "complicated"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, replacement: Tensor) -> Tensor:
        return replacement.view_as(replacement)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # one, as there is one output
        return gradients[0], None


def straight_through(value: Float[Tensor, "*shape"], replacement: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Exactly `replacement` going forward; going back, all of the gradient belongs to `value`."""
    return _StraightThrough.apply(value, replacement.detach())


def round_levels(
    values: Float[Tensor, "*shape"], levels: int, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """The level 0 to levels - 1 of each value in [0, 1]; no gradient.

    Args:
        values: scaled weights.
        levels: at least 2.
        generator: rounds up with the probability of the fractional part, so that the expectation is the value itself;
            None rounds to the nearest level, half to even.
    """
    places = values.detach() * (levels - 1)
    if generator is None:
        return places.round_()
    noise = torch.rand(places.shape, generator=generator, device=places.device, dtype=places.dtype)
    return places.add_(noise).floor_().clamp_(max=levels - 1)


def quantize(
    weights: Float[Tensor, "*shape"], levels: int, *, bucket: int | None = 256, scaling: Scaling = "linear"
) -> QuantizedTensor:
    """A tensor with its weights rounded to the nearest of evenly spaced levels between the extremes of their bucket.

    The error is at most alpha / (2 (levels - 1)). About six passes over the weights.

    Args:
        weights: at least one.
        levels: 2 to 256.
        bucket, scaling: see `buckets.scale`.
    """
    with torch.no_grad():
        scaled = scale(weights, bucket, scaling)
        indices = indices_of(round_levels(scaled.values, levels)).flatten()[: scaled.count]
    negative = None if scaled.negative is None else scaled.negative.flatten()[: scaled.count]
    return QuantizedTensor(
        indices, scaled.alpha, scaled.beta, negative, None, levels, bucket, tuple(weights.shape), weights.dtype
    )


def fake_quantize(
    weights: Float[Tensor, "*shape"],
    levels: int,
    *,
    bucket: int | None = 256,
    scaling: Scaling = "linear",
    gradient: Gradient = "none",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Quantised weights in floating point, with a gradient for the weights behind them.

    About eight passes over the weights; autograd keeps none of them for "none", and a mask for "truncated".

    Args:
        weights: at least one.
        levels: at least 2.
        bucket, scaling: see `buckets.scale`.
        gradient: "none": the gradient passes as it is. "truncated": weights are first clamped to [-1, 1], and outside
            of it the gradient is 0. "complicated": the derivative through the scales is added, rounding counting as
            the identity: with linear scaling the entry that is its bucket's largest gets
            :math:`\sum_i g_i (q_i - v_i)`, the least one loses it.
        generator: for stochastic rounding; see `round_levels`.

    Source: Polino et al., *Model Compression via Distillation and Quantization*, ICLR 2018, arXiv 1802.05668.
    """
    if gradient == "truncated":
        weights = weights.clamp(-1, 1)
    if gradient == "complicated":
        return _quantized(weights, levels, bucket, scaling, generator)
    with torch.no_grad():
        replacement = _quantized(weights, levels, bucket, scaling, generator)
    return straight_through(weights, replacement)


def _quantized(
    weights: Tensor, levels: int, bucket: int | None, scaling: Scaling, generator: torch.Generator | None
) -> Tensor:
    scaled = scale(weights, bucket, scaling)
    rounded = round_levels(scaled.values, levels, generator) / (levels - 1)
    return scaled.unscale(straight_through(scaled.values, rounded)).view(weights.shape).to(weights.dtype)

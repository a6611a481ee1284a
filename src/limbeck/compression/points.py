"""Quantisation to points that are learned: where the levels of a tensor lie between the extremes of its buckets."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.compression.buckets import Scaled, Scaling, scale
from limbeck.compression.quantized import QuantizedTensor, even_points, indices_of


def nearest_points(values: Float[Tensor, "*shape"], points: Float[Tensor, " levels"]) -> Int[Tensor, "*shape"]:
    """Index of the nearest point of each value, the lower one where two are equally near; int32.

    One pass with a binary search among the middles between points; no table of distances.

    Args:
        values: any range.
        points: ascending.
    """
    middles = (points[1:] + points[:-1]) / 2
    return torch.bucketize(values.detach(), middles.detach(), out_int32=True)


def quantile_points(
    weights: Float[Tensor, "*shape"], levels: int, *, bucket: int | None = 256, scaling: Scaling = "linear"
) -> Float[Tensor, " levels"]:
    """Points at the quantiles 0, 1/(levels-1), …, 1 of the scaled weights, interpolated linearly; sorts them once.

    Args:
        weights: at least one.
        levels: at least 1; a single point lies at the least value.
        bucket, scaling: see `buckets.scale`.
    """
    with torch.no_grad():
        scaled = scale(weights, bucket, scaling)
        ordered = scaled.values.flatten()[: scaled.count].sort().values
        places = even_points(levels, torch.float64).to(ordered.device) * (len(ordered) - 1)
        below = places.floor()
        low, high = ordered[below.long()], ordered[places.ceil().long()]
        return torch.lerp(low.double(), high.double(), places - below).to(ordered.dtype)


class _Place(torch.autograd.Function):
    """alpha p[index] by bucket; its gradient belongs to the points alone."""

    @staticmethod
    def forward(context: Any, points: Tensor, indices: Tensor, factor: Tensor) -> Tensor:
        context.save_for_backward(points, indices, factor)
        return points.index_select(0, indices.flatten()).view_as(indices) * factor  # far faster than indexing

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        points, indices, factor = context.saved_tensors
        # Sums over millions of weights: in float64, and by a histogram, as an index put would sort them first.
        weighted = (gradients[0] * factor).flatten().double()
        total = torch.bincount(indices.flatten(), weights=weighted, minlength=len(points))
        return total.to(points.dtype), None, None


def fake_quantize_to_points(
    weights: Float[Tensor, "*shape"],
    points: Float[Tensor, " levels"],
    *,
    bucket: int | None = 256,
    scaling: Scaling = "linear",
) -> Float[Tensor, "*shape"]:
    r"""Fixed weights moved to their nearest points, with a gradient for the points.

    .. math:: w_i = \alpha_{B(i)}\, p_{a(i)} + \beta_{B(i)}, \qquad
        \frac{\partial L}{\partial p_j} = \sum_{i:\,a(i) = j} g_i\, \alpha_{B(i)}

    About eight passes over the weights, whatever the number of points; autograd keeps four bytes a weight.

    Args:
        weights: at least one; no gradient reaches them.
        points: ascending, in the scaled domain.
        bucket, scaling: see `buckets.scale`.

    Source: Polino et al., *Model Compression via Distillation and Quantization*, ICLR 2018, arXiv 1802.05668.
    """
    scaled = scale(weights.detach(), bucket, scaling)
    indices = nearest_points(scaled.values, points)
    factor = scaled.alpha[:, None]
    if scaled.negative is not None:
        factor = torch.where(scaled.negative, -factor, factor)
    placed = _Place.apply(points, indices, factor)
    if scaled.beta is not None:
        placed = placed + scaled.beta[:, None]
    return placed.flatten()[: scaled.count].view(weights.shape).to(weights.dtype)


@torch.no_grad()
def quantize_to_points(
    weights: Float[Tensor, "*shape"],
    points: Float[Tensor, " levels"],
    *,
    bucket: int | None = 256,
    scaling: Scaling = "linear",
) -> QuantizedTensor:
    """A tensor with its weights moved to the nearest of at most 256 ascending points; see `buckets.scale`."""
    scaled: Scaled = scale(weights, bucket, scaling)
    indices = indices_of(nearest_points(scaled.values, points).flatten()[: scaled.count])
    negative = None if scaled.negative is None else scaled.negative.flatten()[: scaled.count]
    kept = points.detach().to(scaled.alpha.dtype).clone()
    return QuantizedTensor(
        indices, scaled.alpha, scaled.beta, negative, kept, len(points), bucket, tuple(weights.shape), weights.dtype
    )


class LearnedPoints(nn.Module):
    """Points of several tensors, one parameter a tensor.

    Args:
        levels: how many points each tensor has at first.
        tensors: how many tensors there are.
        most: how many points a tensor may be given later; `levels` if absent. What is not in use has no meaning.

    Attributes:
        points: one parameter (most,) a tensor.
        counts: how many of them are in use, (tensors,).
    """

    counts: Tensor

    def __init__(self, levels: int, tensors: int, most: int | None = None) -> None:
        super().__init__()
        self.points = nn.ParameterList(torch.zeros(most or levels) for _ in range(tensors))
        self.register_buffer("counts", torch.full((tensors,), levels))
        self._fixed = None if most else levels

    def forward(self) -> list[Float[Tensor, "_"]]:
        """The points in use of each tensor, each ascending after `order` and at the start."""
        return [points[:count] for points, count in zip(self.points, self.sizes(), strict=True)]

    def sizes(self) -> list[int]:
        """How many points of each tensor are in use; waits for the device where that can change."""
        return [self._fixed] * len(self.points) if self._fixed else self.counts.tolist()

    @torch.no_grad()
    def begin(self, points: Sequence[Float[Tensor, "_"]]) -> None:
        """Sets the points of every tensor, and with them how many there are."""
        for parameter, values in zip(self.points, points, strict=True):
            parameter[: len(values)] = values
        self.counts.copy_(torch.tensor([len(values) for values in points]))

    @torch.no_grad()
    def order(self) -> None:
        """Sorts the points of each tensor, which an optimizer step may have moved past each other."""
        for points in self():
            points.copy_(points.sort().values)

"""Consistency training: distances, the loss between two times of one path, noise-level curricula and segments."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.diffusion.parameterisations import lcm_scalings
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import along


def pseudo_huber(
    a: Float[Tensor, "items *shape"],
    b: Float[Tensor, "items *shape"],
    c: float | None = None,
    reduction: Literal["vector", "elementwise"] = "vector",
) -> Float[Tensor, " items"]:
    """A distance that is quadratic close by and linear far away, one number an item. Two different things:

    "vector" is sqrt(|a - b|^2 + c^2) - c of the whole item, c = 0.00054 sqrt(numbers an item) if absent (Song and
    Dhariwal, 2024); "elementwise" is the mean over numbers of sqrt(d^2 + c^2) - c, c = 0.001 if absent (Luo et al.,
    *Latent Consistency Models*, 2023).
    """
    difference = _difference(a, b)
    if reduction == "elementwise":
        c = 0.001 if c is None else c
        return _above(difference.square(), c).mean(1)
    c = 0.00054 * math.sqrt(difference.shape[1]) if c is None else c
    return _above(difference.square().sum(1), c)


def _above(square: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c without its cancellation at small d, for c > 0."""
    return square / ((square + c**2).sqrt() + c)


def squared_distance(a: Float[Tensor, "items *shape"], b: Float[Tensor, "items *shape"]) -> Float[Tensor, " items"]:
    """Mean squared difference of each item."""
    return _difference(a, b).square().mean(1)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b (items, numbers), float32 at least."""
    precision = torch.promote_types(a.dtype, torch.float32)
    return (a.to(precision) - b.to(precision)).flatten(1)


def lcm_function(prediction: Prediction, sigma_data: float = 0.5, scale: float = 10.0) -> Float[Tensor, "items *shape"]:
    """The consistency function of latent consistency models: c_skip x_t + c_out x0, the identity at discrete time 0."""
    c_skip, c_out = lcm_scalings(prediction.t, sigma_data, scale)
    return along(c_skip, prediction.x_t) * prediction.x_t + along(c_out, prediction.x_t) * prediction.x0


def doubling_scales(step: int, steps: int, first: int = 10, last: int = 1280) -> int:
    """Points of the noise grid at a training step, doubling in equally long stages: `first` + 1 to `last` + 1.

    Source: Song and Dhariwal, *Improved Techniques for Training Consistency Models*, 2024, arXiv 2310.14189.
    """
    length = math.floor(steps / (math.log2(last // first) + 1))
    return min(first * 2 ** (step // max(length, 1)), last) + 1


def root_scales(step: int, steps: int, first: int = 2, last: int = 150) -> int:
    """Points of the noise grid growing with the square root of training (Song et al., *Consistency Models*, 2023)."""
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def lognormal_interval_weights(
    sigmas: Float[Tensor, " points"], mean: float = -1.1, std: float = 2.0
) -> Float[Tensor, " intervals"]:
    """Probability of each interval of a rising noise grid under a lognormal of sigma, normalised."""
    edges = torch.erf((sigmas.log() - mean) / (math.sqrt(2) * std))
    mass = edges.diff()
    return mass / mass.sum()


class SegmentSchedule:
    """How many segments the time axis is cut into over training, for segment-wise consistency.

    Args:
        phases: (segments, steps) in order; the last phase goes on.

    Segments of a grid of n times begin at floor(k n / segments).
    """

    def __init__(self, phases: Sequence[tuple[int, int]]) -> None:
        if not phases or any(segments < 1 or length < 1 for segments, length in phases):
            raise ValueError("a segment schedule needs phases of at least one segment and one step")
        self.phases = tuple(phases)

    def segments(self, step: int) -> int:
        """The number of segments at a training step."""
        for segments, length in self.phases:
            if step < length:
                return segments
            step -= length
        return self.phases[-1][0]


def segment_starts(grid: int, segments: int) -> Int[Tensor, " segments"]:
    """First index of each segment of a rising grid of `grid` times."""
    return (torch.arange(segments) * grid / segments).floor().long()


def segment_end(index: Int[Tensor, " items"], grid: int, segments: int) -> Int[Tensor, " items"]:
    """Grid index to which each index's segment is mapped: one below the segment's first.

    -1 stands for what lies below the grid, in the papers time 0 of a discrete schedule (see `grids.lcm_grid`).
    """
    starts = segment_starts(grid, segments).to(index.device)
    return starts[torch.searchsorted(starts, index, right=True) - 1] - 1

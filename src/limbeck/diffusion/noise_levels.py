"""Which times a training step draws."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.schedules import EDM, Schedule

TimeLaw = Literal["uniform", "lognormal", "logit-normal"]


def draw_times(
    law: TimeLaw, draws: Float[Tensor, " items"], schedule: Schedule, mean: float = -1.2, std: float = 1.2
) -> Float[Tensor, " items"]:
    """Times of a training batch (items,), float64, within the schedule's range.

    "uniform" in t (whole numbers on a discrete schedule); "lognormal" in sigma / alpha, with `mean` and `std` of its
    logarithm (EDM, 2022); "logit-normal" in the place between the two ends (SD3, 2024).

    Args:
        law: which.
        draws: uniform numbers in [0, 1), one an item.
        schedule: whose times.
        mean: of the two normal laws.
        std: of the two normal laws, above 0.
    """
    low, high = schedule.t_min, schedule.t_max
    share = draws.double()
    if law != "uniform":
        # Away from 0 and 1 by half a step of float32's 24 bits: the normal quantiles there are infinite.
        normal = mean + std * math.sqrt(2) * torch.erfinv(2 * (share + 2**-25).clamp(max=1 - 2**-25) - 1)
        if law == "lognormal":
            return schedule.time_of(-normal).clamp(low, high)
        share = torch.sigmoid(normal)
    if schedule.clean < 0:
        return (low + share * (high - low + 1)).floor().clamp(max=high)
    return low + share * (high - low)


def draw_between(
    draws: Float[Tensor, " items"],
    schedule: Schedule,
    low: float = 0.0,
    high: float = 1.0,
    *,
    points: int | None = 1000,
    rho: float = 7.0,
) -> Float[Tensor, " items"]:
    """Times (items,), float64, evenly likely between two shares of the way from the data to the noise.

    On a discrete schedule of T times these are whole numbers from low T to high T, both included. On EDM's schedule the
    way is the grid of Karras et al. (2022) with so many points, whose numbers are drawn in the same manner, or all
    that lies between them where `points` is None. On others it is the time itself.

    Args:
        draws: uniform numbers in [0, 1), one an item.
        schedule: whose times.
        low: share of the way, in [0, 1].
        high: share of the way, at least `low`.
        points: of EDM's grid.
        rho: bend of EDM's grid; at 1000 it is as good as geometric.

    Source of the default: Yin et al., *Improved Distribution Matching Distillation*, 2024, arXiv 2405.14867.
    """
    share = draws.double()
    start, end = schedule.t_min, schedule.t_max
    if schedule.clean < 0:
        return _whole(share, int(end) + 1, low, high)
    if not isinstance(schedule, EDM):
        return start + (low + share * (high - low)) * (end - start)
    way = low + share * (high - low) if points is None else _whole(share, points, low, high) / (points - 1)
    return (start ** (1 / rho) + way * (end ** (1 / rho) - start ** (1 / rho))) ** rho


def _whole(share: Tensor, count: int, low: float, high: float) -> Tensor:
    """Whole numbers from low count to high count, but below count."""
    first, last = int(low * count), min(int(high * count), count - 1)
    return first + (share * (last - first + 1)).floor()


def truncated_snr(t: Tensor, schedule: Schedule) -> Tensor:
    """max(alpha^2 / sigma^2, 1): the weight on x0 errors of progressive distillation (Salimans and Ho, 2022)."""
    return (2 * schedule.log_snr(t.double())).exp().clamp(min=1.0, max=math.exp(40))

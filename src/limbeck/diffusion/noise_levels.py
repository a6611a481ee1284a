"""Which times a training step draws."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.schedules import Schedule

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


def truncated_snr(t: Tensor, schedule: Schedule) -> Tensor:
    """max(alpha^2 / sigma^2, 1): the weight on x0 errors of progressive distillation (Salimans and Ho, 2022)."""
    return (2 * schedule.log_snr(t.double())).exp().clamp(min=1.0, max=math.exp(40))

"""Which times a training step draws."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.schedules import Schedule

TimeLaw = Literal["uniform", "lognormal", "logit-normal", "low-discrepancy"]


def draw_times(
    law: TimeLaw,
    items: int,
    schedule: Schedule,
    mean: float = -1.2,
    std: float = 1.2,
    device: torch.device | str = "cpu",
) -> Float[Tensor, " items"]:
    """Times of a training batch (items,), float64, within the schedule's range.

    "uniform" in t (whole numbers on a discrete schedule); "low-discrepancy" the same with one common random shift of an
    even grid; "lognormal" in sigma / alpha with `mean` and `std` of its logarithm (EDM, 2022); "logit-normal" in t
    (SD3, 2024).
    """
    low, high = schedule.t_min, schedule.t_max
    if law == "lognormal":
        log_ratio = mean + std * torch.randn(items, device=device, dtype=torch.float64)
        return schedule.time_of(-log_ratio).clamp(low, high)
    if law == "logit-normal":
        share = torch.sigmoid(mean + std * torch.randn(items, device=device, dtype=torch.float64))
    elif law == "low-discrepancy":
        even = torch.arange(items, device=device, dtype=torch.float64) / items
        share = (even + torch.rand((), device=device, dtype=torch.float64)) % 1
    else:
        share = torch.rand(items, device=device, dtype=torch.float64)
    if schedule.clean < 0:
        return (low + share * (high - low + 1)).floor().clamp(max=high)
    return low + share * (high - low)


def truncated_snr(t: Tensor, schedule: Schedule) -> Tensor:
    """max(alpha^2 / sigma^2, 1): the weight on x0 errors of progressive distillation (Salimans and Ho, 2022)."""
    return (2 * schedule.log_snr(t.double())).exp().clamp(min=1.0, max=math.exp(40))

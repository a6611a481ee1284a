"""What several test files use: every schedule with times spread over its range, and small deterministic networks."""

import torch
from torch import nn

from limbeck.diffusion.denoiser import NetworkDenoiser, Process
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, Schedule, TrigFlow, VPContinuous, VPDiscrete

SCHEDULES: dict[str, Schedule] = {
    "scaled-linear": VPDiscrete.named("scaled-linear"),
    "linear": VPDiscrete.named("linear"),
    "squared-cosine": VPDiscrete.named("squared-cosine"),
    "vp-continuous": VPContinuous(),
    "cosine": Cosine(),
    "edm": EDM(),
    "flow-matching": FlowMatching(),
    "trig-flow": TrigFlow(),
}

PRESERVING = ["scaled-linear", "linear", "squared-cosine", "vp-continuous", "cosine", "trig-flow"]
"""Schedules with alpha^2 + sigma^2 = 1."""


def times_of(schedule: Schedule, count: int = 7, margin: float = 0.02) -> torch.Tensor:
    """Rising times (count,), float64, within the schedule but not at its ends."""
    low, high = schedule.t_min, schedule.t_max
    if isinstance(schedule, EDM):
        return torch.logspace(-2.5, 1.8, count, dtype=torch.float64)
    return low + (high - low) * torch.linspace(margin, 1 - margin, count, dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Wave(nn.Module):
    """A smooth function of items and time, so that a sampler that asks at a wrong place or time is found out."""

    def __init__(self, scale: float = 1.0, period: float = 1000.0) -> None:
        super().__init__()
        self.scale, self.period = scale, period
        self.asked: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, time: torch.Tensor, condition: object = None) -> torch.Tensor:
        self.asked.append(time.detach().clone())
        time = (time / self.period).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return self.scale * torch.sin(1.3 * x + 2 * time) + 0.2 * x * torch.cos(time)


def wave_denoiser(schedule: Schedule, kind: str = "eps", **arguments: float) -> NetworkDenoiser:
    return NetworkDenoiser(Wave(**arguments), Process(schedule, Direct(kind)))  # type: ignore[arg-type]

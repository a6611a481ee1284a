"""Grids of times for samplers and consistency training. Each says whether it falls (for sampling) or rises."""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.schedules import Schedule


def uniform_times(schedule: Schedule, steps: int) -> Float[Tensor, " times"]:
    """Falling times, evenly spaced from `t_max` to the clean end: steps + 1 of them, float64.

    Networks are asked at all but the last. On a discrete schedule the times are whole numbers, as networks know them,
    with the pure noise included ("trailing" spacing).
    """
    if schedule.clean < 0:
        spaced = torch.linspace(schedule.t_max + 1, 0, steps + 1, dtype=torch.float64)
        return spaced.round() - 1
    return torch.linspace(schedule.t_max, schedule.clean, steps + 1, dtype=torch.float64)


def karras_times(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, *, rising: bool = False
) -> Float[Tensor, " times"]:
    """The grid of Karras et al. (2022) in sigma: `steps` values between the two ends, both included, float64.

    Falling unless `rising`; it does not end at 0: append it where a sampler should.
    """
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64) ** (1 / rho)
    falling = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps, dtype=torch.float64)) ** rho
    return falling.flip(0) if rising else falling


def lcm_times(schedule: Schedule, steps: int, origin: int = 50) -> Float[Tensor, " times"]:
    """Falling times of latent-consistency samplers on a discrete schedule, with the clean end: steps + 1 of them.

    A grid of `origin` times (19, 39, ..., 999 of a thousand) is reversed and taken at evenly spaced places.

    Source: Luo et al., *Latent Consistency Models*, 2023, arXiv 2310.04378.
    """
    stride = (int(schedule.t_max) + 1) // origin
    grid = torch.arange(1, origin + 1, dtype=torch.float64) * stride - 1
    places = (torch.arange(steps, dtype=torch.float64) * origin / steps).floor().long()
    return torch.cat([grid.flip(0)[places], torch.tensor([schedule.clean], dtype=torch.float64)])


def shifted(t: Float[Tensor, "*times"], shift: float) -> Float[Tensor, "*times"]:
    """Times of a flow in [0, 1], moved towards the noise by `shift` above 1: s t / (1 + (s - 1) t) (SD3, 2024)."""
    return shift * t / (1 + (shift - 1) * t)


def leading_times(schedule: Schedule, steps: int, offset: int = 0) -> Float[Tensor, " times"]:
    """Falling times of older samplers on a discrete schedule, with the clean end: steps + 1 of them.

    They start below the pure noise, at `offset` plus multiples of the stride ("leading" spacing).
    """
    stride = (int(schedule.t_max) + 1) // steps
    times = torch.arange(steps, dtype=torch.float64).flip(0) * stride + offset
    return torch.cat([times, torch.tensor([schedule.clean], dtype=torch.float64)])

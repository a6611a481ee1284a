"""Grids of times for samplers and consistency training. Each says whether it falls (for sampling) or rises."""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.schedules import EDM, Schedule


def uniform_times(schedule: Schedule, steps: int) -> Float[Tensor, " times"]:
    """Falling times, evenly spaced from `t_max` to the clean end: steps + 1 of them, float64.

    Networks are asked at all but the last. On a discrete schedule the times are whole numbers, as networks know them,
    with the pure noise included ("trailing" spacing).

    Raises:
        ValueError: fewer steps than one, or more than a discrete schedule has times.
    """
    if steps < 1:
        raise ValueError(f"a sampler makes one step or more, not {steps}")
    if schedule.clean < 0 and steps > schedule.t_max + 1:
        raise ValueError(f"the schedule has too few times for {steps} steps: {int(schedule.t_max) + 1}")
    if schedule.clean < 0:
        spaced = torch.linspace(schedule.t_max + 1, 0, steps + 1, dtype=torch.float64)
        return spaced.round() - 1
    return torch.linspace(schedule.t_max, schedule.clean, steps + 1, dtype=torch.float64)


def usual_times(schedule: Schedule, steps: int) -> Float[Tensor, " times"]:
    """Falling times of a sampler that was not told any, with the clean end: steps + 1 of them, float64.

    Evenly spaced, but on EDM's schedule, where those of Karras et al. are taken.
    """
    if not isinstance(schedule, EDM):
        return uniform_times(schedule, steps)
    if steps < 1:
        raise ValueError(f"a sampler makes one step or more, not {steps}")
    return torch.cat([karras_times(steps, schedule.t_min, schedule.t_max), torch.zeros(1, dtype=torch.float64)])


def scm_times(steps: int, highest: float = 1.57080, between: float = 1.3) -> Float[Tensor, " times"]:
    """Falling times of TrigFlow consistency samplers, with the clean end: steps + 1 of them (SANA-Sprint, 2025).

    Two steps go by way of `between`; any other number is evenly spaced.
    """
    if steps == 2:
        return torch.tensor([highest, between, 0.0], dtype=torch.float64)
    return torch.linspace(highest, 0, steps + 1, dtype=torch.float64)


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

    The grid of `origin` times is reversed and taken at evenly spaced places, rounded down.

    Source: Luo et al., *Latent Consistency Models*, 2023, arXiv 2310.04378.
    """
    falling = lcm_grid(schedule, origin).flip(0)
    places = torch.arange(steps) * origin // steps
    return torch.cat([falling[places], torch.tensor([schedule.clean], dtype=torch.float64)])


def lcm_grid(schedule: Schedule, origin: int = 50) -> Float[Tensor, " times"]:
    """Rising grid of times on which latent-consistency students of a discrete schedule are trained: 19, 39, ..., 999.

    What lies one place below its first is time 0 in the papers: not quite clean.
    """
    stride = (int(schedule.t_max) + 1) // origin
    return torch.arange(1, origin + 1, dtype=torch.float64) * stride - 1


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

"""Few-step students on their own inputs: the times that they are asked at, and how they get there."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion import steps
from limbeck.diffusion.grids import karras_times
from limbeck.diffusion.schedules import EDM, Schedule
from limbeck.diffusion.solvers import Model

Items = Float[Tensor, "items *shape"]


def student_times(schedule: Schedule, count: int, first: float | None = None) -> Float[Tensor, " times"]:
    """Falling times of a student of `count` steps, with the clean end: count + 1 of them, float64.

    On a discrete schedule first, first - stride, ... with the stride (first + 1) // count: 999, 749, 499, 249 for four.
    On EDM's schedule the places 0, 1 / count, ... of the grid of Karras et al.; evenly spaced on others.

    Args:
        schedule: whose times.
        count: steps, at least 1.
        first: time of the first input; the schedule's last time if absent.
    """
    first = schedule.t_max if first is None else first
    clean = torch.tensor([schedule.clean], dtype=torch.float64)
    if schedule.clean < 0:
        stride = (int(first) + 1) // count
        return torch.cat([first - stride * torch.arange(count, dtype=torch.float64), clean])
    if isinstance(schedule, EDM):
        later = karras_times(count + 1, schedule.t_min, first)[1:count]
        return torch.cat([torch.tensor([first], dtype=torch.float64), later, clean])
    return torch.linspace(first, schedule.clean, count + 1, dtype=torch.float64)


@torch.no_grad()
def backward_simulation(
    model: Model,
    noise: Items,
    times: Float[Tensor, " times"],
    stop: int,
    fresh: Callable[[int], Items],
    schedule: Schedule,
) -> Items:
    """What a student makes of pure noise before its step number `stop`: its last x0, or the noise itself at 0.

    A student that is trained on this, noised to times[stop], sees in training what it will see in sampling.

    Args:
        model: the student under its condition.
        noise: the first input, on the scale of the schedule.
        times: falling, as of `student_times`.
        stop: how many steps are made, less than there are.
        fresh: standard normal noise (items, ...) that x0 is noised with after step j.
        schedule: the student's.

    Source: Yin et al., *Improved Distribution Matching Distillation*, 2024, arXiv 2405.14867.
    """
    x = x_t = noise
    for number in range(stop):
        if number:
            x_t = steps.renoise(x, times[number], schedule, fresh(number - 1))
        x = model(x_t, times[number].expand(len(x_t))).x0
    return x

"""Progressive distillation: grids that nest, the jumps of a student, and the target that two of its teacher's make.

A student of N steps learns to land in one jump where its teacher of 2N steps lands in two (Salimans and Ho, 2022).
"""

from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.grids import karras_times, uniform_times
from limbeck.diffusion.noise_levels import truncated_snr
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import EDM, Schedule, along
from limbeck.diffusion.solvers import Model
from limbeck.diffusion.steps import ddim_step, ddim_target

Items = Float[Tensor, "items *shape"]
PerItem = Float[Tensor, " items"]
Jumps = Literal["deterministic", "stochastic", "encode"]
Weighting = Literal["truncated-snr", "snr+1"]


def nested_times(schedule: Schedule, steps: int) -> Float[Tensor, " times"]:
    """Falling times, steps + 1 of them in float64, of which every second is the grid of half as many steps.

    Evenly spaced down to the clean end; on EDM's schedule those of Karras et al., which stop at its smallest noise.
    """
    if isinstance(schedule, EDM):
        return karras_times(steps + 1, schedule.t_min, schedule.t_max)
    return uniform_times(schedule, steps)


def encoding_times(schedule: Schedule, steps: int) -> Float[Tensor, " times"]:
    """Rising times of an encoder, steps + 1 of them in float64: the nested grid, but from just above the clean end.

    At no noise at all the noise that an item ends in cannot be told. Encoding starts at a log-SNR of 20, or at the
    smallest time that networks are asked at where that is later.
    """
    almost_clean = schedule.time_of(torch.tensor(10.0, dtype=torch.float64))
    start = almost_clean.clamp(min=schedule.t_min)
    return torch.cat([start[None], nested_times(schedule, steps).flip(0)[1:]])


def jumps(schedule: Schedule, steps: int, kind: Jumps = "deterministic") -> Float[Tensor, "steps 3"]:
    """Every jump of a student of `steps` steps: from where, where its teacher stops on the way, and to where.

    "deterministic" jumps go to the next time of the student's grid, and its teacher stops halfway. "stochastic" ones
    pass over it to the time after it, with the teacher's stop at the next time; the last goes to the end as before.
    "encode" jumps go up the grid of `encoding_times`.

    Raises:
        ValueError: the schedule has too few times for that many steps.
    """
    coarse, halfway = nested_times(schedule, steps), nested_times(schedule, 2 * steps)[1::2]
    if kind == "encode":
        rising = encoding_times(schedule, steps)
        table = torch.stack([rising[:-1], halfway.flip(0), rising[1:]], 1)
    else:
        table = torch.stack([coarse[:-1], halfway, coarse[1:]], 1)
    if kind == "stochastic":
        table[:-1] = torch.stack([coarse[:-2], coarse[1:-1], coarse[2:]], 1)
    moves = table.diff(dim=1) * (1 if kind == "encode" else -1)
    if (moves <= 0).any():
        raise ValueError(
            f"the schedule has too few times for a student of {steps} steps and a teacher of twice as many"
        )
    return table


def two_step_target(model: Model, x_t: Items, t: PerItem, between: PerItem, s: PerItem) -> Items:
    """The x0 whose one DDIM step from (x_t, t) to s lands where two of the model's land, by way of `between`.

    Computed in float64: steps of a thousandth leave few digits to float32. On EDM's schedule the steps are Euler's.
    """
    exact = x_t.double()
    first = model(exact, t)
    landing = ddim_step(model(ddim_step(first, between), between), s)
    return ddim_target(exact, t, landing, s, first.schedule).to(x_t.dtype)


def weighted_error(prediction: Prediction, target: Items, weighting: Weighting = "truncated-snr") -> PerItem:
    """Mean square of an item's error in x0, times max(SNR, 1) or SNR + 1; the latter is the error in v."""
    weight = truncated_snr(prediction.t, prediction.schedule)
    if weighting == "snr+1":
        weight = (2 * prediction.schedule.log_snr(prediction.t.double())).exp().clamp(max=weight.max()) + 1
    return (along(weight, target) * (prediction.x0 - target).square()).flatten(1).mean(1)


def halvings(start: int, end: int) -> list[int]:
    """Steps of each student in turn, both ends included.

    Raises:
        ValueError: halving `start` never meets `end`.
    """
    steps = [start]
    while steps[-1] > end and steps[-1] % 2 == 0:
        steps.append(steps[-1] // 2)
    if steps[-1] != end:
        raise ValueError(f"halving {start} steps does not lead to {end}")
    return steps


def phase_starts(lengths: list[float], total: int) -> list[int]:
    """The training step at which each phase starts, for phases of relative lengths in `total` steps.

    Raises:
        ValueError: a phase would have no step.
    """
    ends = [round(total * done / sum(lengths)) for done in accumulate(lengths)]
    starts = [0, *ends[:-1]]
    if any(end <= start for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"{total} training steps are too few for {len(lengths)} phases")
    return starts

"""Solvers: from noise to data along falling times. Each yields the state after every step, so that a path can be kept.

A model is anything that predicts at (x_t, t), guided or not. Times are (steps + 1,), float64, and end at the clean time
(or wherever the sampler is to stop). Randomness comes from torch's stream.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion import steps
from limbeck.diffusion.predictions import Prediction

Model = Callable[[Tensor, Tensor], Prediction]
Items = Float[Tensor, "items *shape"]
Times = Float[Tensor, " times"]
Solver = Literal[
    "ddim", "euler", "heun", "dpmpp_2m", "ancestral", "sde", "consistency", "tcd", "stochastic_progressive"
]


def ddim(model: Model, x: Items, times: Times, eta: float = 0.0) -> Iterator[Items]:
    """Denoising diffusion implicit models; `eta` 1 is ancestral sampling (Song et al., 2021)."""
    for t, s in pairwise(times):
        prediction = model(x, t.expand(len(x)))
        x = steps.ddim_step(prediction, s) if eta == 0 else steps.stochastic_ddim_step(prediction, s, eta)
        yield x


def ancestral(model: Model, x: Items, times: Times) -> Iterator[Items]:
    """DDPM's own sampler (Ho et al., 2020)."""
    return ddim(model, x, times, eta=1.0)


def sde(model: Model, x: Items, times: Times, eta: float = 1.0) -> Iterator[Items]:
    """The extended reverse SDE with noise strength `eta`; the last step to clean data has no noise."""
    for t, s in pairwise(times):
        prediction = model(x, t.expand(len(x)))
        is_last = is_clean(prediction, s)
        x = prediction.x0 if is_last else steps.sde_step(prediction, s, eta)
        yield x


def euler(model: Model, x: Items, times: Times) -> Iterator[Items]:
    """Euler's method on the probability-flow ODE; order 1."""
    for t, s in pairwise(times):
        x = steps.euler_step(model(x, t.expand(len(x))), s)
        yield x


def heun(model: Model, x: Items, times: Times) -> Iterator[Items]:
    """Heun's method on the probability-flow ODE; order 2, two predictions a step but for one into clean data."""
    for t, s in pairwise(times):
        prediction = model(x, t.expand(len(x)))
        ahead = steps.euler_step(prediction, s)
        if not is_clean(prediction, s):
            ahead = steps.heun_step(prediction, model(ahead, s.expand(len(x))), s)
        x = ahead
        yield x


def dpmpp_2m(model: Model, x: Items, times: Times) -> Iterator[Items]:
    """DPM-Solver++ of second order with one prediction a step; the step into clean data is of first order."""
    before = None
    for t, s in pairwise(times):
        prediction = model(x, t.expand(len(x)))
        x = prediction.x0 if is_clean(prediction, s) else steps.dpmpp_2m_step(prediction, before, s)
        before = prediction
        yield x


def consistency(model: Model, x: Items, times: Times, lands_at: float | None = None) -> Iterator[Items]:
    """Multistep consistency sampling: to clean data, and back up to the next time with fresh noise (Song et al., 2023).

    The model's x0 is the consistency function; the last step keeps it as it is.

    Args:
        model: the consistency function.
        x: noise.
        times: falling.
        lands_at: the time at which the function ends, where that is not the clean end: the smallest noise of EDM's
            schedule in the samplers of Song et al., which add so much less. It is below all times but a clean last.
    """
    for t, s in pairwise(times):
        prediction = model(x, t.expand(len(x)))
        x0, schedule = prediction.x0, prediction.schedule
        if is_clean(prediction, s):
            x = x0
        elif lands_at is None:
            x = steps.renoise(x0, s, schedule)
        else:
            x = steps.noise_up(x0, torch.full_like(s, lands_at), s, schedule)
        yield x


def tcd(model: Model, x: Items, times: Times, gamma: float = 0.3) -> Iterator[Items]:
    """Strategic stochastic sampling of trajectory consistency models: noise in all steps but the last (TCD, 2024).

    The authors' times end at 0, not at the clean end: `gamma` 0 is `ddim`, 1 is nearly `consistency`.
    """
    for number, (t, s) in enumerate(pairwise(times), 2):
        prediction = model(x, t.expand(len(x)))
        is_last = number == len(times)
        x = steps.ddim_step(prediction, s) if is_last else steps.strategic_step(prediction, s, gamma)
        yield x


def stochastic_progressive(model: Model, x: Items, times: Times) -> Iterator[Items]:
    """The stochastic sampler of progressively distilled models: two steps down, and one back up with fresh noise.

    Each jump passes over the next time to the one after it, as the model has learned; the last goes to the end without
    noise (Meng et al., 2023).
    """
    for number, (t, s) in enumerate(pairwise(times), 2):
        prediction = model(x, t.expand(len(x)))
        if number < len(times):
            beyond = times[number]
            x = steps.noise_up(steps.ddim_step(prediction, beyond), beyond, s, prediction.schedule)
        else:
            x = steps.ddim_step(prediction, s)
        yield x


def is_clean(prediction: Prediction, s: Tensor) -> bool:
    """Whether the time s of a whole batch is the clean end of the prediction's schedule."""
    return bool(s == prediction.schedule.clean)


SOLVERS: dict[Solver, Callable[[Model, Tensor, Tensor], Iterator[Tensor]]] = {
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "ancestral": ancestral,
    "sde": sde,
    "consistency": consistency,
    "tcd": tcd,
    "stochastic_progressive": stochastic_progressive,
}
"""Solvers by name."""


def solve(model: Model, x: Items, times: Times, solver: Solver = "ddim") -> Items:
    """Where a solver ends: x at the last of the times."""
    for state in SOLVERS[solver](model, x, times.to(x.device)):
        x = state
    return x


def path(model: Model, x: Items, times: Times, solver: Solver = "ddim") -> Float[Tensor, "times items *shape"]:
    """All states of a solver, the first included: one a time."""
    return torch.stack([x, *SOLVERS[solver](model, x, times.to(x.device))])


def count_predictions(solver: Solver, count: int) -> int:
    """How many predictions a solver makes in `count` steps that end in clean data."""
    return 2 * count - 1 if solver == "heun" else count

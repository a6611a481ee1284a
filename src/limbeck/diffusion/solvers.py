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
Solver = Literal["ddim", "euler", "heun", "dpmpp_2m", "ancestral", "sde", "consistency"]


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


def consistency(model: Model, x: Items, times: Times) -> Iterator[Items]:
    """Multistep consistency sampling: to clean data, and back up to the next time with fresh noise (Song et al., 2023).

    The model's x0 is the consistency function; the last step keeps it as it is.
    """
    for t, s in pairwise(times):
        prediction = model(x, t.expand(len(x)))
        is_last = is_clean(prediction, s)
        x = prediction.x0 if is_last else steps.renoise(prediction.x0, s, prediction.schedule)
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

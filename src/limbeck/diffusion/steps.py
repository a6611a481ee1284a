"""Single steps of solvers, from a prediction at (x_t, t) to x_s: what distillation methods are made of.

`s` is one time for all items or one an item, below t where the step denoises and above it where it encodes. Random
steps draw from torch's stream, or as `drawing_from` says, unless they are given their noise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import Schedule, along

Time = Shaped[Tensor, ""] | Shaped[Tensor, " items"]
Items = Float[Tensor, "items *shape"]


def ddim_step(prediction: Prediction, s: Time) -> Items:
    """x_s = alpha_s x0 + sigma_s eps: exact where x0 is constant (Song et al., 2021).

    With s above t it encodes. In a straight flow and in EDM it is Euler's step.
    """
    schedule, x_t = prediction.schedule, prediction.x_t
    x0, eps = prediction.x0, prediction.eps
    return along(schedule.alpha(s.double()), x_t) * x0 + along(schedule.sigma(s.double()), x_t) * eps


def ddim_target(x_t: Items, t: Time, x_s: Items, s: Time, schedule: Schedule) -> Items:
    """The x0 whose single step from (x_t, t) lands on (x_s, s): the target of progressive distillation.

    (sigma_t x_s - sigma_s x_t) / (sigma_t alpha_s - sigma_s alpha_t); at s clean it is x_s / alpha_s, and t must not be
    clean. The difference in the denominator is taken in float64.
    """
    t, s = t.double(), s.double()
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
    divisor = sigma_t * schedule.alpha(s) - sigma_s * schedule.alpha(t)
    return along(sigma_t / divisor, x_t) * x_s - along(sigma_s / divisor, x_t) * x_t


def stochastic_ddim_step(prediction: Prediction, s: Time, eta: float, noise: Items | None = None) -> Items:
    """DDIM with share `eta` of the ancestral noise; 0 is DDIM, 1 is DDPM's ancestral step (Song et al., 2021)."""
    schedule, x_t = prediction.schedule, prediction.x_t
    t, s = prediction.t.double(), s.double()
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
    ratio = schedule.alpha(t) / schedule.alpha(s)
    # The variance of one forward step from s to t; 1 - ratio^2 on variance-preserving schedules.
    forward = sigma_t.square() - (ratio * sigma_s).square()
    spread = eta * sigma_s / sigma_t * forward.clamp(min=0).sqrt()
    kept = (sigma_s.square() - spread.square()).clamp(min=0).sqrt()
    mean = along(schedule.alpha(s), x_t) * prediction.x0 + along(kept, x_t) * prediction.eps
    return mean + along(spread, x_t) * _noise(x_t, noise)


def sde_step(prediction: Prediction, s: Time, eta: float, noise: Items | None = None) -> Items:
    """One exact step of the extended reverse SDE for a constant x0; marginals do not depend on `eta` >= 0.

    0 is DDIM, 1 is the first-order SDE solver of DPM-Solver++. At the clean end it is x0, without noise.
    """
    schedule, x_t = prediction.schedule, prediction.x_t
    t, s = prediction.t.double(), s.double()
    h = schedule.log_snr(s) - schedule.log_snr(t)
    sigma_s = schedule.sigma(s)
    forgotten = eta**2 * h if eta else torch.zeros_like(h)  # h is infinite at the clean end
    shrink = sigma_s / schedule.sigma(t) * torch.exp(-forgotten)
    gain = -schedule.alpha(s) * torch.expm1(-h - forgotten)
    spread = sigma_s * (-torch.expm1(-2 * forgotten)).sqrt()
    mean = along(shrink, x_t) * x_t + along(gain, x_t) * prediction.x0
    return mean + along(spread, x_t) * _noise(x_t, noise)


def euler_step(prediction: Prediction, s: Time) -> Items:
    """x_s = x_t + (s - t) u along the probability-flow ODE."""
    x_t = prediction.x_t
    return x_t + along(s.double() - prediction.t.double(), x_t) * prediction.velocity


def heun_step(prediction: Prediction, ahead: Prediction, s: Time) -> Items:
    """The trapezoidal step, from the prediction at (x_t, t) and the one at Euler's (x_s, s)."""
    x_t = prediction.x_t
    mean = (prediction.velocity + ahead.velocity) / 2
    return x_t + along(s.double() - prediction.t.double(), x_t) * mean


def dpmpp_2m_step(prediction: Prediction, before: Prediction | None, s: Time) -> Items:
    """DPM-Solver++(2M): DDIM on an x0 extrapolated from the one before; without one, DDIM (Lu et al., 2022)."""
    schedule, x_t = prediction.schedule, prediction.x_t
    t, s = prediction.t.double(), s.double()
    h = schedule.log_snr(s) - schedule.log_snr(t)
    x0 = prediction.x0
    if before is not None:
        r = (schedule.log_snr(t) - schedule.log_snr(before.t.double())) / h
        x0 = x0 + along(1 / (2 * r), x_t) * (x0 - before.x0)
    shrink = schedule.sigma(s) / schedule.sigma(t)
    return along(shrink, x_t) * x_t - along(schedule.alpha(s) * torch.expm1(-h), x_t) * x0


def renoise(x0: Items, s: Time, schedule: Schedule, noise: Items | None = None) -> Items:
    """x_s = alpha_s x0 + sigma_s n: the multistep sampling of consistency models."""
    return along(schedule.alpha(s.double()), x0) * x0 + along(schedule.sigma(s.double()), x0) * _noise(x0, noise)


def noise_up(x_k: Items, k: Time, s: Time, schedule: Schedule, noise: Items | None = None) -> Items:
    """From time k up to the noisier s >= k, as the forward process would."""
    k, s = k.double(), s.double()
    ratio = schedule.alpha(s) / schedule.alpha(k)
    variance = schedule.sigma(s).square() - (ratio * schedule.sigma(k)).square()
    return along(ratio, x_k) * x_k + along(variance.clamp(min=0).sqrt(), x_k) * _noise(x_k, noise)


def strategic_step(prediction: Prediction, s: Time, gamma: float, noise: Items | None = None) -> Items:
    """DDIM below s and with fresh noise back up to it: strategic stochastic sampling (Zheng et al., TCD, 2024).

    `gamma` in [0, 1]: 0 is DDIM, 1 goes down to time 0 before the noise, where the table of a discrete schedule keeps
    a little. On discrete schedules the lower time (1 - gamma) s is rounded down.
    """
    schedule, s = prediction.schedule, s.double()
    below = (1 - gamma) * s
    below = below.floor() if schedule.clean < 0 else below
    lower = ddim_step(prediction, below)
    return noise_up(lower, below, s, schedule, noise) if gamma else lower


def _noise(x: Tensor, noise: Tensor | None) -> Tensor:
    return _draw.get()(x) if noise is None else noise


_draw: ContextVar[Callable[[Tensor], Tensor]] = ContextVar("draw", default=torch.randn_like)


@contextmanager
def drawing_from(draw: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context random steps take their noise from `draw`: standard normal, in the shape of what it is given.

    So samples can be a function of their number alone, whatever batch they are drawn in.
    """
    token = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(token)

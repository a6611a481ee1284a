"""What a network predicts, and how one prediction turns into another: always through x0 and eps."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from limbeck.diffusion.schedules import Schedule, along

Kind = Literal["x0", "eps", "v", "velocity", "score"]
"""Data, noise, v = alpha eps - sigma x0, u = dx_t/dt = alpha' x0 + sigma' eps, and the score -eps / sigma."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's output at noisy items, readable as any kind of prediction.

    Attributes:
        value: the prediction as it was made (items, ...).
        kind: what it is.
        x_t: the noisy items (items, ...).
        t: their times (items,).
        schedule: what alpha and sigma are at these times.
    """

    value: Tensor
    kind: Kind
    x_t: Tensor
    t: Tensor
    schedule: Schedule

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor]:
        return data_and_noise(self.value, self.kind, self.x_t, self.t, self.schedule)

    @property
    def x0(self) -> Tensor:
        """Predicted data."""
        return self._pair[0]

    @property
    def eps(self) -> Tensor:
        """Predicted noise."""
        return self._pair[1]

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return self.as_kind("v")

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt along the probability-flow ODE."""
        return self.as_kind("velocity")

    @property
    def score(self) -> Tensor:
        """Gradient of log p_t."""
        return self.as_kind("score")

    def as_kind(self, kind: Kind) -> Tensor:
        """The prediction as `kind`; the very value where it was made as that."""
        if kind == self.kind:
            return self.value
        return from_data_and_noise(*self._pair, kind, self.t, self.schedule)

    def with_value(self, value: Tensor) -> "Prediction":
        """Another prediction of the same kind at the same place."""
        return Prediction(value, self.kind, self.x_t, self.t, self.schedule)

    def detach(self) -> "Prediction":
        """The same without its graph."""
        return Prediction(self.value.detach(), self.kind, self.x_t.detach(), self.t, self.schedule)


def convert(
    prediction: Float[Tensor, "items *shape"],
    source: Kind,
    target: Kind,
    x_t: Float[Tensor, "items *shape"],
    t: Shaped[Tensor, " items"],
    schedule: Schedule,
) -> Float[Tensor, "items *shape"]:
    """A prediction of one kind as another, at noisy items x_t and their times.

    At sigma = 0 there is no eps in x0, and at alpha = 0 no x0 in eps: such quotients are infinite, as they should be.
    Half precision is raised to float32.
    """
    return Prediction(prediction, source, x_t, t, schedule).as_kind(target)


def data_and_noise(value: Tensor, kind: Kind, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(x0, eps) behind a prediction of any kind; each is read off without passing through the other's quotient."""
    value, x_t = _precise(value), _precise(x_t)
    t = t.double()
    alpha, sigma = along(schedule.alpha(t), x_t), along(schedule.sigma(t), x_t)
    if kind == "x0":
        return value, (x_t - alpha * value) / sigma
    if kind == "score":
        kind, value = "eps", -sigma * value
    if kind == "eps":
        return (x_t - sigma * value) / alpha, value
    if kind == "v":
        power = alpha.square() + sigma.square()  # 1 on variance-preserving schedules
        return (alpha * x_t - sigma * value) / power, (alpha * value + sigma * x_t) / power
    alpha_rate, sigma_rate = along(schedule.alpha_rate(t), x_t), along(schedule.sigma_rate(t), x_t)
    wronskian = alpha * sigma_rate - sigma * alpha_rate
    return (sigma_rate * x_t - sigma * value) / wronskian, (alpha * value - alpha_rate * x_t) / wronskian


def from_data_and_noise(x0: Tensor, eps: Tensor, kind: Kind, t: Tensor, schedule: Schedule) -> Tensor:
    """What a network that predicts `kind` should say where data are x0 and noise is eps."""
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    t = t.double()
    if kind == "score":
        return -eps / along(schedule.sigma(t), eps)
    if kind == "v":
        return along(schedule.alpha(t), eps) * eps - along(schedule.sigma(t), x0) * x0
    return along(schedule.alpha_rate(t), x0) * x0 + along(schedule.sigma_rate(t), eps) * eps


def transport(
    x: Float[Tensor, "items *shape"], t: Shaped[Tensor, " items"], source: Schedule, target: Schedule
) -> tuple[Float[Tensor, "items *shape"], Float[Tensor, " items"]]:
    """The same noisy items in another schedule: (x', t') of equal signal-to-noise ratio, exactly.

    A denoiser that was trained in one family is asked in another by transporting its input there; x0 and eps are the
    same on both sides. Times keep their precision; whole numbers become float64.
    """
    log_snr = source.log_snr(t.double())
    moved = target.time_of(log_snr)
    size_before = torch.hypot(source.alpha(t.double()), source.sigma(t.double()))
    size_after = torch.hypot(target.alpha(moved), target.sigma(moved))
    return x * along(size_after / size_before, x), moved.to(t.dtype if t.is_floating_point() else moved.dtype)


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

"""Noise schedules: how much signal and how much noise there is at each time.

A time is a real number that grows towards the noise. Every schedule gives alpha and sigma with their derivatives,
lambda = log(alpha / sigma) and its inverse. Coefficients come in the precision of the time they are asked for: solvers
ask in float64, since differences of neighbouring coefficients lose digits close to the data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional


class Schedule(ABC):
    """A family of noise levels over time.

    Attributes:
        t_min: the smallest time that networks are asked at.
        t_max: the time of (nearly) pure noise.
        clean: the time at which there is no noise at all.
        noise_scale: deviation of the noise that sampling starts from at `t_max`.
    """

    t_min: float
    t_max: float
    clean: float = 0.0
    noise_scale: float = 1.0

    @abstractmethod
    def alpha(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Factor of the data at each time."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Factor of the noise at each time."""

    @abstractmethod
    def alpha_rate(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Derivative of alpha in t."""

    @abstractmethod
    def sigma_rate(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """Derivative of sigma in t."""

    @abstractmethod
    def time_of(self, log_snr: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """The time at which lambda has the given value; the inverse of `log_snr`."""

    def log_snr(self, t: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
        """lambda = log(alpha / sigma), half the log-SNR; infinite where there is no noise."""
        return self.alpha(t).log() - self.sigma(t).log()

    def add_noise(
        self, x0: Float[Tensor, "items *shape"], eps: Float[Tensor, "items *shape"], t: Shaped[Tensor, " items"]
    ) -> Float[Tensor, "items *shape"]:
        """x_t = alpha_t x0 + sigma_t eps; float32 where the data are half precision."""
        t = t.double()
        return along(self.alpha(t), x0) * x0 + along(self.sigma(t), x0) * eps

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The schedule as plain data; `build_schedule` makes it again."""


def along(value: Float[Tensor, "*items"], x: Tensor) -> Tensor:
    """One number an item, shaped to multiply items of any shape; a scalar stays one.

    In the precision of `x`, but float32 at least: coefficients rounded to half precision would move every step.
    """
    value = value.to(torch.promote_types(x.dtype, torch.float32))
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value


class VPDiscrete(Schedule):
    """The variance-preserving schedule of DDPM: a table of cumulative alphas at the times 0, 1, ..., T-1.

    Between two entries lambda is linear in t. Time -1 is the clean image; between -1 and 0, where only a sampler's last
    step goes, the squared alpha is linear. Note that time 0 is not clean.

    Args:
        alphas_cumprod: squared alphas in (0, 1), falling.
    """

    clean = -1.0

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        if table.ndim != 1 or len(table) < 2 or table.min() < 0 or table.max() > 1 or (table.diff() >= 0).any():
            raise ValueError("alphas_cumprod must fall from entry to entry, within [0, 1]")
        self.alphas_cumprod = table
        self.t_min, self.t_max = 0.0, float(len(table) - 1)
        # Zero terminal SNR has lambda = -inf at the last entry; a floor keeps what lies between the last two finite.
        self._log_snr = 0.5 * (table.clamp(min=1e-12).log() - torch.log1p(-table).clamp(min=-60.0))
        self._first_noise = 1 - table[0]  # squared sigma at time 0
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def named(
        cls, name: Literal["scaled-linear", "linear", "squared-cosine"] = "scaled-linear", steps: int = 1000
    ) -> "VPDiscrete":
        """The tables in use: of Stable Diffusion, of DDPM, and of improved DDPM.

        Raises:
            ValueError: there is no table of that name.
        """
        if name == "squared-cosine":
            angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
            cosine = angle.cos().square()
            betas = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
        elif name == "linear":
            betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        elif name != "scaled-linear":
            raise ValueError(f"there is no table '{name}': take scaled-linear, linear or squared-cosine")
        else:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64).square()
        return cls((1 - betas).cumprod(0))

    def alpha(self, t: Tensor) -> Tensor:
        return self._signal(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        log_snr = self._interpolated(t)
        within = torch.sigmoid(-2 * log_snr)  # not 1 - alpha^2: that would lose the digits of small noise
        return torch.where(t < 0, self._noise_before(t), within).sqrt()

    def alpha_rate(self, t: Tensor) -> Tensor:
        alpha = self.alpha(t)
        return (
            torch.where(t < 0, -self._first_noise.to(alpha) / 2, (alpha * self.sigma(t)).square() * self._slope(t))
            / alpha
        )

    def sigma_rate(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return (
            torch.where(t < 0, self._first_noise.to(sigma) / 2, -(self.alpha(t) * sigma).square() * self._slope(t))
            / sigma
        )

    def log_snr(self, t: Tensor) -> Tensor:
        return torch.where(t < 0, self.alpha(t).log() - self.sigma(t).log(), self._interpolated(t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        falling = self._table(log_snr)
        right = torch.searchsorted(-falling, -log_snr.contiguous()).clamp(1, len(falling) - 1)
        left = right - 1
        share = (falling[left] - log_snr) / (falling[left] - falling[right])
        before = torch.sigmoid(-2 * log_snr) / self._first_noise.to(log_snr) - 1
        return torch.where(log_snr > falling[0], before, (left + share).clamp(0, len(falling) - 1))

    def config(self) -> dict[str, Any]:
        for name in ("scaled-linear", "linear", "squared-cosine"):
            if self.alphas_cumprod.equal(VPDiscrete.named(name, len(self.alphas_cumprod)).alphas_cumprod):
                return {"name": "vp-discrete", "table": name, "steps": len(self.alphas_cumprod)}
        return {"name": "vp-discrete", "alphas_cumprod": self.alphas_cumprod.tolist()}

    def _signal(self, t: Tensor) -> Tensor:
        return torch.where(t < 0, 1 - self._noise_before(t), torch.sigmoid(2 * self._interpolated(t)))

    def _noise_before(self, t: Tensor) -> Tensor:
        """Squared sigma between the clean image and time 0."""
        return self._first_noise.to(self._table(t)) * (t + 1).clamp(min=0)

    def _interpolated(self, t: Tensor) -> Tensor:
        table, left = self._table(t), self._cell(t)
        return torch.lerp(table[left], table[left + 1], (t - left).to(table))

    def _slope(self, t: Tensor) -> Tensor:
        table, left = self._table(t), self._cell(t)
        return table[left + 1] - table[left]

    def _table(self, t: Tensor) -> Tensor:
        """lambda at whole times, where t is and as precise as t; float64 for whole numbers. One copy for each."""
        place = t.device, t.dtype if t.is_floating_point() else torch.float64
        if place not in self._copies:
            self._copies[place] = self._log_snr.to(*place)
        return self._copies[place]

    def _cell(self, t: Tensor) -> Tensor:
        return t.clamp(min=0).floor().long().clamp(max=len(self._log_snr) - 2)


class VPContinuous(Schedule):
    """The variance-preserving SDE with a linear beta (Song et al., 2021), t in [1e-5, 1].

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.
    """

    t_min, t_max = 1e-5, 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"beta must rise from above 0, not from {beta_min} to {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t.square() * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self._beta(t) / 2

    def sigma_rate(self, t: Tensor) -> Tensor:
        return self.alpha(t).square() * self._beta(t) / (2 * self.sigma(t))

    def time_of(self, log_snr: Tensor) -> Tensor:
        # No later than t_max: noise without any signal has no time of its own.
        log_alpha = (-functional.softplus(-2 * log_snr) / 2).clamp(min=-(self.beta_min + self.beta_max) / 4)
        half = self.beta_min / 2
        return -2 * log_alpha / (half + (half**2 - (self.beta_max - self.beta_min) * log_alpha).sqrt())

    def config(self) -> dict[str, Any]:
        return {"name": "vp-continuous", "beta_min": self.beta_min, "beta_max": self.beta_max}


class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1] (Salimans and Ho, 2022)."""

    # log-SNR clipped at +-20, as in progressive distillation: t_max is not quite 1.
    t_min = 2 / math.pi * math.atan(math.exp(-10))
    t_max = 2 / math.pi * math.atan(math.exp(10))

    def alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * (-log_snr).exp().atan()

    def config(self) -> dict[str, Any]:
        return {"name": "cosine"}


class EDM(Schedule):
    """alpha = 1, sigma = t: the variance-exploding schedule in the form of Karras et al. (2022).

    Args:
        sigma_min: smallest noise that networks are asked at.
        sigma_max: largest.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"noise must rise from above 0, not from {sigma_min} to {sigma_max}")
        self.t_min, self.t_max, self.noise_scale = sigma_min, sigma_max, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return (-log_snr).exp()

    def config(self) -> dict[str, Any]:
        return {"name": "edm", "sigma_min": self.t_min, "sigma_max": self.t_max}


class FlowMatching(Schedule):
    """alpha = 1 - t, sigma = t, t in [0, 1]: the straight path, with t = 1 the noise.

    Papers on rectified flow count tau = 1 - t from noise to data; their velocity is minus ours.
    """

    t_min, t_max = 0.0, 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr)

    def config(self) -> dict[str, Any]:
        return {"name": "flow-matching"}


class TrigFlow(Schedule):
    """alpha = cos t, sigma = sin t, t in [0, pi/2] (Lu and Song, 2025)."""

    t_min, t_max = 0.0, math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return t.sin()

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -t.sin()

    def sigma_rate(self, t: Tensor) -> Tensor:
        return t.cos()

    def time_of(self, log_snr: Tensor) -> Tensor:
        return (-log_snr).exp().atan()

    def config(self) -> dict[str, Any]:
        return {"name": "trig-flow"}


def build_schedule(config: dict[str, Any]) -> Schedule:
    """A schedule from its `config`.

    Raises:
        ValueError: no schedule of that name, or wrong arguments.
    """
    arguments = {key: value for key, value in config.items() if key != "name"}
    name = config.get("name")
    try:
        if name == "vp-discrete":
            table = arguments.get("alphas_cumprod")
            return VPDiscrete(table) if table else VPDiscrete.named(arguments["table"], arguments["steps"])
        kinds: dict[Any, Any] = {"vp-continuous": VPContinuous, "cosine": Cosine, "edm": EDM}
        kinds |= {"flow-matching": FlowMatching, "trig-flow": TrigFlow}
        return kinds[name](**arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no noise schedule is described by {config}") from error

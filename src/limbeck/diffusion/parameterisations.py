"""How a network's input and time are made from (x_t, t), and what its output stands for."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.diffusion.predictions import KINDS, Kind
from limbeck.diffusion.schedules import Schedule, along


@dataclass(frozen=True)
class Direct:
    """The network sees x_t as it is and says one kind of prediction.

    Attributes:
        kind: what the network's output is.
        time_scale: the network is told `time_scale` t: 1000 for flows in diffusers, 1 for discrete times.
    """

    kind: Kind = "eps"
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no kind of prediction '{self.kind}'")
        if not 0 < self.time_scale < math.inf:
            raise ValueError(f"a network's times are scaled by a number above 0, not by {self.time_scale}")

    def inputs(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """What the network gets: items (items, ...) and times (items,)."""
        return x_t, self.time_scale * t

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Kind]:
        """The network's output as a prediction, and its kind."""
        return output, self.kind


@dataclass(frozen=True)
class Preconditioned:
    """The network is scaled at both ends by the noise level: D = c_skip x + c_out F(c_in x, c_noise); alpha is 1.

    With `boundary` it is a consistency function: c_skip = 1 and c_out = 0 at the smallest noise of the schedule.

    Source: Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022; the boundary form
    of Song et al., *Consistency Models*, 2023.

    Attributes:
        sigma_data: deviation of the data.
        boundary: whether the identity holds at the schedule's smallest noise.
        noise: what the network is told of sigma: log(sigma) / 4, or 250 log(sigma + 1e-44).
    """

    sigma_data: float = 0.5
    boundary: bool = False
    noise: Literal["quarter-log", "250-log"] = "quarter-log"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"the deviation of the data is above 0, not {self.sigma_data}")
        if self.noise not in ("quarter-log", "250-log"):
            raise ValueError(f"there is no noise input '{self.noise}'")

    def inputs(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """What the network gets: items (items, ...) and noise levels (items,)."""
        c_in = (t.square() + self.sigma_data**2).rsqrt()
        told = 0.25 * t.log() if self.noise == "quarter-log" else 250 * (t + 1e-44).log()
        return along(c_in, x_t) * x_t, told

    def scalings(self, sigma: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at noise levels (items,)."""
        above = sigma - schedule.t_min if self.boundary else sigma
        data = self.sigma_data
        c_skip = data**2 / (above.square() + data**2)
        return c_skip, data * above * (sigma.square() + data**2).rsqrt()

    def prediction(self, output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Kind]:
        """The denoised items."""
        c_skip, c_out = self.scalings(t, schedule)
        return along(c_skip, x_t) * x_t + along(c_out, x_t) * output, "x0"


Parameterisation = Direct | Preconditioned


def parameterisation_config(made: Parameterisation) -> dict[str, Any]:
    """A parameterisation as plain data."""
    return {"name": "direct" if isinstance(made, Direct) else "preconditioned", **asdict(made)}


def build_parameterisation(config: dict[str, Any]) -> Parameterisation:
    """A parameterisation from its plain data.

    Raises:
        ValueError: no such one, or wrong arguments.
    """
    arguments = {key: value for key, value in config.items() if key != "name"}
    try:
        return {"direct": Direct, "preconditioned": Preconditioned}[config["name"]](**arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no parameterisation is described by {config}") from error


def lcm_scalings(t: Tensor, sigma_data: float = 0.5, scale: float = 10.0) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of latent consistency models at discrete times: x_t and x0 are mixed by them.

    From t = 20 on they are close to (0, 1) (Luo et al., 2023).
    """
    told = scale * t.to(torch.float64)
    root = (told.square() + sigma_data**2).sqrt()
    return sigma_data**2 / root.square(), told / root

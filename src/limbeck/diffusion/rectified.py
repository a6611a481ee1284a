"""Rectified flow: straight paths between coupled noise and data.

Its papers count tau = 1 - t, from noise (0) to data (1), and mean dx/dtau by velocity. Functions here take tau and that
velocity v = -u where they say so; denoisers and models are those of the rest of this folder, with t and u.

Source: Liu et al., *Flow Straight and Fast*, 2022, arXiv 2209.03003; *InstaFlow*, 2023, arXiv 2309.06380.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.denoiser import NONE, Condition, Denoiser, Sampling, Transported
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import FlowMatching, along
from limbeck.diffusion.solvers import Model

Items = Float[Tensor, "items *shape"]
TauMode = Literal["uniform", "t0"] | int
"""Which tau are trained: all; only the start, for one step; or the starts of so many equal steps."""


def draw_taus(mode: TauMode, draws: Float[Tensor, " items"], eps: float = 1e-3) -> Float[Tensor, " items"]:
    """tau of a training batch (items,), float64, in [eps, 1].

    "uniform" is u (1 - eps) + eps; "t0" is eps for all; a number k is j (1 - eps) / k + eps, with j even over 0 .. k-1,
    so that 1 is "t0".

    Args:
        mode: which.
        draws: uniform numbers u in [0, 1), one an item.
        eps: the smallest tau, in [0, 1).
    """
    draws = draws.double()
    if mode == "uniform":
        return draws * (1 - eps) + eps
    count = 1 if mode == "t0" else mode
    return (draws * count).floor() * (1 - eps) / count + eps


def interpolate(noise: Items, data: Items, tau: Float[Tensor, " items"]) -> Items:
    """x = tau data + (1 - tau) noise, the straight path; float32 at least."""
    return along(tau, data) * data + along(1 - tau, data) * noise


def flow_errors(
    velocity: Items, noise: Items, data: Items, reduction: Literal["mean", "half-sum"] = "mean"
) -> Float[Tensor, " items"]:
    """Squared error of the velocity v against data - noise, one number an item.

    Args:
        velocity: in tau's direction (items, ...).
        noise: at the start of each path.
        data: at its end.
        reduction: the mean over the numbers of an item, or half their sum.
    """
    gap = (_precise(velocity) - (_precise(data) - _precise(noise))).flatten(1).square()
    return gap.mean(1) if reduction == "mean" else 0.5 * gap.sum(1)


@torch.no_grad()
def straightness(model: Model, noise: Items, data: Items, times: int = 20) -> Float[Tensor, ""]:
    """S = E integral |data - noise - v(x_tau, tau)|^2 dtau; 0 where every path is straight and walked evenly.

    By the midpoint rule over `times` intervals; x_tau lies on the line between the pair.

    Args:
        model: predicts at flow-matching times.
        noise: X0 (items, ...).
        data: X1 (items, ...), where the model's flow ends from that noise; of other couplings it is the reflow loss.
        times: intervals of the integral.
    """
    total = noise.new_zeros(())
    for place in range(times):
        tau = torch.full((len(noise),), (place + 0.5) / times, dtype=torch.float64, device=noise.device)
        prediction = model(interpolate(noise, data, tau), 1 - tau)
        total = total + 2 * flow_errors(-prediction.velocity, noise, data, "half-sum").mean()
    return total / times


@torch.no_grad()
def transport_cost(noise: Items, data: Items) -> Float[Tensor, ""]:
    """E |X1 - X0|^2, which rectifying a coupling never raises, nor any other convex cost."""
    return (_precise(data) - _precise(noise)).flatten(1).square().sum(1).mean()


def rectified_euler(model: Model, noise: Items, steps: int, eps: float = 1e-3, compat: bool = False) -> Items:
    """Euler's method over tau_i = eps + i (1 - eps) / steps, from noise at tau = eps to data at 1.

    Args:
        model: predicts at flow-matching times.
        noise: where paths start (items, ...).
        steps: how many.
        eps: where tau starts, in [0, 1).
        compat: go 1 / steps at each step, as the authors' sampler does, though the steps span 1 - eps only.
    """
    x, length = noise, (1.0 if compat else 1 - eps) / steps
    for place in range(steps):
        tau = torch.full((len(x),), eps + place * (1 - eps) / steps, dtype=torch.float64, device=x.device)
        x = x - length * model(x, 1 - tau).velocity
    return x


class TauFlow(Denoiser):
    """A velocity in the papers' time as a denoiser: u(x, t) = -v(x, scale (1 - t)).

    So networks that were trained as published are asked here, and diffusers' flow-matching schedulers take what is
    predicted as it is.

    Args:
        velocity: v(x, told tau (items,), condition), of the shape of x.
        scale: what tau is multiplied by for it: 999 in the authors' small networks.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor, Condition], Tensor], scale: float = 1.0) -> None:
        self.velocity, self.scale = velocity, scale
        self.schedule, self.sampling = FlowMatching(), Sampling("euler")

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = NONE) -> Prediction:
        """See `Denoiser`."""
        value = -self.velocity(x_t, self.scale * (1 - t), condition)
        return Prediction(value, "velocity", x_t, t, self.schedule)

    def null(self, condition: Condition) -> Condition:
        """Nothing is known of how the velocity is told nothing."""
        if condition:
            raise ValueError("a bare velocity has no condition that says nothing")
        return condition


def as_flow(denoiser: Denoiser) -> Denoiser:
    """A denoiser of any schedule, asked in flow matching's: exact, and without training."""
    return denoiser if isinstance(denoiser.schedule, FlowMatching) else Transported(denoiser, FlowMatching())


def empirical_flow(points: Float[Tensor, "points dim"]) -> GaussianMixtureDenoiser:
    """The exact flow from independent noise to a finite set of points: the velocity that flow matching learns there.

    v = (sum_i r_i points_i - x) / (1 - tau), r = softmax(-|x - tau points_i|^2 / (2 (1 - tau)^2)).
    """
    return GaussianMixtureDenoiser(points, 0.0, FlowMatching())


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

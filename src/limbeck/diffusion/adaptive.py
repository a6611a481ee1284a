"""An adaptive solver of the probability-flow ODE: for pairs of noise and data that should be exact."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.diffusion.schedules import along

Items = Float[Tensor, "items *shape"]
Slope = Callable[[Tensor, Tensor], Tensor]
"""dx/dt at items (items, ...) and times (items,)."""

# Dormand and Prince's pair of orders 5 and 4 (1980): nodes, stages, and the difference of the two results' weights.
_NODES = (0.2, 0.3, 0.8, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@torch.no_grad()
def rk45(
    slope: Slope, x: Items, start: float, stop: float, rtol: float = 1e-5, atol: float = 1e-5, most: int = 2000
) -> Items:
    """Where dx/dt = slope(x, t) leads from x at time `start` to `stop`, by Runge-Kutta steps of order 5(4).

    Each item has steps of its own, so that its end does not depend on the batch it is in. An error of atol + rtol |x|
    a number is allowed in a step, in the root mean square over an item.

    Args:
        slope: called with times (items,), float64.
        x: items at the start.
        start: first time.
        stop: last time, before or after it.
        rtol: relative tolerance, above 0.
        atol: absolute tolerance, above 0.
        most: trial steps.

    Raises:
        RuntimeError: the end was not reached in so many steps: the path is too stiff, or not finite.
    """
    t = torch.full((len(x),), start, dtype=torch.float64, device=x.device)
    h = torch.full_like(t, (stop - start) / 50)
    first = slope(x, t)
    for _ in range(most):
        left = stop - t
        if bool((left == 0).all()):
            return x
        final = h.abs() >= left.abs()
        h = torch.where(final, left, h)
        ahead, last, error = _trial(slope, x, t, h, first)
        allowed = atol + rtol * torch.maximum(x.abs(), ahead.abs())
        size = (error / allowed).flatten(1).double().square().mean(1).sqrt()
        good = size <= 1
        x = torch.where(_rows(good, x), ahead, x)
        first = torch.where(_rows(good, x), last, first)
        t = torch.where(good, torch.where(final, torch.full_like(t, stop), t + h), t)
        h = h * torch.nan_to_num(0.9 * size.clamp(min=1e-10) ** -0.2, nan=0.2).clamp(0.2, 5.0)
    raise RuntimeError(f"a path did not reach its end in {most} steps: ask for less accuracy, or look at the model")


def _trial(slope: Slope, x: Tensor, t: Tensor, h: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every item: where it ends, the slope there, and the error made."""
    slopes, ahead, length = [first], x, along(h, x)
    for node, weights in zip(_NODES, _STAGES, strict=True):
        ahead = x + length * _mixed(weights, slopes)
        slopes.append(slope(ahead, t + node * h))
    return ahead, slopes[-1], length * _mixed(_ERROR, slopes)


def _mixed(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [weight * one for weight, one in zip(weights, slopes, strict=True) if weight]
    return torch.stack(terms).sum(0)


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.ndim - 1))

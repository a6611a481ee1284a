"""Sharpness-aware descent (SAM, ASAM, GSAM): gradients that lead to flat minima."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_TINY = 1e-12


def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool = False) -> list[Tensor]:
    r"""The step up the loss from which a sharpness-aware gradient is taken.

    .. math:: e = \rho \frac{g}{\lVert g \rVert} \quad\text{or, adaptive,}\quad
        e = \rho \frac{w^2 g}{\lVert |w| g \rVert}

    with products taken entry by entry and the norm over all weights together. The adaptive step follows a rescaling of
    the weights: of k w, with g / k, it is k e. Source: Foret et al., 2021; adaptive: Kwon et al., 2021.

    Args:
        weights: any number of tensors w.
        gradients: g, in their shapes.
        rho: length of the step; of the adaptive one measured in units of the weights.
        adaptive: measure in these units.

    Returns:
        e, in their shapes.
    """
    if not adaptive:
        length = rho / (_norm(gradients) + _TINY)
        return [length * gradient for gradient in gradients]
    pairs = list(zip(weights, gradients, strict=True))
    length = rho / (_norm([weight.abs() * gradient for weight, gradient in pairs]) + _TINY)
    return [length * weight.square() * gradient for weight, gradient in pairs]


def across(here: Sequence[Tensor], above: Sequence[Tensor]) -> list[Tensor]:
    r"""The part of the gradient here that stands at right angles to the gradient up there.

    .. math:: g_\perp = g_0 - \cos(g_0, g_1) \lVert g_0 \rVert \frac{g_1}{\lVert g_1 \rVert}

    Inner product and norms are over all weights together, and plain also where the step up is adaptive.

    Args:
        here: g_0, the gradient at the weights.
        above: g_1, the gradient after the step up.
    """
    product = torch.stack([(one * other).sum() for one, other in zip(here, above, strict=True)]).sum()
    long, other_long = _norm(here), _norm(above)
    along = product / (long * other_long + _TINY) * long / (other_long + _TINY)
    return [one - along * other for one, other in zip(here, above, strict=True)]


def gsam_gradient(here: Sequence[Tensor], above: Sequence[Tensor], alpha: float) -> list[Tensor]:
    r"""What GSAM descends along, :math:`g_1 - \alpha g_\perp`: down the loss above, and closer to the loss here.

    Source: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", 2022.

    Args:
        here: g_0, the gradient at the weights.
        above: g_1, the gradient after the step up of `ascent`.
        alpha: weight of the part at right angles; 0 is SAM.
    """
    if not alpha:
        return list(above)
    return [slope - alpha * part for slope, part in zip(above, across(here, above), strict=True)]


class GSAM:
    """Turns an optimizer into a sharpness-aware one: two gradients for each of its steps.

    The second pass leaves the statistics of batch norms alone.

    Args:
        network: whose parameters `optimizer` trains.
        optimizer: takes the step; any of torch.optim.
        rho: length of the step up; 0 leaves the optimizer as it is, for one pass.
        alpha: see `gsam_gradient`.
        adaptive: see `ascent`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        rho: float,
        alpha: float = 0.4,
        adaptive: bool = True,
    ) -> None:
        self.network, self.optimizer = network, optimizer
        self.rho, self.alpha, self.adaptive = rho, alpha, adaptive
        groups = optimizer.param_groups
        self.weights = [weight for group in groups for weight in group["params"] if weight.requires_grad]

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """Takes one step and returns the loss before it (), detached.

        Args:
            loss: computes the loss of the network as it is, on the same batch at each call.
        """
        value = loss()
        here = torch.autograd.grad(value, self.weights)
        gradients = list(here)
        if self.rho:
            with torch.no_grad():
                step = ascent(self.weights, here, self.rho, self.adaptive)
                kept = [weight.clone() for weight in self.weights]  # subtracting again would not lead back exactly
                torch._foreach_add_(self.weights, step)
            with still_statistics(self.network):
                above = torch.autograd.grad(loss(), self.weights)
            with torch.no_grad():
                torch._foreach_copy_(self.weights, kept)
                gradients = gsam_gradient(here, above, self.alpha)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Within it batch norms in train mode normalise by their batch, and their running statistics do not move."""
    norms = [part for part in network.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()

"""Quadrature along rays: where to look, and how densities become weights. nerfacc is not used: all is dense tensors."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def composite(optical: Float[Tensor, "*rays samples"]) -> tuple[Float[Tensor, "*rays samples"], Float[Tensor, "*rays"]]:
    """Weight of each sample, front to back, and the transmittance that is left behind the last one.

    ``w_i = (1 - exp(-s_i)) exp(-sum_{j<i} s_j)``; the weights and what is left add up to 1. Exact for a density that is
    constant within each step.

    Args:
        optical: s_i = density times step (an opacity a is s = -log(1 - a)), not negative, without unit.

    Source: Max, *Optical Models for Direct Volume Rendering*, 1995.
    """
    passed = functional.pad(optical.cumsum(-1)[..., :-1], (1, 0))
    weights = torch.exp(-passed) * -torch.expm1(-optical)
    return weights, torch.exp(-optical.sum(-1))


def box_interval(
    origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"], bound: float, near: float = 0.0
) -> tuple[Float[Tensor, "*rays"], Float[Tensor, "*rays"]]:
    """Distances at which rays enter and leave the cube [-bound, bound]^3, the first at least `near`.

    A ray that misses the cube gets an empty interval (both equal), so that its samples have no weight.
    """
    # A direction of exactly 0 would give 0/0 on the face itself.
    safe = torch.where(directions.abs() < 1e-12, torch.full_like(directions, 1e-12), directions)
    one, other = (-bound - origins) / safe, (bound - origins) / safe
    enter = torch.minimum(one, other).amax(-1).clamp_min(near)
    return enter, torch.maximum(torch.maximum(one, other).amin(-1), enter)


def uniform_edges(
    near: Float[Tensor, "*rays"], far: Float[Tensor, "*rays"], samples: int
) -> Float[Tensor, "*rays edges"]:
    """The samples + 1 edges of equal steps from near to far."""
    position = torch.linspace(0, 1, samples + 1, device=near.device, dtype=near.dtype)
    return near[..., None] + (far - near)[..., None] * position


def stratified(
    edges: Float[Tensor, "*rays edges"], jitter: bool, generator: torch.Generator | None = None
) -> Float[Tensor, "*rays samples"]:
    """One distance in each step: drawn uniformly (torch's global stream without a generator), or its middle."""
    low, high = edges[..., :-1], edges[..., 1:]
    if not jitter:
        return 0.5 * (low + high)
    return low + (high - low) * torch.rand(low.shape, generator=generator, device=low.device, dtype=low.dtype)


def resample(
    edges: Float[Tensor, "*rays edges"], weights: Float[Tensor, "*rays samples"], samples: int, floor: float = 0.01
) -> Float[Tensor, "*rays finer"]:
    """The samples + 1 edges that cut a ray into steps of equal weight, from the first edge to the last.

    Args:
        edges: edges of the steps that the weights belong to.
        weights: not negative; constant within a step.
        samples: number of new steps.
        floor: share of an even weight that every step keeps, so that nothing is overlooked for good.

    No gradient flows through the result.
    """
    with torch.no_grad():
        count = weights.shape[-1]
        even = torch.full_like(weights, 1 / count)
        total = weights.sum(-1, keepdim=True)
        share = torch.where(total > 1e-8, weights / total.clamp_min(1e-8), even)
        cumulative = functional.pad(((1 - floor) * share + floor * even).cumsum(-1), (1, 0))
        cumulative = cumulative / cumulative[..., -1:]
        wanted = torch.linspace(0, 1, samples + 1, device=edges.device, dtype=edges.dtype)
        wanted = wanted.expand(*edges.shape[:-1], samples + 1).contiguous()
        step = torch.searchsorted(cumulative.contiguous(), wanted, right=True).sub(1).clamp(0, count - 1)
        start, stop = cumulative.gather(-1, step), cumulative.gather(-1, step + 1)
        inside = ((wanted - start) / (stop - start)).clamp(0, 1)
        low, high = edges.gather(-1, step), edges.gather(-1, step + 1)
        return low + (high - low) * inside

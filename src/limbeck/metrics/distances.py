"""Distances between two sets of samples; what each costs and what it sees differs, so several are given."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from limbeck.core.randomness import generator

Extractor = Callable[[Tensor], Tensor]
"""From items (items, ...) to features (items, dim)."""


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance between samples (items, ...) of the same shape an item.

    The root of the mean over random directions of the squared one-dimensional distance; sets of different size are
    compared at the quantiles of the smaller. Directions are a function of `seed`. Its floor for a perfect sampler is
    not 0: two sets of 4,000 points of unit deviation differ by .04 to .06.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    directions = torch.randn(a.shape[1], projections, generator=generator(seed, "directions"), dtype=torch.float64)
    directions = functional.normalize(directions, dim=0).to(a.device)
    count = min(len(a), len(b))
    levels = (torch.arange(count, dtype=torch.float64, device=a.device) + 0.5) / count
    first, second = (_quantiles((x @ directions).sort(0).values, levels) for x in (a, b))
    return float((first - second).square().mean().sqrt())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (items, dim): with Inception features it is FID.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), unbiased covariances, in float64 (Heusel et al., 2017). With
    C = R' R from the QR decomposition of the centred features, the trace of the root is the sum of the singular values
    of R_a R_b', exact to the last digits also where there are fewer items than features. One item has covariance 0.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    root_a, root_b = (torch.linalg.qr((x - x.mean(0)) / max(len(x) - 1, 1) ** 0.5, mode="r").R for x in (a, b))
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    apart = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * shared
    return max(0.0, float(apart))


def mmd_rbf(a: Tensor, b: Tensor, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy under a Gaussian kernel, unbiased: about 0 for equal distributions, or below.

    Args:
        a: samples (items, ...).
        b: samples (items, ...).
        bandwidth: deviation of the kernel; the median distance within `b` if absent.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    if bandwidth is None:
        bandwidth = float(torch.pdist(b[:1000]).median())
    within_a, within_b, between = (
        torch.exp(-torch.cdist(x, y).square() / (2 * bandwidth**2)) for x, y in ((a, a), (b, b), (a, b))
    )
    off_a = (within_a.sum() - len(a)) / (len(a) * (len(a) - 1))
    off_b = (within_b.sum() - len(b)) / (len(b) * (len(b) - 1))
    return float(off_a + off_b - 2 * between.mean())


def pooled_pixels(items: Tensor, side: int = 8) -> Tensor:
    """The features (items, dim) used where none are given: images averaged to at most `side` pixels a side."""
    if items.ndim == 4 and max(items.shape[2:]) > side:
        items = functional.adaptive_avg_pool2d(items, side)
    return items.flatten(1)


def _quantiles(ordered: Tensor, levels: Tensor) -> Tensor:
    """Values of sorted columns (items, columns) at levels in (0, 1): the items themselves where there are as many."""
    if len(ordered) == len(levels):
        return ordered
    place = (levels * len(ordered) - 0.5).clamp(0, len(ordered) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], (place - low)[:, None])

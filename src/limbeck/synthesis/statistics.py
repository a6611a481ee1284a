"""Matching a batch of images with what a classifier's batch norms remember of the data it was trained on."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from limbeck.objectives.operands import full_precision

Statistics = tuple[Tensor, Tensor]
"""Running mean and running variance (channels,) of a batch norm."""


def batch_norms(model: nn.Module) -> dict[str, Statistics]:
    """Running mean and variance of each batch norm, by module path, in the order in which the modules are registered.

    Any module that keeps `running_mean` and `running_var` counts, as timm's fused and frozen batch norms do; instance
    norms do not. The tensors are the model's own.

    Raises:
        ValueError: the model has none, as a ViT with layer norms.
    """
    found = {
        path: (module.running_mean, module.running_var)
        for path, module in model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor) and not isinstance(module, _InstanceNorm)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics")
    return found


@full_precision
def statistics_distance(
    features: Float[Tensor, "items channels *shape"],
    mean: Float[Tensor, " channels"],
    variance: Float[Tensor, " channels"],
) -> Float[Tensor, ""]:
    r"""How far a batch's statistics are from those that a batch norm remembers.

    .. math:: \lVert \mu(x) - \mu \rVert_2 + \lVert \sigma^2(x) - \sigma^2 \rVert_2

    Mean and biased variance (divided by the count) are over items and positions; the norms are not squared. Where a
    statistic agrees exactly its norm gives no gradient.

    Args:
        features: what the batch norm receives, any range.
        mean: running mean.
        variance: running variance, not below 0.

    Returns:
        A scalar, 0 where both agree.

    Source: Yin et al., *Dreaming to Distill*, CVPR 2020; SRe2L, arXiv 2306.13092 (2023).
    """
    over = [0, *range(2, features.ndim)]
    seen_mean, seen_variance = features.mean(over), features.var(over, correction=0)
    return torch.linalg.vector_norm(seen_mean - mean) + torch.linalg.vector_norm(seen_variance - variance)


def statistics_matching(
    features: Sequence[Tensor], statistics: Sequence[Statistics], first: float = 10.0
) -> Float[Tensor, ""]:
    r"""The distances of all batch norms of a model, :math:`\sum_l m_l d_l`, with m = `first` for the first, else 1.

    Args:
        features: inputs of the batch norms, (items, channels, ...) each, in the order of `batch_norms`.
        statistics: their running mean and variance.
        first: multiplier of the first one, which sees the image nearly as it is.

    Returns:
        A scalar, 0 where all statistics agree.

    Source: SRe2L, arXiv 2306.13092 (2023).
    """
    terms = [statistics_distance(seen, *known) for seen, known in zip(features, statistics, strict=True)]
    return torch.stack([first * terms[0], *terms[1:]]).sum()

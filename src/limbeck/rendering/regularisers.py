"""What keeps a radiance field from becoming fog: each a number a view, whose mean is added to a loss."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

PerView = Float[Tensor, " views"]


def ray_entropy(weights: Float[Tensor, "views samples height width"], floor: float = 1e-5) -> PerView:
    """Mean binary entropy, in bits, of the weights of the samples along the rays; 0 where all are 0 or 1.

    Source: Wang et al., *ProlificDreamer*, 2023, arXiv 2305.16213.
    """
    share = weights.float().clamp(floor, 1 - floor)
    bits = -(share * share.log2() + (1 - share) * torch.log1p(-share) / torch.log(share.new_tensor(2.0)))
    return bits.flatten(1).mean(1)


def sparsity(opacity: Float[Tensor, "views 1 height width"]) -> PerView:
    """Mean of sqrt(o^2 + 0.01): less is seen of less. Source: Poole et al., *DreamFusion*, 2022, public code."""
    return (opacity.float().square() + 0.01).sqrt().flatten(1).mean(1)


def half_opacity(opacity: Float[Tensor, "views 1 height width"], floor: float = 1e-3) -> PerView:
    """Mean binary cross-entropy, in nats, of the opacity with itself: least where pixels are seen wholly or not."""
    share = opacity.float().clamp(floor, 1 - floor)
    return functional.binary_cross_entropy(share, share, reduction="none").flatten(1).mean(1)

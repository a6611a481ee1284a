"""Embeddings of single numbers: guidance weights and times as networks take them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def scalar_embedding(w: Float[Tensor, " items"], dim: int, scale: float = 1000.0) -> Float[Tensor, "items dim"]:
    """Sines, then cosines, of `scale` w at falling frequencies: how a guidance weight enters a network.

    f_j = 10000^(-j / (dim/2 - 1)); an odd dimension ends in a zero (Kingma et al., VDM, 2021).
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000.0) / max(half - 1, 1) * torch.arange(half, device=w.device, dtype=torch.float32)
    )
    angle = scale * w.float()[:, None] * frequencies
    return functional.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, dim % 2))

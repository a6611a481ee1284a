"""Tiny networks of diffusers, made from their configurations with random weights."""

from functools import cache
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from tests.diffusion.cases import normal

BLOCKS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return _MAKERS[name]().eval()


@cache
def shared(name: str) -> nn.Module:
    """One network for all tests that only call it."""
    return make(name)


def _unet(**arguments):
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(in_channels=3, out_channels=3, **BLOCKS, **kinds, **arguments)


def _text_unet(channels=4, **arguments):
    kinds: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(
        in_channels=channels,
        out_channels=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        **BLOCKS,
        **kinds,
        **arguments,
    )


def _dit(**arguments):
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10,
        **arguments,
    )  # fmt: skip


def _sd3():
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12,
    )  # fmt: skip


def _flux(guidance):
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _sana(guidance):
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, guidance_embeds=guidance,
    )  # fmt: skip


_MAKERS = {
    "unet": _unet,
    "class-unet": lambda: _unet(num_class_embeds=11),
    "text-unet": _text_unet,
    "told-unet": lambda: _text_unet(time_cond_proj_dim=32),
    "filling-unet": lambda: _text_unet(channels=9),
    "xl-unet": lambda: _text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=12 + 6 * 4
    ),
    "dit": lambda: _dit(out_channels=4),
    "learned-variance-dit": lambda: _dit(out_channels=8),
    "sd3": _sd3,
    "flux": lambda: _flux(False),
    "told-flux": lambda: _flux(True),
    "sana": lambda: _sana(False),
    "told-sana": lambda: _sana(True),
}

LABEL = {"label": torch.tensor([1, 7])}
PROMPT = {"prompt": normal(2, 5, 16, seed=3, dtype=torch.float32)}
MASK = {"prompt_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
POOLED = {"pooled": normal(2, 12, seed=4, dtype=torch.float32)}
GUIDANCE = {"guidance": torch.tensor([1.0, 4.5])}
SIZES = {"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 64, 3, 0, 64, 64]])}
CHANNELS = {"channels": normal(2, 5, 8, 8, seed=5, dtype=torch.float32)}

CONDITIONS: dict[str, dict[str, torch.Tensor]] = {
    "unet": {},
    "class-unet": LABEL,
    "text-unet": {**PROMPT, **MASK},
    "told-unet": {**PROMPT, **GUIDANCE},
    "filling-unet": {**PROMPT, **CHANNELS},
    "xl-unet": {**PROMPT, **POOLED, **SIZES},
    "dit": LABEL,
    "learned-variance-dit": LABEL,
    "sd3": {**PROMPT, **POOLED},
    "flux": {**PROMPT, **POOLED},
    "told-flux": {**PROMPT, **POOLED, **GUIDANCE},
    "sana": {**PROMPT, **MASK},
    "told-sana": {**PROMPT, **MASK, **GUIDANCE},
}
"""All that each network can be conditioned on, for two items."""


def items(name: str) -> torch.Tensor:
    return normal(2, 3 if name in ("unet", "class-unet") else 4, 8, 8, dtype=torch.float32)

"""A small vision transformer, with DeiT's distillation token on request."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.models.configs import VisionTransformerConfig


class VisionTransformer(nn.Module):
    """Pre-norm transformer on square patches, read out at a class token (Dosovitskiy et al., arXiv 2010.11929).

    With `distilled` a second token learns from the teacher (Touvron et al., arXiv 2012.12877): in train mode the
    network returns (class logits, distillation logits), in eval mode their mean.

    Args:
        image_size: side of the square images in pixels.
        patch_size: side of a patch in pixels; divides `image_size`.
        channels: channels of the images.
        classes: number of logits.
        dim: width of a token; a multiple of `heads`.
        depth: number of transformer blocks.
        heads: attention heads.
        distilled: add the distillation token.

    Attributes:
        config: all constructor arguments as plain data; `VisionTransformer(**config)` rebuilds the network.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        channels: int = 3,
        classes: int = 10,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        checked = VisionTransformerConfig(
            image_size=image_size,
            patch_size=patch_size,
            channels=channels,
            classes=classes,
            dim=dim,
            depth=depth,
            heads=heads,
            distilled=distilled,
        )
        self.config: dict[str, Any] = checked.model_dump()
        self.distilled = distilled
        extra = 2 if distilled else 1
        self.patches = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.tokens = nn.Parameter(_small_normal(1, extra, dim))
        self.positions = nn.Parameter(_small_normal(1, extra + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.distillation_head = nn.Linear(dim, classes) if distilled else None

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (items, classes) of images (items, channels, image_size, image_size); see the class for the pair."""
        patches = self.patches(image).flatten(2).transpose(1, 2)  # (items, patches, dim)
        tokens = torch.cat([self.tokens.expand(image.shape[0], -1, -1), patches], 1)
        hidden = self.norm(self.blocks(tokens + self.positions))
        logits = self.head(hidden[:, 0])
        if self.distillation_head is None:
            return logits
        distillation = self.distillation_head(hidden[:, 1])
        return (logits, distillation) if self.training else (logits + distillation) / 2

    def layers(self) -> list[str]:
        """Module paths of the transformer blocks, from input to output; each returns (items, tokens, dim)."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each on normalised input and added to it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (items, tokens, dim) to tokens of the same shape."""
        tokens = tokens + self._attend(self.norm_attention(tokens))
        return tokens + self.mlp(self.norm_mlp(tokens))

    def _attend(self, tokens: Tensor) -> Tensor:
        items, length, dim = tokens.shape
        mixed = self.query_key_value(tokens).view(items, length, 3, self.heads, dim // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)  # each (items, heads, tokens, dim / heads)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.projection(attended.transpose(1, 2).reshape(items, length, dim))


def _small_normal(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=0.02)

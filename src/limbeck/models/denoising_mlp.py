"""A small denoising network on flattened items: the student and teacher of points and digits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.diffusion.embeddings import scalar_embedding
from limbeck.models.configs import DenoiserConfig


class DenoisingMLP(nn.Module):
    """Residual layers that know the time, and the class and the guidance scale where there are any.

    Times of about one are expected: processes with discrete times scale them by 0.001. The highest frequency of the
    time embedding is mild, so that consistency training can tell neighbouring times apart without chasing them.

    Args:
        numbers: numbers an item, after flattening.
        classes: classes to condition on, 0 for none; any other label, such as -1 or `classes`, says nothing.
        width: units of each layer.
        depth: residual layers.
        guidance: whether the guidance scale is an input; its map starts at zero.

    Attributes:
        config: all constructor arguments as plain data; `DenoisingMLP(**config)` rebuilds the network.
    """

    frequencies: Tensor

    def __init__(
        self, numbers: int = 64, classes: int = 0, width: int = 256, depth: int = 3, guidance: bool = False
    ) -> None:
        super().__init__()
        made = DenoiserConfig(numbers=numbers, classes=classes, width=width, depth=depth, guidance=guidance)
        self.config: dict[str, Any] = made.model_dump()
        octaves = torch.linspace(-3, 3, 16)
        self.register_buffer("frequencies", 2 * math.pi * 2**octaves, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * len(octaves), width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.guidance = nn.Linear(_GUIDANCE, width) if guidance else None
        if self.guidance is not None:
            nn.init.zeros_(self.guidance.weight)
            nn.init.zeros_(self.guidance.bias)
        self.entry = nn.Linear(numbers, width)
        self.stages = nn.ModuleList(ResidualLayer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, numbers)

    def forward(self, x: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """What is predicted at items x (items, ...) and times (items,), in the shape of x."""
        known = self.embedded(time, condition)
        hidden = self.entry(x.flatten(1))
        for stage in self.stages:
            hidden = stage(hidden, known)
        return self.exit(functional.silu(self.norm(hidden))).view_as(x)

    def embedded(self, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """All that is known of the items but themselves (items, width)."""
        angle = time[:, None] * self.frequencies.to(time)
        known = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        if self.label is not None:
            classes = self.label.num_embeddings - 1
            label = condition.get("label", torch.full_like(time, classes, dtype=torch.int64))
            known = known + self.label(torch.where((label < 0) | (label > classes), classes, label))
        if self.guidance is not None:
            scale = condition.get("guidance", torch.ones_like(time))
            known = known + self.guidance(scalar_embedding(scale - 1, _GUIDANCE, scale=1.0).to(time.dtype))
        return known

    def layers(self) -> list[str]:
        """Module paths of the residual layers, from input to output."""
        return [f"stages.{i}" for i in range(len(self.stages))]


_GUIDANCE = 32


class ResidualLayer(nn.Module):
    """h + W2 silu(W1 norm(h) + V known)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.entry = nn.Linear(width, width)
        self.known = nn.Linear(width, width)
        self.exit = nn.Linear(width, width)

    def forward(self, hidden: Tensor, known: Tensor) -> Tensor:
        """The next hidden state (items, width)."""
        return hidden + self.exit(functional.silu(self.entry(self.norm(hidden)) + self.known(known)))

"""Fresh weights for a network that is there already."""

import copy
from typing import Literal

import torch
from torch import nn

from limbeck.core.randomness import derive

Initialisation = Literal["default", "normal"]
"""`default`: every layer's own; `normal`: weights of convolutions and linear layers from N(0, 1)."""


def reinitialised(model: nn.Module, scheme: Initialisation, seed: int) -> nn.Module:
    """A copy of a network with fresh weights, in train mode; the network and torch's random stream stay as they are.

    Parameters that belong to no layer which knows how to reset itself (position embeddings, say) are copied.

    Args:
        model: any network.
        scheme: `default` calls `reset_parameters` of every layer that has it; `normal` draws the weights of
            convolutions and linear layers from N(0, 1) after that, and sets their biases to 0. Norms get scale 1 and
            shift 0 in both.
        seed: decides the weights.
    """
    fresh = copy.deepcopy(model).requires_grad_(True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(derive(seed, "initialisation"))
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            if scheme == "normal":
                _draw_normal(module)
    return fresh.train()


def _draw_normal(module: nn.Module) -> None:
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        nn.init.normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

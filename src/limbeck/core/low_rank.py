"""A second network over the frozen weights of a first, told apart by low-rank additions alone."""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import match_modules


class LowRank(nn.Module):
    r"""What is added to a layer's output: :math:`\frac{\alpha}{r} B A x`, at first 0 (Hu et al., *LoRA*, 2021).

    Args:
        layer: a linear or two-dimensional convolutional layer.
        rank: r.
        alpha: the factor's numerator.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down: nn.Module
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            shape: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            size: Any = layer.kernel_size
            self.down = nn.Conv2d(layer.in_channels, rank, size, **shape, padding_mode=layer.padding_mode, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x.to(self.up.weight.dtype)))

    def join(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """A forward hook that adds this to the layer's output."""
        return output + self(args[0]).to(output.dtype)


class LowRankNetwork(nn.Module):
    """A network whose own parameters are additions to the layers of another, whose weights it shares in memory.

    `network` is an ordinary network with modules of its own, so nothing is ever switched on or off: not between
    forward and backward either, which checkpointed blocks would not survive. What is shared is in no parameter list
    and no checkpoint of this; it moves along to other devices.

    Args:
        backbone: any network with linear layers or convolutions; it is not changed, and stays in its mode.
        rank: of the additions.
        alpha: numerator of their factor; the rank if absent.
        layers: module paths or globs; all linear layers and two-dimensional convolutions if absent.

    Raises:
        IncompatibleError: there is no such layer.
    """

    def __init__(
        self, backbone: nn.Module, rank: int, alpha: float | None = None, layers: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        shared = {id(tensor): tensor for tensor in chain(backbone.parameters(), backbone.buffers())}
        network = copy.deepcopy(backbone, dict(shared))
        paths = [name for name, _ in network.named_modules()] if layers is None else match_modules(network, layers)
        self.additions = nn.ModuleList()
        for path in paths:
            layer = network.get_submodule(path)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                addition = LowRank(layer, rank, float(rank) if alpha is None else alpha)
                self.additions.append(addition)
                layer.register_forward_hook(addition.join)  # a bound method: deep copies follow it
        if not self.additions:
            raise IncompatibleError(f"a {type(backbone).__name__} has no linear layers or convolutions to add to")
        self._hidden = (network,)  # in a tuple, where torch does not look for submodules

    @property
    def network(self) -> nn.Module:
        """The network with its additions in place."""
        return self._hidden[0]

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.network(*args, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> "LowRankNetwork":
        super()._apply(fn, recurse)
        self.network._apply(fn, recurse)
        return self


def trainable_copy(network: nn.Module) -> nn.Module:
    """A copy to be trained along: of a wholly frozen network all of it, else what is trainable.

    The frozen part of a partly trainable network, such as the backbone under an adapter, is shared in memory.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return copy.deepcopy(network).requires_grad_(True)
    with torch.no_grad():
        return copy.deepcopy(network, {id(p): p for p in network.parameters() if not p.requires_grad})

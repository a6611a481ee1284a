"""Target networks: copies that follow a player and are never trained themselves."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn

from limbeck.core.optim import whole


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy of a network whose weights are buffers: saved in checkpoints, moved with the method, trained by nobody.

    Keep it as a submodule of the method.
    """
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
    return copied


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, decay: float = 0.0) -> None:
    """Moves a target's weights towards a network's: target <- decay target + (1 - decay) source; 0 copies them.

    Buffers of the source itself, such as the statistics of batch norms, are copied.
    """
    values = dict(chain(source.named_parameters(), source.named_buffers()))
    averaged = {name for name, value in source.named_parameters() if value.is_floating_point()}
    old: list[Tensor] = []
    new: list[Tensor] = []
    for name, buffer in target.named_buffers():
        value = whole(values[name].detach())
        if decay and name in averaged:
            old.append(buffer)
            new.append(value.to(buffer.dtype))
        else:
            buffer.copy_(value)
    if old:
        torch._foreach_lerp_(old, new, 1 - decay)

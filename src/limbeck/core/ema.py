"""Exponential moving average of a module's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from limbeck.core.optim import sharded_like


class EMA:
    """A float32 average of a module's weights and floating-point buffers, `average <- decay average + (1-decay) value`.

    Args:
        module: the module to follow; its own tensors are never changed except inside `applied`.
        decay: share of the old average kept at each update, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"an EMA decay lies in [0, 1), not {decay}")
        self.decay = decay
        self._module = module
        self._average = {name: tensor.detach().clone().float() for name, tensor in self._followed()}

    def _followed(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield name, tensor

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average toward the module's present weights."""
        current = [tensor.detach().float() for _, tensor in self._followed()]
        torch._foreach_lerp_(list(self._average.values()), current, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The module with the averaged weights in place; its own come back on leaving."""
        own = {name: tensor.detach().clone() for name, tensor in self._followed()}
        try:
            self.copy_into(self._module)
            yield self._module
        finally:
            _copy(own, self._module)

    def copy_into(self, module: nn.Module) -> None:
        """Writes the average into a module of the same structure, which becomes a target network or a result."""
        _copy(self._average, module)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(self._average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores averages saved by `state_dict`."""
        with torch.no_grad():
            for name, average in self._average.items():
                average.copy_(sharded_like(state[name], average))


@torch.no_grad()
def _copy(values: dict[str, Tensor], module: nn.Module) -> None:
    own = module.state_dict(keep_vars=True)
    for name, value in values.items():
        own[name].copy_(value)

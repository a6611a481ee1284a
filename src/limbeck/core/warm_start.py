"""Starting a network from the weights of a smaller or equal one."""

import torch
from torch import nn

from limbeck.core.errors import IncompatibleError


@torch.no_grad()
def start_from(target: nn.Module, source: nn.Module) -> list[str]:
    """Copies all weights of a network into one that extends it, by name; returns what the latter has besides.

    What is new contributes nothing at first: of each new module the last layer that has weights is set to zero, the
    others keep their random weights, so that all of it learns.

    Raises:
        IncompatibleError: a weight of the source has no counterpart of its shape.
    """
    theirs, own = source.state_dict(), target.state_dict(keep_vars=True)
    for name, value in theirs.items():
        if name not in own or own[name].shape != value.shape:
            there = f"has the shape {tuple(own[name].shape)} there" if name in own else "is missing there"
            raise IncompatibleError(
                f"the student cannot start from the teacher: '{name}' {tuple(value.shape)} {there}",
                "give both the same architecture, or set initialise: none",
            )
    for name, value in theirs.items():
        own[name].copy_(value)
    new = [name for name in own if name not in theirs]
    _silence(target, {name for name, _ in source.named_modules()}, new)
    return new


def _silence(target: nn.Module, known: set[str], new: list[str]) -> None:
    """Zeroes the last layer of each module that only the target has, and new weights of modules that both have."""
    roots = set()
    for name in new:
        parts = name.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        root = next((path for path in paths if path not in known), None)
        if root is None:
            target.get_parameter(name).zero_()
        else:
            roots.add(root)
    for root in roots:
        layers = [part for part in target.get_submodule(root).modules() if part._parameters]
        for weight in layers[-1].parameters() if layers else ():
            weight.zero_()

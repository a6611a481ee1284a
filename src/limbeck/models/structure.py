"""Second instances of a network over the same memory."""

import copy
from collections.abc import Callable
from itertools import chain

from torch import Tensor, nn


def structural_copy(model: nn.Module, share: Callable[[Tensor], bool] = lambda tensor: True) -> nn.Module:
    """A network of its own modules whose parameters and buffers are those of `model`, not copies of them.

    Modes, hooks and replaced submodules are then its own; what is done to a shared tensor is done to both.

    Args:
        model: any network; it is not changed.
        share: which of its tensors are shared; all others are copied.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers()) if share(tensor)}
    return copy.deepcopy(model, dict(shared))


def share_frozen(model: nn.Module, other: nn.Module) -> int:
    """Makes `other` use the frozen parameters of `model` wherever it has frozen ones of its own with equal values.

    So a teacher and a student's frozen backbone that were loaded apart are held once. Compare a LoRA student and its
    teacher: what the adapter wraps is found under another name, so that values alone decide.

    Returns:
        How many bytes became free.
    """
    known: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for frozen in model.parameters():
        if not frozen.requires_grad:
            known.setdefault(_signature(frozen), []).append(frozen)
    freed, seen = 0, set[int]()
    for module in other.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.requires_grad:
                continue
            twin = next((one for one in known.get(_signature(parameter), ()) if one.equal(parameter)), None)
            if twin is not None and twin is not parameter:
                freed += 0 if id(parameter) in seen else parameter.nbytes
                seen.add(id(parameter))
                module._parameters[name] = twin
    return freed


def _signature(parameter: nn.Parameter) -> tuple[object, ...]:
    """Equal for equal tensors, and cheap: the shape, the kind, and a few values."""
    flat = parameter.detach().flatten()
    return (parameter.shape, parameter.dtype, parameter.device, *flat[:: max(1, len(flat) // 4)].tolist())

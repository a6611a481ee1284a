"""Optimizers from options, learning rates as pure functions of the step, and optimizer state by parameter name."""

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.core.specs import OptimizerSpec


def build_optimizer(player: str, module: nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer of one player over its trainable parameters.

    Raises:
        IncompatibleError: the player has nothing to train, or a key of `lr_multipliers` fits none of it.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise IncompatibleError(
            f"player '{player}' has no trainable parameter", "unfreeze something, or add an adapter"
        )
    groups = _groups(player, module, spec)
    if spec.weight_decay and not spec.decay_norms:
        groups = [part for group in groups for part in _without_decay_of_norms(group)]
    # The fused kernels do one pass over memory, and alone can skip a non-finite step without the host knowing. Sharded
    # parameters (DTensor) have no fused SGD.
    fused = spec.name != "sgd" or not any(hasattr(parameter, "placements") for parameter in trainable)
    shared: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay, "fused": fused}
    if spec.name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=spec.momentum, nesterov=spec.nesterov, **shared)
        if spec.momentum:
            # The fused kernel leaves fresh buffers unset where it skips the first step. From zeros, the first step
            # makes of them what it would make without: the gradient.
            for parameter in trainable:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if spec.name == "radam":  # it has no fused kernel
        return torch.optim.RAdam(groups, lr=spec.lr, weight_decay=spec.weight_decay, betas=spec.betas)
    kind = torch.optim.AdamW if spec.name == "adamw" else torch.optim.Adam
    return kind(groups, betas=spec.betas, **shared)


def _groups(player: str, module: nn.Module, spec: OptimizerSpec) -> list[dict[str, Any]]:
    """Trainable parameters by the factor on their learning rate, `multiplier`; one group where all have the rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    unused = set(spec.lr_multipliers)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        fitting = next((key for key in spec.lr_multipliers if _fits(key, name)), None)
        unused.discard(fitting or "")
        factor = 1.0 if fitting is None else spec.lr_multipliers[fitting]
        groups.setdefault(factor, []).append(parameter)
    if unused:
        raise IncompatibleError(
            f"lr_multipliers: no trained parameter of player '{player}' is left for '{sorted(unused)[0]}'",
            "name its modules, and special ones before general ones; train.players gives each player its own",
        )
    return [{"params": parameters, "multiplier": factor} for factor, parameters in groups.items()]


def _fits(key: str, name: str) -> bool:
    """Whether a path or glob is that of a parameter, or of a module that holds it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), key) for end in range(1, len(parts) + 1))


def _without_decay_of_norms(group: dict[str, Any]) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
    vectors = [parameter for parameter in group["params"] if parameter.ndim <= 1]
    return [{**group, "params": matrices}, {**group, "params": vectors, "weight_decay": 0.0}]


def learning_rate(spec: OptimizerSpec, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then the chosen shape."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    progress = (step - spec.warmup) / max(1, steps - spec.warmup)
    if spec.schedule == "cosine":
        return spec.lr * (spec.final + (1 - spec.final) * 0.5 * (1 + math.cos(math.pi * progress)))
    if spec.schedule == "linear":
        return spec.lr * (spec.final + (1 - spec.final) * (1 - progress))
    if spec.schedule == "step":
        return spec.lr * spec.gamma ** sum(step >= milestone * steps for milestone in spec.milestones)
    return spec.lr


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as tensors named `parameter/entry`; sharded entries are gathered whole."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for entry, value in state.items():
            if value is not None:
                tensors[f"{names[parameter]}/{entry}"] = whole(torch.as_tensor(value))
    return tensors


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts saved state back, on each parameter's device and in its sharding."""
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise DamagedFileError(name, "the checkpoint belongs to another model: it has no such parameter")
        parameter = parameters[name]
        shape, dtype = (torch.Size(), torch.float32) if entry == "step" else (parameter.shape, parameter.dtype)
        if (value.shape, value.dtype) != (shape, dtype):  # the fused kernels would read beyond the end
            raise DamagedFileError(key, f"{tuple(value.shape)}, {value.dtype} in place of {tuple(shape)}, {dtype}")
        optimizer.state[parameter][entry] = sharded_like(value, parameter) if value.ndim else value.to(parameter.device)


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor: a sharded one gathered from all ranks, any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def sharded_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A plain tensor laid out like `model`: on its device, and split over ranks when `model` is."""
    tensor = tensor.to(model.device)
    if hasattr(model, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(model, DTensor)
        return distribute_tensor(tensor, model.device_mesh, model.placements)
    return tensor

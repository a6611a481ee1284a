"""A trainer's state as a checkpoint, and back: everything that a bit-exact continuation needs, and nothing else."""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from limbeck.core.checkpoint import Checkpoint
from limbeck.core.errors import DamagedFileError, NonFiniteError
from limbeck.core.optim import optimizer_tensors, restore_optimizer, sharded_like, whole
from limbeck.core.options import OptionsBase

if TYPE_CHECKING:
    from limbeck.core.trainer import Trainer


Count = Annotated[int, Field(ge=0, lt=1 << 53, strict=True)]


class State(OptionsBase):
    """What a checkpoint holds besides tensors; see the attributes of `Trainer` and `FiniteGuard`."""

    offset: Count
    logged: Count
    skipped_in_a_row: dict[str, Count]
    rewinds: Count
    seconds: dict[str, float]


def save(trainer: "Trainer") -> None:
    """Writes a checkpoint of this moment, by the main process; sharded tensors are gathered from all ranks."""
    if trainer.checkpoints is None:
        return
    trainer.guard.settle()
    trainer.world.average_buffers(trainer.method)
    tensors = {"method": module_tensors(trainer.method), "meter": trainer.meter.state_dict()}
    for name, player in trainer.players.items():
        tensors[f"optimizer-{name}"] = optimizer_tensors(player.module, player.optimizer)
    if trainer.average is not None:
        tensors["average"] = {name: whole(tensor) for name, tensor in trainer.average.state_dict().items()}
    state = State(
        offset=trainer.offset,
        logged=trainer.logged,
        skipped_in_a_row=dict(trainer.guard.in_a_row),
        rewinds=trainer.guard.rewinds,
        seconds=dict(trainer.seconds),
    )
    if trainer.world.main:
        trainer.checkpoints.save(Checkpoint(trainer.step, tensors, state.model_dump()))
    trainer.world.barrier()


def restore(trainer: "Trainer") -> None:
    """Continues from the latest whole checkpoint, where there is one.

    Raises:
        DamagedFileError: no checkpoint is whole, or the latest belongs to another method or model.
    """
    checkpoint = trainer.checkpoints.load() if trainer.checkpoints is not None else None
    if checkpoint is None:
        return
    try:
        state = State.model_validate(checkpoint.state)
    except ValidationError as error:
        raise DamagedFileError("state.json", f"it is no state of a trainer ({error.errors()[0]['msg']})") from error
    load_module(trainer.method, _group(checkpoint, "method"))
    for name, player in trainer.players.items():
        restore_optimizer(player.module, player.optimizer, _group(checkpoint, f"optimizer-{name}"))
    if trainer.average is not None:
        trainer.average.load_state_dict(_group(checkpoint, "average", trainer.average.state_dict()))
    device = trainer.world.device
    trainer.meter.load_state_dict({name: value.to(device) for name, value in _group(checkpoint, "meter").items()})
    trainer.guard.in_a_row = Counter(state.skipped_in_a_row)
    trainer.guard.rewinds = state.rewinds
    trainer.step, trainer.offset, trainer.logged = checkpoint.step, state.offset, state.logged
    trainer.seconds.update(state.seconds)


def _group(checkpoint: Checkpoint, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A group of tensors, which has the names of `like`."""
    tensors = checkpoint.tensors.get(name)
    if tensors is None or (like is not None and tensors.keys() != like.keys()):
        raise DamagedFileError(f"{name}.safetensors", "the checkpoint belongs to another method or model")
    return tensors


def rewind(trainer: "Trainer", error: NonFiniteError) -> None:
    """Goes back to the last checkpoint and lets the data run on from behind the step that failed.

    Raises:
        NonFiniteError: the trainer keeps no checkpoints to go back to.
    """
    if trainer.checkpoints is None:
        raise error
    failed, rewinds = error.step + trainer.offset, trainer.guard.rewinds
    restore(trainer)
    for player in trainer.players.values():
        player.optimizer.zero_grad()  # the gradients that were not finite would be added to
    trainer.guard.rewinds = rewinds
    trainer.offset = failed + 1 - trainer.step
    warnings.warn(f"{error.message}; went back to step {trainer.step}, skipping that data", stacklevel=2)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, whole.

    Raises:
        TypeError: the module keeps state that is no tensor, which a checkpoint could not hold safely.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"'{name}' is a {type(value).__name__}: keep state of methods in tensors (buffers)")
    return {name: whole(value) for name, value in state.items()}


@torch.no_grad()
def load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies saved tensors into a module of the same structure.

    Raises:
        DamagedFileError: names or shapes differ: the checkpoint belongs to another method or model.
    """
    own = module.state_dict(keep_vars=True)
    if own.keys() != tensors.keys():
        name = sorted(own.keys() ^ tensors.keys())[0]
        raise DamagedFileError(name, "the checkpoint belongs to another method or model")
    for name, value in tensors.items():
        if own[name].shape != value.shape:
            raise DamagedFileError(name, f"shape {tuple(value.shape)} in the checkpoint, {tuple(own[name].shape)} here")
        own[name].copy_(sharded_like(value, own[name]))

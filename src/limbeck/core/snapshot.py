"""A trainer's state as a checkpoint, and back: everything that a bit-exact continuation needs, and nothing else."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from limbeck.core.checkpoint import Checkpoint
from limbeck.core.errors import DamagedFileError, NonFiniteError
from limbeck.core.optim import optimizer_tensors, restore_optimizer, sharded_like, whole

if TYPE_CHECKING:
    from limbeck.core.trainer import Trainer


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
    state = {
        "offset": trainer.offset,
        "skipped_in_a_row": trainer.guard.in_a_row,
        "rewinds": trainer.guard.rewinds,
        "seconds": dict(trainer.seconds),
    }
    if trainer.world.main:
        trainer.checkpoints.save(Checkpoint(trainer.step, tensors, state))
    trainer.world.barrier()


def restore(trainer: "Trainer") -> None:
    """Continues from the latest whole checkpoint, where there is one."""
    checkpoint = trainer.checkpoints.load() if trainer.checkpoints is not None else None
    if checkpoint is None:
        return
    load_module(trainer.method, checkpoint.tensors["method"])
    for name, player in trainer.players.items():
        restore_optimizer(player.module, player.optimizer, checkpoint.tensors[f"optimizer-{name}"])
    if trainer.average is not None:
        trainer.average.load_state_dict(checkpoint.tensors["average"])
    device = trainer.world.device
    trainer.meter.load_state_dict({name: value.to(device) for name, value in checkpoint.tensors["meter"].items()})
    trainer.guard.in_a_row = checkpoint.state["skipped_in_a_row"]
    trainer.guard.rewinds = checkpoint.state["rewinds"]
    trainer.step, trainer.offset = checkpoint.step, checkpoint.state["offset"]
    trainer.seconds.update(checkpoint.state["seconds"])


def rewind(trainer: "Trainer", error: NonFiniteError) -> None:
    """Goes back to the last checkpoint and lets the data run on from behind the step that failed.

    Raises:
        NonFiniteError: the trainer keeps no checkpoints to go back to.
    """
    if trainer.checkpoints is None:
        raise error
    reached, rewinds = trainer.step + trainer.offset, trainer.guard.rewinds
    restore(trainer)
    trainer.guard.rewinds = rewinds
    trainer.offset = reached + 1 - trainer.step
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

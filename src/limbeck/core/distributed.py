"""Processes and devices, through accelerate's state: what is summed, gathered and sharded across ranks.

Gradients are summed explicitly at each update instead of by hooks in the backward pass. That holds for any number of
forward passes, players and unused parameters; what it gives up is the overlap of communication with the backward pass.
"""

import copy
import os
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor, nn

_BUCKET_BYTES = 64 << 20


class World:
    """The processes that train together; with a single one every method is free of communication."""

    def __init__(self) -> None:
        state = process_state()
        self.rank, self.size, self.device = state.process_index, state.num_processes, state.device
        self.sharded = self.size > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every process."""
        if self.size > 1:
            torch.distributed.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums `.grad` over ranks, in large flat buckets; a parameter that no rank used keeps none."""
        if self.size == 1:
            return
        used = self.sum(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device))
        absent = [index for index, parameter in enumerate(parameters) if parameter.grad is None]
        for index in absent:
            parameters[index].grad = torch.zeros_like(parameters[index])
        if not self.sharded:  # FSDP has reduced its shards in the backward pass already
            for bucket in _buckets([parameter.grad for parameter in parameters]):
                flat = self.sum(torch.cat([gradient.flatten() for gradient in bucket]))
                parts = flat.split([gradient.numel() for gradient in bucket])
                torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])
        for index in absent:
            if not used[index]:
                parameters[index].grad = None

    def shard(self, player: nn.Module) -> None:
        """Splits a player's parameters over the ranks in place (FSDP2), block by block, when launched with FSDP."""
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in _blocks(player):
            fully_shard(block, mesh=mesh)
        fully_shard(player, mesh=mesh)

    def average_buffers(self, module: nn.Module) -> None:
        """Makes floating-point buffers (batch-norm statistics) the mean over ranks, so that saving one saves all.

        Modules with the attribute `kept_per_rank` hold what each rank met on its own, and are left alone.
        """
        if self.size == 1:
            return
        for part in module.modules():
            for buffer in () if getattr(part, "kept_per_rank", False) else part.buffers(recurse=False):
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer.clone()) / self.size)


@cache
def process_state() -> PartialState:
    """Accelerate's state of this process: rank, device, backend; made once."""
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return PartialState(cpu=cpu)


def blank_copy(module: nn.Module) -> nn.Module:
    """A copy without memory for its parameters, made before sharding and filled with whole tensors afterwards."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    return copied


def gather(tensor: Tensor) -> Tensor:
    """The items of all ranks, in rank order, with gradients that flow back to the rank they came from.

    For losses that couple the items of a batch. Every rank then computes the same loss over the global batch; the
    backward pass sums what the ranks ask of each item, which with the trainer's mean over ranks is the gradient of
    that one loss. Ranks must hold equally many items. Itself in a single process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(tensor.contiguous()))


def _buckets(gradients: Sequence[Tensor | None]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        assert gradient is not None
        size = gradient.numel() * gradient.element_size()
        if not buckets or room < size or buckets[-1][0].dtype != gradient.dtype:
            buckets.append([])
            room = _BUCKET_BYTES
        buckets[-1].append(gradient)
        room -= size
    return buckets


def _blocks(player: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, inner ones first: those its class names as indivisible, or the children of its
    module lists."""
    names = {name for module in player.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    if names:
        blocks = [module for module in player.modules() if type(module).__name__ in names]
    else:
        lists = [module for module in player.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        blocks = [child for parent in lists for child in parent if any(p.requires_grad for p in child.parameters())]
    return list(dict.fromkeys(reversed(blocks)))

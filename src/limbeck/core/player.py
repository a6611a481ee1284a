"""A player: one module that is optimised, with its optimizer, and how an accumulated gradient becomes a step."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limbeck.core.distributed import World
from limbeck.core.finite import FiniteGuard, Place
from limbeck.core.method import Update
from limbeck.core.optim import build_optimizer, learning_rate, whole
from limbeck.core.specs import OptimizerSpec


class Tally:
    """One update gathered over micro-batches: the weights of their means, and the weighted sums of their scalars."""

    def __init__(self) -> None:
        self.weight: Tensor | float = 0.0
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, update: Update) -> None:
        """Adds one micro-batch's update."""
        for name, value in {"loss": update.loss, **update.logs}.items():
            weighted = value.detach() * update.weight
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self.weight = self.weight + update.weight
        self.count += 1

    def reduce(self, world: World) -> tuple[Tensor, dict[str, Tensor]]:
        """The global weight, and every scalar's mean over all micro-batches and ranks; one collective call."""
        names = list(self._sums)
        device = self._sums["loss"].device
        weight = torch.as_tensor(self.weight, dtype=torch.float32, device=device)
        if world.size > 1:
            weight, *sums = world.sum(torch.stack([weight, *(self._sums[name].float() for name in names)]))
        else:
            sums = [self._sums[name] for name in names]
        # A weight of 0 (every token masked) leaves sums of 0; any positive divisor gives the mean 0.
        divisor = weight.clamp_min(torch.finfo(torch.float32).tiny)
        return weight, {name: value / divisor for name, value in zip(names, sums, strict=True)}


class Player:
    """What one optimizer moves.

    Args:
        name: its name in the method's updates.
        module: its parameters; those that require gradients are trained.
        spec: its optimizer and schedule.
    """

    def __init__(self, name: str, module: nn.Module, spec: OptimizerSpec) -> None:
        self.name, self.module, self.spec = name, module, spec
        self.optimizer = build_optimizer(name, module, spec)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def average_gradients(self, weight: Tensor, micro_batches: int, world: World) -> None:
        """Turns accumulated gradients of `loss · weight` into those of the mean over all items of all ranks."""
        if micro_batches == 1 and world.size == 1:
            return  # the loss went in unweighted
        world.sum_gradients(self.parameters)
        # FSDP has averaged over ranks in the backward pass where the rule asks for a sum.
        scale = (world.size if world.sharded else 1) / weight.clamp_min(torch.finfo(torch.float32).tiny)
        torch._foreach_mul_(self.gradients(), scale)

    def gradients(self) -> list[Tensor]:
        """The gradients that exist."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def apply(
        self, loss: Tensor, progress: tuple[int, int], clip: float | None, guard: FiniteGuard, place: Place
    ) -> tuple[Tensor, bool]:
        """Clips, checks and steps; returns the gradient's norm before clipping and whether the optimizer was called."""
        norm = whole(torch.nn.utils.get_total_norm(self.gradients()))
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, *progress)
        admitted = guard.admits(loss, norm, self.optimizer, place)
        if admitted:
            self.optimizer.step()
        return norm, admitted


def build_players(
    modules: Mapping[str, nn.Module], default: OptimizerSpec, own: Mapping[str, OptimizerSpec]
) -> dict[str, Player]:
    """The players of a method; one named in `own` has its own optimizer options."""
    return {name: Player(name, module, own.get(name, default)) for name, module in modules.items()}

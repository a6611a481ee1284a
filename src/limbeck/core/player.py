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
    """One update gathered over micro-batches: its scalars, and the weights that they are means over."""

    def __init__(self) -> None:
        self._scalars: list[dict[str, Tensor]] = []
        self._weights: list[Tensor | float] = []

    def add(self, update: Update) -> None:
        """Adds one micro-batch's update."""
        scalars = {"loss": update.loss, **update.logs}
        self._scalars.append({name: value.detach() for name, value in scalars.items()})
        self._weights.append(update.weight)

    def reduce(self, world: World) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The global weight, and every scalar's mean over all micro-batches and ranks; one collective call."""
        if len(self._scalars) == 1 and world.size == 1:
            return self._weights[0], self._scalars[0]  # the means themselves; no arithmetic on the common path
        first = self._scalars[0]
        device = first["loss"].device
        exact = torch.float32 if device.type == "mps" else torch.float64  # token counts outgrow float32's 24 bits
        weights = torch.stack([torch.as_tensor(weight, device=device).to(exact) for weight in self._weights])
        rows = [torch.stack([scalars[name].to(exact) for scalars in self._scalars]) for name in first]
        total, *sums = world.sum(torch.stack([weights.sum(), *((row * weights).sum() for row in rows)]))
        divisor = _positive(total)
        return total, {name: (value / divisor).to(first[name].dtype) for name, value in zip(first, sums, strict=True)}


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

    def average_gradients(self, weight: Tensor | float, world: World) -> None:
        """Turns accumulated gradients of `loss · weight` into those of the mean over all items of all ranks."""
        world.sum_gradients(self.parameters)
        # FSDP has averaged over ranks in the backward pass where the rule asks for a sum.
        torch._foreach_mul_(self.gradients(), (world.size if world.sharded else 1) / _positive(weight))

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
            group["lr"] = learning_rate(self.spec, *progress) * group["multiplier"]
        admitted = guard.admits(loss, norm, self.optimizer, place)
        if admitted:
            self.optimizer.step()
        return norm, admitted


def _positive(weight: Tensor | float) -> Tensor:
    """A weight to divide by: where it is 0 (every token masked) the sums are 0 too, and so shall be the mean."""
    return torch.as_tensor(weight).clamp_min(torch.finfo(torch.float32).tiny)


def build_players(
    modules: Mapping[str, nn.Module], default: OptimizerSpec, own: Mapping[str, OptimizerSpec]
) -> dict[str, Player]:
    """The players of a method; one named in `own` has its own optimizer options."""
    return {name: Player(name, module, own.get(name, default)) for name, module in modules.items()}

"""The guard before every optimizer step: a non-finite loss or gradient never reaches the weights."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import NonFiniteError

if TYPE_CHECKING:
    from limbeck.core.teacher import Teacher

Policy = Literal["raise", "skip", "rewind"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an update happened: the step, the player, and the `index` tensors of its micro-batches."""

    step: int
    player: str
    indices: tuple[Tensor, ...]

    def item_ids(self) -> list[int] | None:
        """Positions of the items in their data set, None where the batches do not say."""
        return torch.cat(self.indices).tolist() if self.indices else None


class Rewind(Exception):
    """Asks the trainer to go back to the last checkpoint and pass over the data that led here."""

    def __init__(self, error: NonFiniteError) -> None:
        super().__init__(str(error))
        self.error = error


class FiniteGuard:
    """Decides whether an optimizer may step, and what happens when it may not.

    On a CPU the host looks at every update. On an accelerator that would stall the pipeline at each step, so there the
    fused optimizer itself passes over a non-finite update (its `found_inf` flag stays on the device), and the host
    reads the collected flags in one transfer at `settle`, which the trainer calls whenever it logs or saves.

    Args:
        policy: "raise" stops; "skip" drops the update; "rewind" asks to go back to the last checkpoint.
        limit: skips in a row, or rewinds in all, after which the error is raised whatever the policy.
        deferred: leave the verdict on the device until `settle`.
    """

    def __init__(self, policy: Policy, limit: int, deferred: bool = False) -> None:
        self.policy, self.limit, self.deferred = policy, limit, deferred
        self.in_a_row: Counter[str] = Counter()  # by player: one that steps well does not excuse another
        self.rewinds = 0
        self._pending: list[tuple[Tensor, Tensor, Place]] = []

    def admits(
        self,
        loss: Tensor,
        gradient_norm: Tensor,
        optimizer: torch.optim.Optimizer,
        place: Place,
    ) -> bool:
        """Whether the host should call the optimizer; `loss` and `gradient_norm` are scalars."""
        if not (self.deferred and optimizer.defaults.get("fused")):
            return self._judge(math.isfinite(loss.item()), math.isfinite(gradient_norm.item()), place)
        finite = loss.isfinite() & gradient_norm.isfinite()
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._pending.append((loss.isfinite(), finite, place))
        return True

    def settle(self) -> None:
        """Judges the updates since the last call; a no-op on a CPU."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        verdicts = torch.stack([torch.stack([loss, finite]) for loss, finite, _ in pending]).tolist()
        for (loss_finite, finite), (_, _, place) in zip(verdicts, pending, strict=True):
            self._judge(loss_finite, finite, place)

    def _judge(self, loss_finite: bool, finite: bool, place: Place) -> bool:
        if loss_finite and finite:
            self.in_a_row[place.player] = 0
            return True
        where = "the gradient" if loss_finite else "the loss"
        error = NonFiniteError(place.step, place.player, where, place.item_ids())
        self.in_a_row[place.player] += 1
        if self.policy == "skip" and self.in_a_row[place.player] <= self.limit:
            warnings.warn(f"{error.message}; skipped that update", stacklevel=2)
            return False
        if self.policy == "rewind" and self.rewinds < self.limit:
            self.rewinds += 1
            raise Rewind(error)
        raise error


def trace(error: NonFiniteError, micro_batches: Sequence[Batch], teacher: "Teacher | None") -> NonFiniteError:
    """The error with what it comes from, where the data or the teacher are to blame; else as it is."""
    where = error.where
    if any(not _finite(batch) for batch in micro_batches):
        where = "the data of the batch"
    elif teacher is not None and not all(_finite(_ask(teacher, batch)) for batch in micro_batches):
        where = "the teacher's output"
    return NonFiniteError(error.step, error.player, where, error.items)


def _ask(teacher: "Teacher", batch: Batch) -> Any:
    return teacher.tokens(batch) if "input_ids" in batch else teacher.signal(batch)


def _finite(value: Any) -> bool:
    """Whether all tensors in a batch, or among the attributes of a teacher's signal, are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if is_dataclass(value):
        return all(_finite(getattr(value, part.name)) for part in fields(value))
    return all(map(_finite, value.values())) if isinstance(value, Mapping) else True

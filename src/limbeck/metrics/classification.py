"""How good a classifier is, and how much it behaves like its teacher."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.metrics.intervals import wilson
from limbeck.models.modes import device_of, evaluating

if TYPE_CHECKING:
    from limbeck.core.teacher import Teacher
    from limbeck.data.source import Source


def evaluate(
    model: nn.Module,
    source: "Source",
    *,
    teacher: "Teacher | nn.Module | None" = None,
    batch_size: int = 256,
    pause: Callable[[], Any] | None = None,
) -> dict[str, int | float]:
    """Measures a classifier on a source, without augmentation, in eval mode.

    Items without a label (-100) count for the comparison with the teacher only.

    Args:
        model: gives logits (items, classes) for a batch.
        source: what to measure on.
        teacher: whom to compare with.
        batch_size: items at a time.
        pause: called between batches; raises `Interrupted` when the run was asked to stop.

    Returns:
        `items`; for labelled items `accuracy` with its Wilson 95 % interval `accuracy_low` to `accuracy_high`,
        `cross_entropy` in nats and `calibration_error` (expected, 15 bins); with a teacher `agreement` (share of items
        with the same most probable class) and `teacher_kl` (KL of teacher to model in nats). Shares are in [0, 1].
    """
    device = device_of(model)
    if teacher is not None:
        teacher.to(device)
    totals, calibration = _Totals(), _calibration_error(source.classes, device)
    watched = [model, *([teacher] if isinstance(teacher, nn.Module) else [])]
    with evaluating(*watched):
        for batch in _batches(source, batch_size):
            if pause is not None:
                pause()
            batch = batch.to(device)
            logits = logits_of(call(model, batch)).float()
            totals.add_labelled(logits, batch["label"], calibration)
            if teacher is not None:
                totals.add_compared(logits, _logits_of_teacher(teacher, batch))
    return totals.summary(len(source), calibration)


class _Totals:
    """Sums over items, kept on the device so that no batch waits for a number."""

    def __init__(self) -> None:
        self.labelled = self.compared = 0
        self.correct = self.loss = self.agreeing = self.divergence = torch.zeros(())

    def add_labelled(self, logits: Tensor, labels: Tensor, calibration: Any) -> None:
        known = labels != -100
        logits, labels = logits[known], labels[known]
        if not len(labels):
            return
        self.labelled += len(labels)
        self.correct = self.correct.to(logits) + (logits.argmax(-1) == labels).sum()
        self.loss = self.loss.to(logits) + functional.cross_entropy(logits, labels, reduction="sum")
        calibration.update(logits.softmax(-1), labels)

    def add_compared(self, logits: Tensor, target: Tensor) -> None:
        self.compared += len(logits)
        self.agreeing = self.agreeing.to(logits) + (logits.argmax(-1) == target.argmax(-1)).sum()
        divergence = functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
        self.divergence = self.divergence.to(logits) + divergence

    def summary(self, items: int, calibration: Any) -> dict[str, int | float]:
        result: dict[str, int | float] = {"items": items}
        if self.labelled:
            correct = float(self.correct)
            low, high = wilson(correct, self.labelled)
            result |= {"accuracy": correct / self.labelled, "accuracy_low": low, "accuracy_high": high}
            result["cross_entropy"] = float(self.loss) / self.labelled
            result["calibration_error"] = float(calibration.compute())
        if self.compared:
            result["agreement"] = float(self.agreeing) / self.compared
            result["teacher_kl"] = max(0.0, float(self.divergence) / self.compared)  # rounding may leave -1e-9
        return result


def _batches(source: "Source", batch_size: int) -> Iterator[Batch]:
    return (source.fetch(rows) for rows in torch.arange(len(source)).split(batch_size))


def _logits_of_teacher(teacher: "Teacher | nn.Module", batch: Batch) -> Tensor:
    if isinstance(teacher, nn.Module):
        return logits_of(call(teacher, batch)).float()
    logits = teacher.signal(batch).logits
    assert logits is not None  # only a request for layers can end the pass before the head
    return logits.float()


def _calibration_error(classes: int, device: torch.device) -> Any:
    from torchmetrics.classification import MulticlassCalibrationError  # slow to import

    return MulticlassCalibrationError(num_classes=max(classes, 2), n_bins=15).to(device)

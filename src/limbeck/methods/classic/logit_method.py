"""Parent of the methods that match a teacher's logits."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Method, Update
from limbeck.core.options import OptionsBase


class LogitMethod(Method):
    """Cross-entropy with the labels plus a weighted objective on student and teacher logits.

    Subclasses give `objective`; unlabelled items (label -100) count in the objective and add nothing to the
    cross-entropy.
    """

    class Options(OptionsBase):
        """Weights of the two terms."""

        label_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the cross-entropy with the labels")
        weight: float = Field(1.0, ge=0, le=1e6, description="weight of the method's objective")

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        """What the method adds to the cross-entropy: a scalar, the mean over the batch."""
        raise NotImplementedError

    def schedule(self) -> float:
        """A factor on the objective that may depend on `self.clock`; 1 unless the paper warms up."""
        return 1.0

    def step(self, batch: Batch) -> Iterator[Update]:
        teacher_logits = self.teacher_logits(batch)
        student_logits = logits_of(call(self.student, batch))
        check_same_classes(student_logits, teacher_logits)
        labels_loss = label_cross_entropy(student_logits, batch)
        objective = self.objective(student_logits, teacher_logits, batch)
        loss = self.options.label_weight * labels_loss + self.options.weight * self.schedule() * objective
        yield Update("student", loss, batch.size, {"cross_entropy": labels_loss, "objective": objective})

    def teacher_logits(self, batch: Batch) -> Tensor:
        """The teacher's logits (items, classes), taken before the student runs so that their peaks do not add up."""
        assert self.teacher is not None
        logits = self.teacher.signal(batch).logits
        if logits is None:
            raise IncompatibleError("the teacher gives no logits", "use a teacher with a classification head")
        return logits


def check_same_classes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuses a pair of models that tell different numbers of classes apart.

    Raises:
        IncompatibleError: the logits (items, classes) differ in shape.
    """
    if student_logits.shape != teacher_logits.shape:
        raise IncompatibleError(
            f"the student has {student_logits.shape[-1]} classes and the teacher {teacher_logits.shape[-1]}",
            "take a teacher of the same classes, or a method that matches features (rkd, sp, crd)",
        )


def label_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy with the labels, summed over labelled items and divided by all items of the batch.

    Dividing by all keeps the loss linear in the items, so that accumulation and ranks do not change it.
    """
    if "label" not in batch:
        return logits.new_zeros(())
    return F.cross_entropy(logits.float(), batch["label"], ignore_index=-100, reduction="sum") / batch.size


def target_classes(batch: Batch, teacher_logits: Tensor) -> Tensor:
    """The class of each item (items,), for objectives that treat it apart: its label, the largest of a soft label
    (items, classes), or, where an item has none, the class that the teacher finds most likely.
    """
    guess = teacher_logits.argmax(1)
    if "label" not in batch:
        return guess
    label = batch["label"]
    return label.argmax(1) if label.ndim == 2 else torch.where(label >= 0, label, guess)


def warm_up(epoch: float, epochs: float) -> float:
    """A factor min(epoch / epochs, 1) that rises linearly from 0 over so many epochs; 1 throughout for 0 epochs."""
    return min(epoch / epochs, 1.0) if epochs else 1.0

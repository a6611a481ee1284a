"""Parent of the methods that match next-token distributions on given text."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.teacher import Teacher
from limbeck.language.predictions import Predictions, TokenReader, TokenSignal, kept_labels
from limbeck.objectives.divergences import divergence
from limbeck.objectives.fused_head import HeadLosses, RowMeasure, TopKTeacher, fused_head_losses
from limbeck.objectives.topk import TopKDivergence

TokenDivergence = Callable[[Tensor, Tensor, float], Tensor]
"""(student_logits, teacher_logits, temperature) -> one value a token."""


class WeightOptions(OptionsBase):
    """Weights of the two terms."""

    label_weight: float = Field(0.0, ge=0, le=1e6, description="weight of the cross-entropy with the text's tokens")
    weight: float = Field(1.0, ge=0, le=1e6, description="weight of the divergence")


class Terms(NamedTuple):
    """What a loss is made of: the weights of its two terms, and the temperature of the divergence."""

    weight: float = 1.0
    label_weight: float = 0.0
    temperature: float = 1.0


class TokenMethod(Method):
    """A divergence between teacher and student at every kept token, plus the cross-entropy with the text itself.

    Subclasses give `divergence`, and `topk_divergence` where a teacher known by its most probable tokens will do.
    Tokens that do not count are dropped before any head, and the full logits of neither side are ever held where the
    heads allow it. Every token weighs the same, whatever its sequence's length.
    """

    class Options(WeightOptions):
        """Weights of the two terms, and the temperature of the divergence."""

        temperature: float = Field(1.0, gt=0, le=1000, description="softens both distributions; no factor T² is added")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.read_student = TokenReader(student, data.example)

    def divergence(self) -> TokenDivergence:
        """What is measured between the two distributions of a token."""
        raise NotImplementedError

    def topk_divergence(self) -> TopKDivergence:
        """The same for a teacher known by its most probable tokens."""
        raise IncompatibleError(
            f"'{self.card.slug}' needs the teacher's whole distribution, not its most probable tokens",
            "take a live teacher, or cache dense logits or hidden states",
        )

    def step(self, batch: Batch) -> Iterator[Update]:
        yield self.match(batch)

    def match(self, batch: Batch) -> Update:
        """The update that one batch of text asks for."""
        assert self.teacher is not None
        teacher = self.teacher.tokens(batch)  # before the student runs, so that their peaks do not add up
        return self.update(self.read_student(batch), teacher, kept_labels(batch, self.read_student.shift))

    def terms(self) -> Terms:
        """Weights and temperature: the options of these names, and the usual values for those that a method lacks."""
        return Terms(**{name: getattr(self.options, name) for name in Terms._fields if hasattr(self.options, name)})

    def update(self, student: Predictions, teacher: TokenSignal, labels: Tensor) -> Update:
        """Weighted divergence and cross-entropy, the mean over the kept tokens."""
        measure = self.topk_divergence() if isinstance(teacher, TopKTeacher) else self.divergence()
        terms = self.terms()
        losses = token_losses(student, teacher, measure, labels, terms)
        parts = {"divergence": terms.weight, "cross_entropy": terms.label_weight}
        logs = {name: getattr(losses, name) for name, weight in parts.items() if weight}  # what was computed
        return Update("student", losses.total, len(labels), logs)


def token_losses(
    student: Predictions,
    teacher: RowMeasure,
    measure: TokenDivergence | TopKDivergence,
    labels: Tensor,
    terms: Terms,
) -> HeadLosses:
    """Weighted divergence and cross-entropy, the mean over tokens; fused with the head where it can be.

    Args:
        student: predictions at the tokens (tokens, …).
        teacher: the teacher's signal at the same tokens, or what else is to be compared there.
        measure: the divergence, called on the logits of a few tokens at a time.
        labels: (tokens,) ids of the text.
        terms: what is weighed how; what has weight 0 is not computed.
    """
    if student.hidden is not None:
        assert student.weight is not None
        return fused_head_losses(
            student.hidden,
            student.weight,
            teacher,
            measure,
            bias=student.bias,
            labels=labels,
            temperature=terms.temperature,
            soft_weight=terms.weight,
            hard_weight=terms.label_weight,
        )
    logits, count = student.logits(), max(1, len(labels))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    soft = hard = logits.new_zeros(())
    if terms.weight:
        rows = torch.arange(len(labels), device=logits.device)
        soft = teacher.compare(measure, logits, rows, terms.temperature).sum() / count
    if terms.label_weight:
        hard = nn.functional.cross_entropy(logits, labels, reduction="sum") / count
    return HeadLosses(terms.weight * soft + terms.label_weight * hard, soft.detach(), hard.detach())


def next_token_loss(student: Predictions, labels: Tensor) -> Tensor:
    """Cross-entropy in nats with the text's tokens (tokens,), the mean over them; no teacher takes part."""
    itself = student.as_teacher()  # stands in for a teacher that nobody asks
    return token_losses(student, itself, divergence("forward-kl"), labels, Terms(weight=0.0, label_weight=1.0)).total

"""DeiT's distillation through a token of its own (Touvron et al., 2020)."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.methods.classic.logit_method import LogitMethod, check_same_classes, label_cross_entropy
from limbeck.objectives.logits import deit_hard, kd


@register
class DeiT(LogitMethod):
    r"""A second head, on a distillation token, learns from the teacher while the class head learns from the labels.

    .. math:: L = (1 - \alpha)\,\mathrm{CE}(z_{cls}, y) + \alpha\,D(z_{dist}, z_t)

    with D the cross-entropy with the teacher's decision, :math:`\mathrm{CE}(z_{dist}, \arg\max z_t)` (hard), or
    :math:`T^2\,\mathrm{KL}(\sigma(z_t/T)\,\|\,\sigma(z_{dist}/T))` (soft). Without the token (option `token`) the class
    logits take both parts, for students of any kind.
    """

    card = Card(
        slug="deit",
        title="Training data-efficient image transformers & distillation through attention",
        arxiv="2012.12877",
        year=2020,
        family="classic",
        task="classification",
        needs=("teacher", "student"),
        use="For vision transformers with a distillation token, best taught by a convolutional network.",
        tiny={"token": False},  # the contract suite's student is a convolutional network
    )

    class Options(OptionsBase):
        """Which variant; defaults of the paper's best, hard distillation through the token."""

        variant: Literal["hard", "soft"] = Field(
            "hard", description="match the teacher's decision or its probabilities"
        )
        token: bool = Field(True, description="teach the distillation token; false: teach the class logits themselves")
        alpha: float = Field(0.5, ge=0, le=1, description="share of the distillation; the labels get the rest")
        temperature: float = Field(3.0, gt=0, le=1000, description="softens both distributions (soft only)")
        reduction: Literal["numel", "batchmean"] = Field(
            "numel", description="average over batch and classes as the original code does, or over the batch (soft)"
        )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        two_heads: Any = getattr(student, "set_distilled_training", None)  # timm's models return a pair only when told
        if self.options.token and two_heads is not None:
            two_heads(True)

    def step(self, batch: Batch) -> Iterator[Update]:
        teacher_logits = self.teacher_logits(batch)
        output = call(self.student, batch)
        class_logits, distilled = heads_of(output) if self.options.token else (logits_of(output),) * 2
        check_same_classes(distilled, teacher_logits)
        labels_loss = label_cross_entropy(class_logits, batch)
        objective = self.objective(distilled, teacher_logits, batch)
        loss = (1 - self.options.alpha) * labels_loss + self.options.alpha * objective
        yield Update("student", loss, batch.size, {"cross_entropy": labels_loss, "objective": objective})

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        if self.options.variant == "hard":
            return deit_hard(student_logits, teacher_logits)
        temperature, reduction = self.options.temperature, self.options.reduction
        return kd(student_logits, teacher_logits, temperature=temperature, reduction=reduction)


def heads_of(output: Any) -> tuple[Tensor, Tensor]:
    """Class logits and distillation logits (items, classes) of a student with a distillation token in train mode.

    It returns both as a pair (the shipped transformer, timm), or as `cls_logits` and `distillation_logits`
    (transformers' DeiT "with teacher").

    Raises:
        IncompatibleError: the output has no second head.
    """
    pair = output
    if not isinstance(output, tuple) or hasattr(output, "cls_logits"):
        pair = (getattr(output, "cls_logits", None), getattr(output, "distillation_logits", None))
    if len(pair) != 2 or not all(isinstance(part, Tensor) and part.ndim == 2 for part in pair):
        raise IncompatibleError(
            "the student returns no distillation logits beside its class logits",
            "use a student with a distillation token (vit with distilled: true, timm's deit_*_distilled_*), "
            "or set token: false",
        )
    return pair

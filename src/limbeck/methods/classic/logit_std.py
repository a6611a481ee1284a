"""Logit standardisation before distillation (Sun et al., 2024)."""

from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.logit_method import LogitMethod
from limbeck.objectives.logits import kd, standardise_logits


@register
class LogitStandardisation(LogitMethod):
    r"""Hinton's objective on logits of mean 0 and deviation 1, so that their size is the student's own affair.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,T^2\,\frac1B\sum_b
        \mathrm{KL}\big(\sigma(\hat z_t/T)\,\|\,\sigma(\hat z_s/T)\big),
        \qquad \hat z = \frac{z - \mathrm{mean}(z)}{\mathrm{std}(z) + \epsilon}

    Mean and deviation run over the classes of an item; the cross-entropy sees the logits as they are.
    """

    card = Card(
        slug="logit-std",
        title="Logit Standardization in Knowledge Distillation",
        arxiv="2403.01427",
        year=2024,
        family="classic",
        task="classification",
        needs=("teacher", "student"),
        use="When teacher and student differ so much in size that one temperature does not fit both.",
    )

    class Options(LogitMethod.Options):
        """Base temperature and weights; defaults of the CIFAR recipe."""

        label_weight: float = Field(0.1, ge=0, le=1e6, description="weight of the cross-entropy with the labels")
        weight: float = Field(9.0, ge=0, le=1e6, description="weight of the distillation term")
        temperature: float = Field(2.0, gt=0, le=1000, description="base temperature, in deviations of the logits")

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        student, teacher = standardise_logits(student_logits), standardise_logits(teacher_logits)
        return kd(student, teacher, temperature=self.options.temperature)

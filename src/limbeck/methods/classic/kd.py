"""Knowledge distillation with softened logits (Hinton et al., 2015)."""

from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.logit_method import LogitMethod
from limbeck.objectives.logits import kd


@register
class KnowledgeDistillation(LogitMethod):
    r"""The student matches the teacher's class probabilities at a raised temperature.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,T^2\,\frac1B\sum_b \mathrm{KL}\big(\sigma(z_t/T)\,\|\,\sigma(z_s/T)\big)

    The factor :math:`T^2` keeps the size of the gradient independent of the temperature.
    """

    card = Card(
        slug="kd",
        title="Distilling the Knowledge in a Neural Network",
        arxiv="1503.02531",
        year=2015,
        family="classic",
        task="classification",
        needs=("teacher", "student"),
        use="The default for classifiers of any architecture: nothing of the teacher but its logits is needed.",
    )

    class Options(LogitMethod.Options):
        """Temperature and weights; defaults of the CIFAR recipe."""

        label_weight: float = Field(0.1, ge=0, le=1e6, description="weight of the cross-entropy with the labels")
        weight: float = Field(0.9, ge=0, le=1e6, description="weight of the distillation term")
        temperature: float = Field(4.0, gt=0, le=1000, description="softens both distributions; 1 leaves them alone")

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return kd(student_logits, teacher_logits, temperature=self.options.temperature)

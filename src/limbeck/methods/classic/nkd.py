"""Normalised knowledge distillation (Yang et al., 2023)."""

from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.logit_method import LogitMethod, target_classes
from limbeck.objectives.target_class import nkd


@register
class NormalisedDistillation(LogitMethod):
    r"""A soft label for the target class, and soft labels for the others that are normalised to sum to one.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) - w\,\frac1B\sum_b \Bigl( p_{t,y} \log p_{s,y}
        + \gamma\,T^2 \sum_{c \ne y} q_{t,c} \log q_{s,c} \Bigr)

    with p the plain softmax and q the softmax of z / T over the classes other than y. Both parts are cross-entropies
    and do not fall to 0. An item without a label is split at the class that the teacher finds most likely.
    """

    card = Card(
        slug="nkd",
        title="From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels",
        arxiv="2303.13005",
        year=2023,
        family="classic",
        task="classification",
        needs=("teacher", "student", "labels"),
        use="An alternative to dkd without warm-up, tuned on ImageNet.",
    )

    class Options(LogitMethod.Options):
        """Weight and temperature of the other classes' part; defaults of the ImageNet recipe."""

        non_target_weight: float = Field(1.5, ge=0, le=1e6, description="gamma, weight of the other classes' part")
        temperature: float = Field(1.0, gt=0, le=1000, description="of the other classes' part only")

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return nkd(
            student_logits,
            teacher_logits,
            target_classes(batch, teacher_logits),
            temperature=self.options.temperature,
            non_target_weight=self.options.non_target_weight,
        )

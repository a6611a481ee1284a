"""Distillation from a stronger teacher by correlation (Huang et al., 2022)."""

from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.registry import register
from limbeck.methods.classic.logit_method import LogitMethod
from limbeck.objectives.logits import dist


@register
class CorrelationDistillation(LogitMethod):
    r"""Probabilities shall correlate with the teacher's rather than equal them: across classes and across the batch.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,T^2 \bigl(\beta\,(1 - \overline{\rho}_{rows})
        + \gamma\,(1 - \overline{\rho}_{columns})\bigr)

    with :math:`\rho` Pearson's correlation of :math:`\sigma(z / T)`. The columns run over the batch, which couples its
    items: ranks gather their logits, and gradient accumulation changes the loss.
    """

    card = Card(
        slug="dist",
        title="Knowledge Distillation from A Stronger Teacher",
        arxiv="2205.10536",
        year=2022,
        family="classic",
        task="classification",
        needs=("teacher", "student"),
        use="With a teacher so much stronger that its exact probabilities are out of the student's reach.",
        couples_batch=True,
    )

    class Options(LogitMethod.Options):
        """Temperature, and weights of the two correlations; defaults of the original code."""

        inter_weight: float = Field(1.0, ge=0, le=1e6, description="beta, weight of the correlation across classes")
        intra_weight: float = Field(1.0, ge=0, le=1e6, description="gamma, weight of the correlation across the batch")
        temperature: float = Field(1.0, gt=0, le=1000, description="softens both distributions; 1 leaves them alone")

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return dist(
            gather(student_logits),
            gather(teacher_logits),
            temperature=self.options.temperature,
            inter_weight=self.options.inter_weight,
            intra_weight=self.options.intra_weight,
        )

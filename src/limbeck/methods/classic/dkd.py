"""Decoupled knowledge distillation (Zhao et al., 2022)."""

from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.logit_method import LogitMethod, target_classes, warm_up
from limbeck.objectives.target_class import dkd


@register
class DecoupledDistillation(LogitMethod):
    r"""How likely the label is, and how the other classes are related, are matched with weights of their own.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,\min(e / e_0, 1)\,T^2\,\frac1B\sum_b
        \alpha\,\mathrm{KL}(b_t \,\|\, b_s) + \beta\,\mathrm{KL}(q_t \,\|\, q_s)

    with :math:`b = (p_y, 1 - p_y)`, q the softmax over the classes other than y, and e the epoch. In `kd` the second
    term is scaled by :math:`1 - p_{t,y}`, which silences it just where the teacher is sure. An item without a label is
    split at the class that the teacher finds most likely.
    """

    card = Card(
        slug="dkd",
        title="Decoupled Knowledge Distillation",
        arxiv="2203.08679",
        year=2022,
        family="classic",
        task="classification",
        needs=("teacher", "student", "labels"),
        use="With a confident teacher, whose few wrong probabilities would otherwise hardly count.",
    )

    class Options(LogitMethod.Options):
        """Weights of the two parts, temperature and warm-up; defaults of the CIFAR recipe."""

        target_weight: float = Field(1.0, ge=0, le=1e6, description="alpha, weight of the target class's part")
        non_target_weight: float = Field(8.0, ge=0, le=1e6, description="beta, weight of the other classes' part")
        temperature: float = Field(4.0, gt=0, le=1000, description="softens both distributions; 1 leaves them alone")
        warmup_epochs: float = Field(
            20.0, ge=0, le=1e6, description="epochs over which the objective's weight rises from 0; 0 for none"
        )

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return dkd(
            student_logits,
            teacher_logits,
            target_classes(batch, teacher_logits),
            temperature=self.options.temperature,
            target_weight=self.options.target_weight,
            non_target_weight=self.options.non_target_weight,
        )

    def schedule(self) -> float:
        return warm_up(self.clock.epoch, self.options.warmup_epochs)

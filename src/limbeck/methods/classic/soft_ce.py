"""Distillation with the teacher's probabilities as labels (Hinton et al., 2015, in the form of a cross-entropy)."""

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.kd import KnowledgeDistillation
from limbeck.objectives.logits import soft_cross_entropy


@register
class SoftCrossEntropy(KnowledgeDistillation):
    r"""The teacher's softened probabilities are the labels of a cross-entropy.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) - w\,T^2\,\frac1B\sum_{b,c} p_t \log p_s, \qquad p = \sigma(z / T)

    The gradient is that of `kd`; the value is larger by the teacher's entropy, so that it falls to that and not to 0.
    """

    card = Card(
        slug="soft-ce",
        title="Distilling the Knowledge in a Neural Network",
        arxiv="1503.02531",
        year=2015,
        family="classic",
        task="classification",
        needs=("teacher", "student"),
        use="Where losses are compared with papers that report a cross-entropy; it trains exactly like kd.",
    )

    def objective(self, student_logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
        return soft_cross_entropy(student_logits, teacher_logits, temperature=self.options.temperature)

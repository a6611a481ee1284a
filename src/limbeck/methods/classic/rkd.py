"""Relational knowledge distillation (Park et al., 2019)."""

from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, pooled
from limbeck.objectives.relations import rkd


@register
class RelationalDistillation(FeatureMethod):
    r"""Distances and angles between the items of a batch are matched, not the items' features themselves.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + \frac{w_d}{B^2} \sum_{ij} \ell(d^s_{ij}, d^t_{ij})
        + \frac{w_a}{B^3} \sum_{ijk} \ell(\cos^s_{ijk}, \cos^t_{ijk})

    with :math:`\ell` the smooth L1 loss, d in units of each side's mean distance, and the cosine of the angle that j
    and k span at i, on the pooled features of the last stage. It couples the items of a batch: ranks gather their
    features, and gradient accumulation changes the loss.
    """

    card = Card(
        slug="rkd",
        title="Relational Knowledge Distillation",
        arxiv="1904.05068",
        year=2019,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="For embeddings (metric learning), and between features of different dimension.",
        couples_batch=True,
    )

    class Options(FeatureMethod.Options):
        """Weights of distances and angles; defaults of the CIFAR recipe."""

        distance_weight: float = Field(25.0, ge=0, le=1e6, description="weight of the distances; 0 leaves them out")
        angle_weight: float = Field(50.0, ge=0, le=1e6, description="weight of the angles; 0 saves batch³ numbers")
        squared: bool = Field(False, description="compare squared distances")

    def default_layers(self, model: nn.Module) -> list[str]:
        return super().default_layers(model)[-1:]

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd(
            gather(pooled(student)),
            gather(pooled(teacher)),
            distance_weight=self.options.distance_weight,
            angle_weight=self.options.angle_weight,
            squared=self.options.squared,
        )

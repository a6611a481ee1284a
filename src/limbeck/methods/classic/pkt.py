"""Probabilistic knowledge transfer (Passalis and Tefas, 2018)."""

from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, pooled
from limbeck.objectives.relations import pkt


@register
class ProbabilisticTransfer(FeatureMethod):
    r"""For every item, the distribution of its likeness to the others in the batch is matched.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + \frac{w}{B^2} \sum_{ij} t_{ij} \log \frac{t_{ij}}{s_{ij}}

    with each row of s and t the cosine similarities of the pooled features of the last stage, moved to [0, 1] and
    divided by their sum. It couples the items of a batch: ranks gather their features, and gradient accumulation
    changes the loss.
    """

    card = Card(
        slug="pkt",
        title="Learning Deep Representations with Probabilistic Knowledge Transfer",
        arxiv="1803.10837",
        year=2018,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="For representations rather than classes, between features of different dimension.",
        couples_batch=True,
    )

    class Options(FeatureMethod.Options):
        """Weight; default of the CIFAR recipe."""

        weight: float = Field(30000.0, ge=0, le=1e6, description="weight of the objective, which is of order 1/batch²")

    def default_layers(self, model: nn.Module) -> list[str]:
        return super().default_layers(model)[-1:]

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        return pkt(gather(pooled(student)), gather(pooled(teacher)))

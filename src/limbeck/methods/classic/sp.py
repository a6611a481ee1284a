"""Similarity-preserving distillation (Tung and Mori, 2019)."""

from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod
from limbeck.objectives.relations import similarity_preserving


@register
class SimilarityPreserving(FeatureMethod):
    r"""Items that excite the teacher alike shall excite the student alike.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + \frac{w}{B^2}\,\|G_s - G_t\|_F^2

    with G the Gram matrix (items, items) of the last stage's flattened features, each row of unit length. It couples
    the items of a batch: ranks gather their features, and gradient accumulation changes the loss.
    """

    card = Card(
        slug="sp",
        title="Similarity-Preserving Knowledge Distillation",
        arxiv="1907.09682",
        year=2019,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="Between networks of any shape, since only similarities of items are compared; wants large batches.",
        couples_batch=True,
    )

    class Options(FeatureMethod.Options):
        """Weight; default of the CIFAR recipe."""

        weight: float = Field(3000.0, ge=0, le=1e6, description="weight of the objective")

    def default_layers(self, model: nn.Module) -> list[str]:
        return super().default_layers(model)[-1:]

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_preserving(gather(student.flatten(1)), gather(teacher.flatten(1)))

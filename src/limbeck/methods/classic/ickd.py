"""Inter-channel correlation (Liu et al., 2021)."""

from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, spatial
from limbeck.objectives.channels import ickd


@register
class InterChannelCorrelation(FeatureMethod):
    r"""Which channels fire together is matched within each item.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,\frac{1}{B C} \sum_b \|G_s - G_t\|_F^2

    with G the Gram matrix (channels, channels) of an item's map of the last stage, each row of unit length. Where the
    channel counts differ, a 1x1 convolution with batch norm brings the student's to the teacher's.
    """

    card = Card(
        slug="ickd",
        title="Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation",
        arxiv="2202.03680",
        year=2021,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="For convolutional pairs, also of different resolution.",
    )

    class Options(FeatureMethod.Options):
        """Weight; default of the CIFAR recipe."""

        weight: float = Field(2.5, ge=0, le=1e6, description="weight of the objective")

    def default_layers(self, model: nn.Module) -> list[str]:
        return super().default_layers(model)[-1:]

    def connector(self, layer: int, student: Tensor, teacher: Tensor) -> nn.Module | None:
        ours, theirs = spatial(student).shape[1], spatial(teacher).shape[1]
        if ours == theirs:
            return None
        return nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs))

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        maps = spatial(student)
        if str(layer) in self.connectors:
            maps = self.connectors[str(layer)](maps)
        return ickd(maps, spatial(teacher))

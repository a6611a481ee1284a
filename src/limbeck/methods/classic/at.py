"""Attention transfer (Zagoruyko and Komodakis, 2016)."""

from pydantic import Field
from torch import Tensor

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, spatial
from limbeck.objectives.features import attention_transfer


@register
class AttentionTransfer(FeatureMethod):
    r"""At each stage the student shall be active where the teacher is, whatever the channels.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w \sum_{stages} \mathrm{mean}\,(Q_s - Q_t)^2, \qquad
        Q = \mathrm{vec}(\overline{F^p}) / \|\mathrm{vec}(\overline{F^p})\|

    with the bar a mean over channels. Maps of different sizes are average-pooled to the smaller; tokens are laid out on
    their grid.
    """

    card = Card(
        slug="at",
        title="Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
        "Attention Transfer",
        arxiv="1612.03928",
        year=2016,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="For convolutional pairs of any widths; adds no parameters.",
    )

    class Options(FeatureMethod.Options):
        """Weight and power; defaults of the CIFAR recipe."""

        weight: float = Field(1000.0, ge=0, le=1e6, description="weight of the sum over stages")
        power: int = Field(2, ge=1, le=16, description="p, to which activations are raised; odd powers keep their sign")

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer(spatial(student), spatial(teacher), power=self.options.power)

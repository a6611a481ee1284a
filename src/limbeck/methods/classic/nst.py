"""Neuron selectivity transfer (Huang and Wang, 2017)."""

from pydantic import Field
from torch import Tensor

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, spatial
from limbeck.objectives.channels import nst


@register
class SelectivityTransfer(FeatureMethod):
    r"""At each stage the set of the student's channel maps shall look like the teacher's, in whatever order.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w \sum_{stages} k(s, s) + k(t, t) - 2\,k(s, t), \qquad
        k(a, b) = \mathrm{mean}_{b,i,j} \langle a_i, b_j \rangle^2

    the squared maximum mean discrepancy of channel maps of unit length. Maps of different sizes are average-pooled to
    the smaller; tokens are laid out on their grid.
    """

    card = Card(
        slug="nst",
        title="Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        arxiv="1707.01219",
        year=2017,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="For convolutional pairs of any widths; adds no parameters.",
    )

    class Options(FeatureMethod.Options):
        """Weight; default of the CIFAR recipe."""

        weight: float = Field(50.0, ge=0, le=1e6, description="weight of the sum over stages")

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        return nst(spatial(student), spatial(teacher))

"""Variational information distillation (Ahn et al., 2019)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, spatial
from limbeck.objectives.features import vid, vid_log_scale
from limbeck.objectives.operands import pool_to_smaller


@register
class VariationalInformation(FeatureMethod):
    r"""At each stage the student predicts the teacher's feature and says how sure it is, channel by channel.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w \sum_{stages} \mathrm{mean}\,\tfrac12
        \Bigl(\frac{(\mu(F_s) - F_t)^2}{v_c} + \log v_c\Bigr)

    a bound on the mutual information of the two. The prediction :math:`\mu`, three 1x1 convolutions, and the variances
    v learn with the student and are dropped at the end. Maps of different sizes are average-pooled to the smaller.
    """

    card = Card(
        slug="vid",
        title="Variational Information Distillation for Knowledge Transfer",
        arxiv="1904.05835",
        year=2019,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="Where some of the teacher's channels are out of the student's reach: their variance grows and they fade.",
    )

    class Options(FeatureMethod.Options):
        """Weight, and the variances at the start; defaults of the CIFAR recipe."""

        variance: float = Field(5.0, gt=1e-4, le=1e6, description="variance of each channel at the start")

    def connector(self, layer: int, student: Tensor, teacher: Tensor) -> nn.Module:
        return Prediction(_maps(student).shape[1], _maps(teacher).shape[1], self.options.variance)

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        predict = self.connectors[str(layer)]
        assert isinstance(predict, Prediction)
        maps, target = pool_to_smaller(_maps(student), _maps(teacher))
        return vid(predict(maps), target, predict.log_scale)


class Prediction(nn.Module):
    """The mean of a Gaussian of the teacher's map given the student's, and the log scale of its variances.

    Args:
        inputs: channels of the student's map.
        outputs: channels of the teacher's map.
        variance: variance of each channel at the start.
    """

    def __init__(self, inputs: int, outputs: int, variance: float) -> None:
        super().__init__()
        widths = [inputs, outputs, outputs, outputs]
        first, second, third = (nn.Conv2d(widths[i], widths[i + 1], 1, bias=False) for i in range(3))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.log_scale = nn.Parameter(torch.full((outputs,), vid_log_scale(variance)))

    def forward(self, maps: Tensor) -> Tensor:
        """The predicted map (items, outputs, height, width)."""
        return self.mean(maps)


def _maps(feature: Tensor) -> Tensor:
    """A feature as maps (items, channels, height, width); a vector is a map of one position."""
    return feature[:, :, None, None] if feature.ndim == 2 else spatial(feature)

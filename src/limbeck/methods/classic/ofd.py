"""A comprehensive overhaul of feature distillation (Heo et al., 2019)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.registry import register
from limbeck.core.teacher import LiveTeacher
from limbeck.methods.classic.feature_method import FeatureMethod, spatial
from limbeck.objectives.features import ofd_margin, partial_l2
from limbeck.objectives.operands import pool_to_smaller

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_SIDE_BRANCHES = {"downsample", "shortcut"}
"""Names of the residual blocks' second path, whose batch norm is not the one before the ReLU."""


@register
class FeatureOverhaul(FeatureMethod):
    r"""Features before the ReLU are matched, but not where both sides are inactive anyway.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w \sum_{i=1}^{n} \frac{1}{2^{n-i}}\,\frac1B
        \sum (r_i(F_s) - t)^2 \,[t > 0 \text{ or } r_i(F_s) > t], \qquad t = \max(F_t, m)

    with m, a channel's margin, the mean of its negative values as the teacher's batch norm predicts it, and r a 1x1
    convolution with batch norm that learns with the student and is dropped at the end. Tapped are the last batch norms
    of the stages; a teacher's layer that is none itself takes its margin from the last one within it.
    """

    card = Card(
        slug="ofd",
        title="A Comprehensive Overhaul of Feature Distillation",
        arxiv="1904.01866",
        year=2019,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="For a convolutional teacher with batch norm and ReLU.",
    )

    class Options(FeatureMethod.Options):
        """Weight; default of the paper."""

        weight: float = Field(1e-3, ge=0, le=1e6, description="weight of the sum over stages, itself a sum over maps")

    def default_layers(self, model: nn.Module) -> list[str]:
        return [_before_relu(model, stage) for stage in super().default_layers(model)]

    def connector(self, layer: int, student: Tensor, teacher: Tensor) -> nn.Module:
        self.register_buffer(f"margin_{layer}", self._margin(layer), persistent=False)  # the teacher's: not saved
        ours, theirs = spatial(student).shape[1], spatial(teacher).shape[1]
        convolution = nn.Conv2d(ours, theirs, 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(convolution, nn.BatchNorm2d(theirs))

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        connected = self.connectors[str(layer)](spatial(student))
        maps, target = pool_to_smaller(connected, spatial(teacher))
        earlier = len(self.student_layers) - 1 - layer  # each stage counts half as much as the next
        return partial_l2(maps, target, self.get_buffer(f"margin_{layer}")) / 2**earlier

    def _margin(self, layer: int) -> Tensor:
        """The margin (channels,) of a teacher's layer."""
        path = self.teacher_layers[layer]
        if not isinstance(self.teacher, LiveTeacher):
            raise IncompatibleError("margins are read from the teacher's weights", "use a single live teacher")
        norms = _norms_of(self.teacher.model, path)
        if not norms:
            raise IncompatibleError(
                f"the teacher's layer '{path}' holds no batch norm to read a margin from",
                "name the batch norms before its ReLUs in teacher_layers, or use fitnet",
            )
        norm = self.teacher.model.get_submodule(norms[-1])
        assert isinstance(norm, _NORMS)
        if not norm.affine:  # then the channel is about N(0, 1)
            return ofd_margin(torch.ones(norm.num_features), torch.zeros(norm.num_features))
        return ofd_margin(norm.weight, norm.bias)


def _before_relu(model: nn.Module, stage: str) -> str:
    """Where a stage's feature is tapped before its ReLU: its last batch norm, else its `norm`, else its output."""
    norms = _norms_of(model, stage)
    if norms:
        return norms[-1]
    return f"{stage}.norm" if hasattr(model.get_submodule(stage), "norm") else stage


def _norms_of(model: nn.Module, path: str) -> list[str]:
    """Paths of the batch norms at or below a path, in the model's order, without those of side branches."""
    below = model.get_submodule(path).named_modules()
    names = [name for name, module in below if isinstance(module, _NORMS)]
    return [f"{path}.{name}".rstrip(".") for name in names if not _SIDE_BRANCHES & set(name.split("."))]

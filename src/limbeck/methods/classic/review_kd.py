"""Knowledge review (Chen et al., 2021)."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, spatial
from limbeck.methods.classic.logit_method import warm_up
from limbeck.objectives.features import hierarchical_context_loss


@register
class KnowledgeReview(FeatureMethod):
    r"""Each stage of the teacher is reproduced from the student's stage and all deeper ones, fused step by step.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,\min(e / e_0, 1) \sum_{i=1}^{n+1} \mathrm{HCL}(R_i, F^i_t), \qquad
        R_i, H_i = \mathrm{ABF}_i(F^i_s, H_{i+1})

    with HCL squared errors at full resolution and on coarse average pools, ABF a fusion by attention (`Fusion`), and
    e the epoch. The pooled feature of the last stage is one more level, the deepest. The fusions learn with the student
    and are dropped at the end.
    """

    card = Card(
        slug="review-kd",
        title="Distilling Knowledge via Knowledge Review",
        arxiv="2104.09044",
        year=2021,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="The strongest of the feature baselines on convolutional pairs, at the price of the fusion modules.",
        tiny={"mid_channels": 8},
    )

    class Options(FeatureMethod.Options):
        """Weight, warm-up and width of the fusions; defaults of the CIFAR recipe."""

        mid_channels: int = Field(
            512, ge=1, le=65536, description="most channels within a fusion; the student's last stage may have fewer"
        )
        warmup_epochs: float = Field(
            20.0, ge=0, le=1e6, description="epochs over which the objective's weight rises from 0; 0 for none"
        )

    def connect(self, student_features: list[Tensor], teacher_features: list[Tensor]) -> None:
        inputs, outputs = ([level.shape[1] for level in levels(f)] for f in (student_features, teacher_features))
        width = min(self.options.mid_channels, inputs[-1])
        for level, channels in enumerate(zip(inputs, outputs, strict=True)):
            self.connectors[str(level)] = Fusion(*channels, width, deepest=level == len(inputs) - 1)

    def objective(self, student_features: list[Tensor], teacher_features: list[Tensor], batch: Batch) -> Tensor:
        total, hidden = student_features[0].new_zeros(()), None
        pairs = list(zip(levels(student_features), levels(teacher_features), strict=True))
        for level, (student, teacher) in reversed(list(enumerate(pairs))):
            fused, hidden = self.connectors[str(level)](student, hidden, teacher.shape[2:])
            total = total + hierarchical_context_loss(fused, teacher)
        return total

    def schedule(self) -> float:
        return warm_up(self.clock.epoch, self.options.warmup_epochs)


class Fusion(nn.Module):
    """Attention-based fusion: a student's map joined by what deeper levels found, brought to the teacher's shape.

    Args:
        inputs: channels of the student's map.
        outputs: channels of the teacher's map.
        width: channels of what is handed from level to level.
        deepest: there is no deeper level to fuse with.
    """

    def __init__(self, inputs: int, outputs: int, width: int, deepest: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(inputs, width, 1, bias=False)
        widen = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        for convolution in (narrow, widen):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.project = nn.Sequential(widen, nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The map for the teacher (items, outputs, *size), and what goes on to the level above (…, width, *size)."""
        hidden = self.reduce(maps)
        if self.attend is not None and deeper is not None:
            deeper = functional.interpolate(deeper, hidden.shape[2:])
            own, other = self.attend(torch.cat([hidden, deeper], 1)).chunk(2, 1)
            hidden = own * hidden + other * deeper
        if hidden.shape[2:] != size:
            hidden = functional.interpolate(hidden, size)
        return self.project(hidden), hidden


def levels(features: list[Tensor]) -> list[Tensor]:
    """The stages' maps, and the last one pooled to a single position."""
    maps = [spatial(feature) for feature in features]
    return [*maps, maps[-1].mean((2, 3), keepdim=True)]

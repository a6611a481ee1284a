"""FTD: trajectories that forgive a network for lagging behind them (Du et al., 2023)."""

import copy
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.method import DataInfo
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.methods.datasets.mtt import MTT


@register
class FTD(MTT):
    r"""MTT along flat trajectories, where starting a little off the expert's weights does not lead far astray.

    .. math:: L = \frac{\lVert \hat\theta_N - \theta^*_{t+M} \rVert^2}{\lVert \theta^*_t - \theta^*_{t+M} \rVert^2},
        \qquad \bar S \leftarrow d \bar S + (1 - d) S, \qquad
        \theta^* \text{ of } \min_\theta \max_{\lVert e \rVert \le \rho} L(\theta + e)

    At evaluation a network starts each stretch where the last one left it and not where the expert was; on flat ground
    such errors do not add up. The distillation is that of `mtt`. What differs are the experts, which take the steps of
    GSAM (`rho: 0.01`, `alpha: 0.4` in the options of the stage `experts`), and an average of the images,
    :math:`\bar S`, which is taken home. The raw images are the average at `decay` 0, and stay in the checkpoints.

    The published scripts train with rho 0.01, the code's default is 2; both in units of the weights (`adaptive`).
    """

    card = Card(
        slug="ftd",
        title="Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation",
        arxiv="2211.11004",
        year=2022,
        family="datasets",
        task="dataset",
        needs=("teacher", "student"),
        use="As mtt, where networks are to be trained for longer on the set than one segment.",
        tiny={"steps": 3, "segment": 1, "latest": 2, "chunk": 2, "batch_size": 8, "decay": 0.5},
    )

    class Options(MTT.Options):
        """The inner loop, the experts' segments and the average of the images."""

        decay: float = Field(0.9995, ge=0, lt=1, description="share d of the average that is kept at each step")

    average: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.register_buffer("average", self.set.images.detach().clone())

    @torch.no_grad()
    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        """Moves the average of the images."""
        self.average.lerp_(self.set.images, 1 - self.options.decay)

    def result(self) -> nn.Module:
        """A copy of the set with the averaged images."""
        made = copy.deepcopy(self.set)
        with torch.no_grad():
            made.images.copy_(self.average)
        return made

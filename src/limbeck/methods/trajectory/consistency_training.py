"""Consistency training (Song et al., 2023): the baseline that improved consistency training improves."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.diffusion.denoiser import Condition
from limbeck.diffusion.schedules import along
from limbeck.methods.trajectory.consistency_method import ConsistencyMethod, Weighting


@register
class ConsistencyTraining(ConsistencyMethod):
    r"""A network learns to give the same answer at two noise levels of one datum under one noise; no teacher.

    .. math:: L = \mathbb{E}\bigl[ \lambda(\sigma_i)\, d\bigl(f_\theta(x_0 + \sigma_{i+1} n, \sigma_{i+1}),\;
        f_{\theta^-}(x_0 + \sigma_i n, \sigma_i)\bigr) \bigr]

    where :math:`\theta^-` is a moving average of :math:`\theta`, whose decay rises with the number of noise levels,
    which grows with the square root of training. The paper's best metric, LPIPS, needs weights that torchmetrics
    downloads; the default here is the squared distance.
    """

    card = Card(
        slug="consistency-training",
        title="Consistency Models (trained in isolation)",
        arxiv="2303.01469",
        year=2023,
        family="trajectory",
        task="generation",
        needs=("student",),
        use="As a baseline; 'ict' does the same better.",
        tiny={"last_scales": 8},
    )

    class Options(ConsistencyMethod.Options):
        """Defaults of the paper on CIFAR-10, but for the metric."""

        curriculum: Literal["doubling", "root", "constant"] = Field(
            "root", description="how the number of noise levels grows from first_scales to last_scales"
        )
        first_scales: int = Field(2, ge=1, le=10**6, description="s0, intervals at the start")
        last_scales: int = Field(150, ge=1, le=10**6, description="s1, intervals at the end; all along if constant")
        interval_law: Literal["lognormal", "uniform"] = Field("uniform", description="which intervals are drawn")
        weighting: Weighting = Field("uniform", description="weight of each pair's distance")
        metric: Literal["pseudo-huber", "squared", "lpips"] = Field("squared", description="distance of answers")
        target: Literal["stop-gradient", "average"] = Field(
            "average", description="the student itself, or a moving average of it, answers at the nearer end"
        )

    def nearer(
        self, x_hi: Tensor, high: Tensor, low: Tensor, x0: Tensor, noise: Tensor, condition: Condition
    ) -> Tensor:
        return x0 + along(low, x0) * noise

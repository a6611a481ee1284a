"""Consistency distillation (Song et al., 2023): along the paths of a diffusion teacher."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.diffusion.denoiser import Condition, Denoiser, Transported
from limbeck.diffusion.schedules import EDM
from limbeck.diffusion.steps import euler_step, heun_step
from limbeck.methods.trajectory.consistency_method import ConsistencyMethod, Weighting


@register
class ConsistencyDistillation(ConsistencyMethod):
    r"""A network learns to give the same answer at both ends of a teacher's step along the probability-flow ODE.

    .. math:: L = \mathbb{E}\bigl[ \lambda(\sigma_i)\, d\bigl(f_\theta(x_{\sigma_{i+1}}, \sigma_{i+1}),\;
        f_{\theta^-}(\hat x_{\sigma_i}, \sigma_i)\bigr) \bigr], \qquad
        \hat x_{\sigma_i} = \mathrm{Heun}_\phi(x_{\sigma_{i+1}}, \sigma_{i+1} \to \sigma_i)

    where :math:`\theta^-` is a moving average of :math:`\theta`. The teacher may have any noise schedule: it is asked
    at equal signal-to-noise ratio. With guidance its steps are guided, and the student needs none. The paper's best
    metric, LPIPS, needs weights that torchmetrics downloads; the default here is the squared distance.
    """

    card = Card(
        slug="consistency-distillation",
        title="Consistency Models (distilled from a diffusion model)",
        arxiv="2303.01469",
        year=2023,
        family="trajectory",
        task="generation",
        needs=("teacher", "student"),
        use="One or two steps from any diffusion teacher, with little machinery.",
    )

    class Options(ConsistencyMethod.Options):
        """Defaults of the paper on CIFAR-10, but for the metric."""

        curriculum: Literal["doubling", "root", "constant"] = Field(
            "constant", description="how the number of noise levels grows from first_scales to last_scales"
        )
        last_scales: int = Field(17, ge=1, le=10**6, description="intervals; at the end, if their number grows")
        interval_law: Literal["lognormal", "uniform"] = Field("uniform", description="which intervals are drawn")
        weighting: Weighting = Field("uniform", description="weight of each pair's distance")
        metric: Literal["pseudo-huber", "squared", "lpips"] = Field("squared", description="distance of answers")
        target: Literal["stop-gradient", "average"] = Field(
            "average", description="the student itself, or a moving average of it, answers at the nearer end"
        )
        target_decay: float | None = Field(0.95, ge=0, lt=1, description="of the average")
        guidance: float = Field(1.0, ge=0, le=100, description="scale g of the teacher's steps")
        solver: Literal["heun", "euler"] = Field("heun", description="step of the teacher")

    @property
    def teacher_denoiser(self) -> Denoiser:
        return Transported(super().teacher_denoiser, EDM(self.options.sigma_min, self.options.sigma_max))

    def nearer(
        self, x_hi: Tensor, high: Tensor, low: Tensor, x0: Tensor, noise: Tensor, condition: Condition
    ) -> Tensor:
        here = self.ask(x_hi, high, condition, self.options.guidance)
        ahead = euler_step(here, low)
        if self.options.solver == "euler":
            return ahead
        return heun_step(here, self.ask(ahead, low, condition, self.options.guidance), low)

"""SIM (Luo et al., 2024): any distance between scores, its gradient taken through the frozen networks; with SiD."""

from collections.abc import Callable
from math import log, sqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition
from limbeck.diffusion.noise_levels import TimeLaw, draw_between, draw_times
from limbeck.diffusion.parameterisations import Preconditioned
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import Schedule, along
from limbeck.diffusion.score_distillation import (
    Weight,
    exponential_slope,
    identity_distillation,
    power_slope,
    pseudo_huber_slope,
    score_divergence,
    squared_slope,
    time_weight,
)
from limbeck.methods.distribution.distribution_method import DistributionMethod

_FIRST_NOISE = 2.5


@register
class SIM(DistributionMethod):
    r"""The student's samples are moved so that the scores of student and teacher agree, by any distance d of the two.

    .. math:: L(\theta) = -\mathbb{E}\, w(t)\, d'(\delta)^\top \bigl(D_\psi(x_t) - x\bigr), \qquad
        \delta = D_\psi(x_t) - D_\phi(x_t), \qquad d(\delta) = \sqrt{\lVert \delta \rVert^2 + c^2} - c

    with samples x of one step, teacher phi and a fake score psi that follows the samples and moves first, by EDM's
    loss. Its gradient is that of the divergence :math:`\mathbb{E}\, w\, d(\delta)` with the law of x_t held fixed,
    where psi is the student's true score. Only weights are frozen: gradients pass through the inputs of both networks,
    whose activations are kept, so a step takes about twice the memory of one of `dmd2` without a game. It needs no
    data: of a batch, labels or prompts and shapes alone count (but `inputs: data`).

    `distance: sid` is SiD (Zhou et al., 2024, arXiv 2404.04057), the squared distance at alpha 1 up to its divisor:

    .. math:: L(\theta) = \mathbb{E}\, \bigl\langle D_\phi - D_\psi,\; (D_\phi - x) - \alpha (D_\phi - D_\psi)
        \bigr\rangle \,/\, \overline{|x - D_\phi|}

    The published runs average the student with a half-life of 500,000 images: `train.ema` is 0.5^(batch size /
    500,000), 0.99965 at 256; their ramp at the start is left out. For their `nan_to_num` of gradients, see
    `train.non_finite: skip`. The paper's c and w(t) are not known to us: the defaults are a choice.
    """

    card = Card(
        slug="sim",
        title="One-Step Diffusion Distillation through Score Implicit Matching",
        arxiv="2410.16794",
        year=2024,
        family="distribution",
        task="generation",
        needs=("teacher", "student"),
        use="One step without data, where memory allows gradients through teacher and fake score.",
        tiny={"guidance": 2.0},
    )

    class Options(DistributionMethod.Options):
        """The distance, and where scores are compared; defaults are those of SiD's experiments."""

        distance: Literal["pseudo-huber", "squared", "power", "exponential", "sid"] = Field(
            "pseudo-huber", description="d, between the denoised samples of fake score and teacher"
        )
        c: float | None = Field(
            None,
            gt=0,
            le=1e6,
            description="of the pseudo-Huber distance (0.00054 sqrt(numbers an item) if absent), or size at which the "
            "exponential one, exp(|y|^2 / c^2) - 1, bends (sqrt(numbers an item) if absent)",
        )
        power: float = Field(1.0, ge=1, le=10, description="p of the distance |y|^p")
        alpha: float = Field(1.2, ge=-0.25, le=2, description="of SiD; 1 on Stable Diffusion and AFHQ")
        units: Literal["data", "score"] = Field(
            "data", description="d is of differences of denoised samples, or of scores: alpha / sigma^2 times these"
        )
        weight: Weight = Field("uniform", description="w(t) beside the distance")
        loss_scale: float = Field(100.0, gt=0, le=1e6, description="factor of the student's loss")
        input_time: float | None = Field(
            None, gt=0, le=1e6, description="time of the student's first input; where sigma / alpha is 2.5 if absent"
        )
        critic_updates: int = Field(1, ge=1, le=1000, description="updates of the fake score for one of the student")
        critic_time: TimeLaw | None = Field(
            None, description="law of its times; lognormal for preconditioned networks, uniform for others if absent"
        )
        critic_time_mean: float = Field(-1.2, ge=-20, le=20, description="mean of its normal laws")
        critic_time_std: float = Field(1.2, gt=0, le=20, description="deviation of its normal laws")
        time_low: float = Field(
            0.0, ge=0, lt=1, description="least share of the way to noise where scores are compared"
        )
        time_high: float = Field(0.8, gt=0, le=1, description="largest share of that way: tmax / 1000")

    critic_first: ClassVar[bool] = True

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if self.options.distance == "sid" and self.options.units == "score":
            raise IncompatibleError("SiD's divisor leaves no units", "set units: data")

    def usual_input_time(self, schedule: Schedule) -> float:
        log_snr = torch.tensor(-log(_FIRST_NOISE), dtype=torch.float64)
        time = float(schedule.time_of(log_snr).clamp(max=schedule.t_max))
        return float(round(time)) if schedule.clean < 0 else time

    def student_loss(
        self, x: Tensor, data: Tensor, condition: Condition, draws: ItemNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, _ = self.noised(x, draws)
        teacher, fake = self.scores_through(x_t, t, condition)
        matching = (self.weight_at(t, x) * self.divergence(x, t, teacher, fake)).mean()
        gap = (fake.x0 - teacher.x0).detach().square().flatten(1).mean(1).sqrt().mean()
        return self.options.loss_scale * matching, {"matching": matching, "gap": gap}

    def divergence(self, x: Tensor, t: Tensor, teacher: Prediction, fake: Prediction) -> Tensor:
        """The loss of each item (items,) before the weight of its time, a sum over its numbers."""
        options, slope = self.options, self.slope(x[0].numel())
        if options.distance == "sid":
            return identity_distillation(x, teacher, fake, options.alpha)
        if options.units == "data":
            return score_divergence(x, teacher, fake, slope)
        alpha, sigma = self.schedule.alpha(t.double()), self.schedule.sigma(t.double())
        unit = along(alpha / sigma.square(), x)
        return score_divergence(x, teacher, fake, lambda delta: unit * slope(unit * delta))

    def slope(self, numbers: int) -> Callable[[Tensor], Tensor]:
        """d' of the distance, for items of so many numbers."""
        options = self.options
        if options.distance == "pseudo-huber":
            return pseudo_huber_slope(options.c or 0.00054 * sqrt(numbers))
        if options.distance == "exponential":
            return exponential_slope(options.c or sqrt(numbers))
        return power_slope(options.power) if options.distance == "power" else squared_slope

    def weight_at(self, t: Tensor, x: Tensor) -> Tensor:
        """w(t) of each item (items,), in the precision of the loss."""
        return time_weight(self.options.weight, t, self.schedule).to(torch.promote_types(x.dtype, torch.float32))

    def noised(self, x: Tensor, draws: ItemNoise) -> tuple[Tensor, Tensor, Tensor]:
        options = self.options
        low, high = options.time_low, options.time_high
        shares = draws.uniform("matching time")
        t = draw_between(shares, self.schedule, low, high, points=None, rho=options.time_rho)
        noise = draws.normal("matching noise", x)
        return self.schedule.add_noise(x, noise, t), t, noise

    def noised_for_critic(self, x: Tensor, draws: ItemNoise) -> tuple[Tensor, Tensor, Tensor]:
        options = self.options
        is_edm = isinstance(self._critic_process.parameterisation, Preconditioned)
        law: TimeLaw = options.critic_time or ("lognormal" if is_edm else "uniform")
        shares = draws.uniform("critic time")
        t = draw_times(law, shares, self.schedule, options.critic_time_mean, options.critic_time_std)
        noise = draws.normal("critic noise", x)
        return self.schedule.add_noise(x, noise, t), t, noise

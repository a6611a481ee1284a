"""f-distill (Xu et al., 2025): distribution matching by any f-divergence, the ratio read off a discriminator."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.diffusion.schedules import Schedule
from limbeck.methods.distribution.dmd2 import DMD2
from limbeck.objectives.f_divergences import f_divergence

_TINY = 1e-6


@register
class FDistill(DMD2):
    r"""DMD2 whose direction is weighed by a function of the density ratio of teacher and student.

    .. math:: \nabla_\theta D_f(p_t \| q_t) = -\mathbb{E}\, h(r)\, \bigl(S_p(x_t) - S_q(x_t)\bigr)\, \alpha_t
        \frac{\partial x}{\partial \theta}, \qquad h(r) = f''(r)\, r^2, \quad r = \frac{p_t(x_t)}{q_t(x_t)} = e^{l(x_t)}

    where l is the logit of a discriminator trained on noised data and samples. The ratio is divided by its running
    mean at times alike, and h by its mean over the batch. Both couple the items of a batch: gradient accumulation makes
    these means those of micro-batches. Under guidance the ratio is still that of the unguided data.
    """

    card = Card(
        slug="f-distill",
        title="One-step Diffusion Models with f-Divergence Distribution Matching",
        arxiv="2502.15681",
        year=2025,
        family="distribution",
        task="generation",
        needs=("teacher", "student"),
        use="As dmd2, where a one-step student should cover more of the data's modes.",
        couples_batch=True,
        tiny={"critic_updates": 2},
    )

    class Options(DMD2.Options):
        """DMD2's, with the defaults of FastGen, and the weight."""

        divergence: Literal[
            "reverse-kl",
            "softened-reverse-kl",
            "jensen-shannon",
            "squared-hellinger",
            "forward-kl",
            "jeffreys",
            "neyman-chi2",
            "pearson-chi2",
        ] = Field("jensen-shannon", description="f, from the most mode-seeking to the most covering but the last two")
        ratio_low: float = Field(0.1, gt=0, le=1, description="least density ratio")
        ratio_high: float = Field(20.0, ge=1, le=1e4, description="largest density ratio")
        ratio_bins: int = Field(
            10, ge=0, le=10000, description="bins of time with means of their own; 0 leaves them out"
        )
        ratio_decay: float = Field(0.0, ge=0, lt=1, description="share of a bin's old mean that is kept; ImageNet: 0.5")
        critic_always: bool = Field(False, description="update the fake score in iterations of the student too")
        floor: float = Field(1e-6, ge=0, le=1, description="added to the normaliser of distribution matching")
        features: Literal["critic", "teacher", "own"] = Field(
            "teacher", description="whose features the discriminator sees: the frozen teacher's, the fake score's "
            "without training it, or those of a network of its own that starts as the fake score"
        )  # fmt: skip
        gan_shares_noise: bool = Field(True, description="the game sees samples as they are noised for the scores")

    separate: ClassVar[bool] = True

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if self.discriminator is None or not self.options.gan_shares_noise:
            raise IncompatibleError(
                "the density ratio is the discriminator's, at the noise of the scores",
                "set gan_weight above 0 and gan_shares_noise: true",
            )
        self.bins = TimeBins(self.options.ratio_bins, self.options.ratio_decay) if self.options.ratio_bins else None

    def ratio_weight(self, logits: Tensor, t: Tensor) -> Tensor:
        options = self.options
        ratio = density_ratio(logits, options.ratio_low, options.ratio_high)
        if self.bins is not None:
            self.bins.take_in(gather(ratio), gather(t), self.schedule)
            ratio = ratio / (self.bins.of(t, self.schedule) + _TINY)
        weight = f_divergence(options.divergence).weight(ratio)
        return weight / (gather(weight).mean() + _TINY)


def density_ratio(logits: Tensor, low: float, high: float) -> Tensor:
    """exp of the heads' mean logit (items, heads), clamped: teacher density over student density (items,)."""
    return logits.float().mean(1).clamp(-10, 10).exp().clamp(low, high)


class TimeBins(nn.Module):
    """A running mean of a ratio in each of equally wide bins of time; at first 1.

    Args:
        count: of bins.
        decay: share of the old mean that is kept.
    """

    means: Tensor

    def __init__(self, count: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.ones(count))

    @torch.no_grad()
    def take_in(self, ratio: Tensor, t: Tensor, schedule: Schedule) -> None:
        """Moves the means of the bins that hold some of the times (items,); others keep theirs."""
        place = self._place(t, schedule)
        ratio = ratio.to(self.means)
        count = torch.zeros_like(self.means).index_add(0, place, torch.ones_like(ratio))
        total = torch.zeros_like(self.means).index_add(0, place, ratio)
        moved = self.decay * self.means + (1 - self.decay) * total / count.clamp(min=1)
        self.means.copy_(torch.where(count > 0, moved, self.means))

    def of(self, t: Tensor, schedule: Schedule) -> Tensor:
        """The mean of each time's bin (items,)."""
        return self.means[self._place(t, schedule)]

    def _place(self, t: Tensor, schedule: Schedule) -> Tensor:
        width = (schedule.t_max - schedule.t_min) / len(self.means)
        return ((t - schedule.t_min) / width).floor().long().clamp(0, len(self.means) - 1)

"""Improved consistency training (Song and Dhariwal, 2024)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.card import Card
from limbeck.core.registry import register
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition
from limbeck.diffusion.noise_levels import draw_times
from limbeck.diffusion.schedules import along
from limbeck.methods.trajectory.consistency_method import ConsistencyMethod


@register
class ImprovedConsistencyTraining(ConsistencyMethod):
    r"""A one- or two-step generator straight from data, without a teacher, learned metrics or an averaged target.

    .. math:: L = \mathbb{E}\Bigl[ \frac{1}{\sigma_{i+1} - \sigma_i}\; d\bigl(f_\theta(x_0 + \sigma_{i+1} n,
        \sigma_{i+1}),\; \mathrm{sg}\, f_\theta(x_0 + \sigma_i n, \sigma_i)\bigr) \Bigr], \qquad
        d(a, b) = \sqrt{\lVert a - b \rVert^2 + c^2} - c

    with both ends under the same noise n and the same dropped units, intervals i from a discretised lognormal of the
    noise level, and a grid of levels that doubles in equally long stages from s0 to s1. Each of these can be switched
    back to what consistency training did. `pairing: continuous` draws levels without a grid, and a nearer end that
    approaches with each stage (easy consistency tuning).

    The paper trains with RAdam (`optimizer.name: radam`) at a constant rate and evaluates an average of the weights
    (`train.ema`). LPIPS needs weights that torchmetrics downloads.
    """

    card = Card(
        slug="ict",
        title="Improved Techniques for Training Consistency Models",
        arxiv="2310.14189",
        year=2023,
        family="trajectory",
        task="generation",
        needs=("student",),
        use="A one-step generator from data alone, where no diffusion teacher is at hand.",
        tiny={"first_scales": 4, "last_scales": 16},
    )

    class Options(ConsistencyMethod.Options):
        """Defaults of the paper on CIFAR-10."""

        pairing: Literal["grid", "continuous"] = Field(
            "grid", description="neighbouring levels of the grid, or any level with one below it"
        )

    def nearer(
        self, x_hi: Tensor, high: Tensor, low: Tensor, x0: Tensor, noise: Tensor, condition: Condition
    ) -> Tensor:
        return x0 + along(low, x0) * noise

    def pair_levels(self, draws: ItemNoise) -> tuple[Tensor, Tensor]:
        if self.options.pairing == "grid":
            return super().pair_levels(draws)
        options, schedule = self.options, self.denoiser.schedule
        chosen = draws.uniform("interval")
        high = draw_times("lognormal", chosen, schedule, options.interval_mean, options.interval_std)
        stage = ((self.scales() - 1) // options.first_scales).bit_length() - 1
        return continuous_nearer_level(high, stage).clamp(min=options.sigma_min), high


def continuous_nearer_level(high: Tensor, stage: int) -> Tensor:
    """The level below each (items,): t - t 2^-(stage + 1) (1 + 8 sigmoid(-t)), at least 1e-6 (Geng et al., 2024)."""
    gap = 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-high))
    return (high * (1 - gap)).clamp(min=1e-6)

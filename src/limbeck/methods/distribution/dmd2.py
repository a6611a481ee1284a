"""DMD2 (Yin et al., 2024): two scores, a game on real data, and a student that trains on its own rollouts."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.freezing import frozen
from limbeck.core.low_rank import trainable_copy
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition, Denoiser
from limbeck.diffusion.noise_levels import draw_between
from limbeck.diffusion.score_distillation import distribution_direction, inject_gradient
from limbeck.methods.distribution.collapse import CollapseMonitor, accuracy, spread
from limbeck.methods.distribution.discriminators import Discriminator, network_behind
from limbeck.methods.distribution.distribution_method import DistributionMethod
from limbeck.objectives.adversarial import approximate_r1, logistic_discriminator, logistic_generator, r1_penalty

Noised = tuple[Tensor, Tensor, Tensor]
"""Noised items (items, ...), their times (items,) and the noise."""


@register
class DMD2(DistributionMethod):
    r"""The student's samples move from where a network that follows them would denoise to, towards where the teacher
    would, and mislead a discriminator; that network and the discriminator move several times as often.

    .. math:: \nabla_\theta L = \mathbb{E}\, \frac{D_\psi(x_t) - D_\phi(x_t)}{\overline{|x - D_\phi(x_t)|}}
        \frac{\partial x}{\partial \theta} + \lambda_G \nabla_\theta\, \mathrm{softplus}(-f(x_{t'})), \qquad
        L_\psi = \lVert D_\psi(x_t) - x \rVert_w^2 + \lambda_D\, \bigl[\mathrm{softplus}(f(x_t)) +
        \mathrm{softplus}(-f(y_t))\bigr]

    with samples x, data y, teacher phi, fake score psi and discriminator f on psi's features. A LoRA student is asked
    for in the recipe (`student.adapter`); with `critic: low-rank` it shares the teacher's weights with the fake score.
    The published weight has a further factor alpha_t; the authors' code has none, and neither has this. Where they
    regress on 10,000 stored pairs before one-step SDXL, `warm_up` samples from the teacher anew.
    """

    card = Card(
        slug="dmd2",
        title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        arxiv="2405.14867",
        year=2024,
        family="distribution",
        task="generation",
        needs=("teacher", "student"),
        use="One to four steps at the teacher's quality or above it, with real data at hand.",
        tiny={"critic_updates": 2, "steps": 2, "guidance": 2.0},
    )

    class Options(DistributionMethod.Options):
        """The game; all else is the parent's."""

        matching_weight: float = Field(1.0, ge=0, le=1e6, description="weight of distribution matching")
        floor: float = Field(0.0, ge=0, le=1, description="added to its normaliser; FastGen: 1e-6")
        gan_weight: float = Field(3e-3, ge=0, le=1e6, description="lambda_G; at 0 there is no discriminator")
        discriminator_weight: float = Field(1e-2, ge=0, le=1e6, description="lambda_D, of its loss beside the critic's")
        features: Literal["critic", "teacher", "own"] = Field(
            "critic", description="whose features it sees: the fake score's, trained by it too; the frozen teacher's "
            "(FastGen); or those of a network of its own that starts as the fake score"
        )  # fmt: skip
        feature_layers: list[str] = Field([], description="module paths or globs of the features; the middle if empty")
        gan_time_high: float = Field(1.0, gt=0, le=1, description="largest share of the way to noise that it sees")
        gan_shares_noise: bool = Field(
            False, description="samples are shown to it as they are noised for the scores (FastGen), not anew"
        )
        real_shares_noise: bool = Field(False, description="data get the noise and time of the samples beside them")
        r1: Literal["approximate", "exact"] = Field(
            "approximate", description="penalty on its slope at data: by a finite difference (FastGen), or the gradient"
        )
        r1_weight: float = Field(
            0.0, ge=0, le=1e6, description="of the penalty; FastGen: 100 to 1000; gamma / 2 if exact"
        )
        r1_noise: float = Field(0.1, gt=0, le=10, description="deviation of the approximate penalty's noise")

    separate: ClassVar[bool] = False
    """Whether the discriminator is a player of its own."""

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.monitor = CollapseMonitor()
        self.judge: nn.Module | None = None
        self.discriminator: Discriminator | None = None
        if not self.options.gan_weight:
            return
        if self.options.features == "own":
            self.judge = trainable_copy(self.critic_source()[1])
        items, condition = self.read(data.example)
        times = draw_between(torch.full((len(items),), 0.5), self.schedule)
        self.discriminator = Discriminator(self.seen_through(), items, times, condition, self.options.feature_layers)

    def seen_through(self) -> Denoiser:
        """The denoiser whose features the discriminator sees."""
        if self.options.features == "teacher":
            return self.teacher_denoiser
        return self.fake if self.judge is None else self.like_critic(self.judge)

    def players(self) -> dict[str, nn.Module]:
        joined = [part for part in (self.discriminator, self.judge) if part is not None]
        if not joined:
            return super().players()
        if self.separate:
            return {**super().players(), "discriminator": nn.ModuleList(joined)}
        return {"student": self.student, "critic": nn.ModuleList([self.critic, *joined])}

    def student_loss(
        self, x: Tensor, data: Tensor, condition: Condition, draws: ItemNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        at = self.noised(x, draws)
        x_t, t, _ = at
        teacher, fake = self.scores(x_t.detach(), t, condition)
        logits = self.generator_logits(x, at, condition, draws)
        weight = None if logits is None else self.ratio_weight(logits.detach(), t)
        direction = distribution_direction(x.detach(), teacher, fake, weight, floor=self.options.floor)
        matching = inject_gradient(x, direction)
        loss, logs = self.options.matching_weight * matching, {"matching": matching, **spread(x, data)}
        if logits is not None:
            game = logistic_generator(logits)
            loss, logs = loss + self.options.gan_weight * game, {**logs, "game": game}
        return loss, logs

    def generator_logits(self, x: Tensor, at: Noised, condition: Condition, draws: ItemNoise) -> Tensor | None:
        """The discriminator's logits (items, heads) on the student's samples, with their graph; None without a game."""
        if self.discriminator is None:
            return None
        seen = self.seen_through()
        x_t, t, _ = at if self.options.gan_shares_noise else self.noised_for_game(x, draws, "generator game")
        with frozen(self.discriminator, network_behind(seen)):
            return self.discriminator(seen, x_t, t, condition)

    def ratio_weight(self, logits: Tensor, t: Tensor) -> Tensor | None:
        """A further weight an item (items,) on the difference of the scores; none here."""
        return None

    def noised_for_game(self, x: Tensor, draws: ItemNoise, key: str) -> Noised:
        """What the discriminator sees of items."""
        options = self.options
        t = draw_between(draws.uniform(f"{key} time"), self.schedule, 0.0, options.gan_time_high, rho=options.time_rho)
        noise = draws.normal(f"{key} noise", x)
        return self.schedule.add_noise(x, noise, t), t, noise

    def critic_updates(self, x: Tensor, data: Tensor, condition: Condition, draws: ItemNoise) -> Iterator[Update]:
        at = self.noised_for_critic(x, draws)
        denoising = self.critic_loss(x, at, condition)
        if self.discriminator is None or self.separate:
            yield Update("critic", denoising, len(x), {"denoising": denoising})
        if self.discriminator is None:
            return
        shown = at if self.options.gan_shares_noise else self.noised_for_game(x, draws, "fake game")
        game, logs = self.discriminator_loss(data, shown, condition, draws)
        if self.separate:
            yield Update("discriminator", game, len(x), logs)
        else:
            loss = denoising + self.options.discriminator_weight * game
            yield Update("critic", loss, len(x), {"denoising": denoising, **logs})

    def discriminator_loss(
        self, data: Tensor, shown: Noised, condition: Condition, draws: ItemNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logistic loss on noised samples and data with the penalty on its slope; and what to record."""
        options, (x_t, t, noise) = self.options, shown
        if options.real_shares_noise:
            y_t, t_real = self.schedule.add_noise(data, noise, t), t
        else:
            y_t, t_real, noise = self.noised_for_game(data, draws, "real game")
        parts = [(x_t, t), (y_t, t_real)]
        if options.r1_weight and options.r1 == "exact":
            y_t.requires_grad_()
        elif options.r1_weight:
            moved = data + options.r1_noise * draws.normal("r1", data)
            parts.append((self.schedule.add_noise(moved, noise, t_real), t_real))
        fake, real, *perturbed = self.judged(parts, condition)
        loss = game = logistic_discriminator(real, fake)
        if options.r1_weight:
            slope = approximate_r1(real, perturbed[0]) if perturbed else r1_penalty(real, y_t)
            loss = loss + options.r1_weight * slope
        return loss, {"game": game, "accuracy": accuracy(real, fake)}

    def judged(self, parts: list[tuple[Tensor, Tensor]], condition: Condition) -> tuple[Tensor, ...]:
        """Logits (items, heads) of each part (x_t, t), from one pass; through frozen features no graph is kept."""
        assert self.discriminator is not None
        seen, count = self.seen_through(), len(parts)
        x_t, t = (torch.cat(rows) for rows in zip(*parts, strict=True))
        together = {name: torch.cat([value] * count) for name, value in condition.items()}
        is_fixed = self.options.features == "teacher" or (self.separate and self.judge is None)
        with frozen(*[network_behind(seen)] if is_fixed else []):
            logits: Tensor = self.discriminator(seen, x_t, t, together)
        return logits.chunk(count)

    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        self.monitor.watch(logs, self.clock.step)

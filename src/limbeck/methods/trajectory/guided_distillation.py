"""Distillation of guided diffusion models: one network for all guidance scales, then few steps (Meng et al., 2023)."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition, Process
from limbeck.diffusion.guidance import Scale
from limbeck.diffusion.noise_levels import draw_times
from limbeck.diffusion.ports import takes_guidance
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.progressive import Jumps
from limbeck.diffusion.solvers import Model
from limbeck.methods.trajectory.halving_method import HalvingMethod, HalvingOptions


@register
class GuidedDistillation(HalvingMethod):
    r"""The student learns the teacher's guided prediction at every scale, told the scale, and then to take few steps.

    .. math:: L_1 = \mathbb{E}_{w, t, x_0, \epsilon}\; \omega(t)\, \bigl\| \hat x_\theta(z_t, t, c, w)
        - \bigl[(1 + w)\, \hat x_T(z_t, t, c) - w\, \hat x_T(z_t, t)\bigr] \bigr\|^2

    .. math:: L_2 = \mathbb{E}_{w, i, x_0, \epsilon}\; \omega(t)\, \bigl\| \hat x_\theta(z_t, t, c, w) - \tilde x
        \bigr\|^2, \qquad \tilde x = \frac{\sigma_t z_{t''} - \sigma_{t''} z_t}{\sigma_t \alpha_{t''} -
        \sigma_{t''} \alpha_t}

    with :math:`\omega = \max(\alpha^2/\sigma^2, 1)`. Options count g = 1 + w. Two DDIM steps of the teacher, which
    knows w too, lead to :math:`z_{t''}`. For the deterministic sampler they make one step of the student. For the
    stochastic one they are as long as two steps of its grid, but for the last, and noise brings samples back up by one.
    Encoders go from data to noise. The stages can be one training ("both") or two ("guidance", then "steps" with the
    first's result as teacher); "steps" also takes a teacher that is guided by two predictions. Where the range is a
    single scale, the student needs no input for it. What is said of learning rates and averages under
    progressive-distillation holds here.

    Editing with the result is in `limbeck.diffusion.editing`: `encode` and `restyle` with a distilled encoder, `edit`
    (SDEdit), `inpaint`. Inpainting networks that see mask and rest are distilled like any other, from batches that
    hold these as `channels`; none of our data does by itself.
    """

    card = Card(
        slug="guided-distillation",
        title="On Distillation of Guided Diffusion Models",
        arxiv="2210.03142",
        year=2022,
        family="trajectory",
        task="generation",
        needs=("teacher", "student"),
        use="To bring a guided diffusion model down to a few steps of one evaluation each, with the scale still free.",
        tiny={
            "start_steps": 2,
            "end_steps": 2,
            "initialise": "none",
            "guidance_share": 0.5,
            "guidance_min": 2.0,
            "guidance_max": 2.0,
        },
    )

    class Options(HalvingOptions):
        """Which stage, which scales, which sampler."""

        stage: Literal["both", "guidance", "steps"] = Field(
            "both", description="learn the guided prediction, halve the steps, or one after the other"
        )
        guidance_share: float = Field(0.25, gt=0, lt=1, description="share of training for the first stage of both")
        guidance_min: float = Field(1.0, ge=0, le=100, description="smallest scale g = 1 + w")
        guidance_max: float = Field(5.0, ge=0, le=100, description="largest scale g; SD-type models: 2 to 14")
        guidance: float | None = Field(
            None, ge=0, le=100, description="scale g that samples are drawn with; the middle of the range if absent"
        )
        sampler: Literal["deterministic", "stochastic"] = Field("deterministic", description="what the student is for")
        direction: Literal["decode", "encode"] = Field(
            "decode", description="from noise to data, or from data to noise, usually with g = 1 alone"
        )

        @model_validator(mode="after")
        def _agree(self) -> "GuidedDistillation.Options":
            if self.guidance_max < self.guidance_min:
                raise ValueError("guidance_max must not lie below guidance_min")
            if self.guidance is not None and not self.guidance_min <= self.guidance <= self.guidance_max:
                raise ValueError("guidance must lie between guidance_min and guidance_max")
            if self.direction == "encode" and self.sampler == "stochastic":
                raise ValueError("an encoder is deterministic")
            return self

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        theirs, (_, condition) = self.teacher_denoiser, self.read(data.example)
        if condition and not theirs.guidance_input and not self.options.guidance_max == self.options.guidance_min == 1:
            try:
                theirs.null(condition)
            except ValueError as error:
                raise IncompatibleError(
                    f"the teacher cannot be guided: {error}", "train it with condition_dropout above 0"
                ) from None

    def student_process(self, own: Process | None) -> Process:
        options = self.options
        if not takes_guidance(self.student) and options.guidance_min < options.guidance_max:
            raise IncompatibleError(
                "the student has no input for the guidance scale",
                "build it with one (guidance: true, time_cond_proj_dim), or set guidance_min and guidance_max alike",
            )
        return super().student_process(own)

    def phases(self) -> list[tuple[int, float]]:
        options, halving = self.options, super().phases()
        if options.stage == "steps":
            return halving
        if options.stage == "guidance":
            return [(0, 1.0)]
        first = options.guidance_share / (1 - options.guidance_share)
        return [(0, first * sum(length for _, length in halving)), *halving]

    def kind(self) -> Jumps:
        if self.options.direction == "encode":
            return "encode"
        return "stochastic" if self.options.sampler == "stochastic" else "deterministic"

    def scale(self, draws: ItemNoise) -> Scale:
        low, high = self.options.guidance_min, self.options.guidance_max
        return float(low) if low == high else low + (high - low) * draws.uniform("guidance")

    def sample_scale(self) -> float:
        options = self.options
        return float(
            (options.guidance_min + options.guidance_max) / 2 if options.guidance is None else options.guidance
        )

    def lesson(
        self, steps: int, teacher: Model, x0: Tensor, told: Condition, draws: ItemNoise
    ) -> tuple[Prediction, Tensor]:
        """As halving has it; where no steps are halved, the guided prediction at times drawn evenly."""
        if steps:
            return super().lesson(steps, teacher, x0, told, draws)
        denoiser = self.denoiser
        t = draw_times("uniform", draws.uniform("time"), denoiser.schedule)
        x_t = denoiser.schedule.add_noise(x0, draws.normal("noise", x0), t)
        with torch.no_grad():
            target = teacher(x_t, t).x0
        return denoiser(x_t, t, told), target

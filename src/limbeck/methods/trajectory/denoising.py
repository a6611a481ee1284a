"""Denoising score matching: how diffusion teachers are trained (Ho et al., 2020)."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.diffusion.denoiser import Process, Sampling, usual_time_scale
from limbeck.diffusion.noise_levels import TimeLaw, draw_times, truncated_snr
from limbeck.diffusion.parameterisations import Direct, Preconditioned
from limbeck.diffusion.predictions import from_data_and_noise
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, Schedule, TrigFlow, VPDiscrete, along
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod, without_condition

_SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "edm": EDM, "flow": FlowMatching, "trig": TrigFlow}


@register
class Denoising(DiffusionMethod):
    r"""A network learns to tell data from the noise added to it, at all noise levels; the baseline without a teacher.

    .. math:: L = \mathbb{E}_{x_0, \epsilon, t}\; w(t)\,
        \bigl\| \mathrm{pred}_\theta(\alpha_t x_0 + \sigma_t \epsilon, t, c) - \mathrm{target} \bigr\|^2

    where pred and target are of the kind that the network predicts (noise, data, v or velocity). The condition c is
    left out for a share of the items, so that the network can be guided.
    """

    card = Card(
        slug="denoising",
        title="Denoising Diffusion Probabilistic Models",
        arxiv="2006.11239",
        year=2020,
        family="trajectory",
        task="generation",
        needs=("student",),
        use="How diffusion teachers are made, and the many-step baseline of every few-step student.",
    )

    class Options(OptionsBase):
        """Process and loss."""

        schedule: Literal["cosine", "linear", "scaled-linear", "squared-cosine", "edm", "flow", "trig"] | None = Field(
            None, description="noise over time; the network's own if absent, cosine for a fresh network"
        )
        kind: Literal["eps", "x0", "v", "velocity"] = Field(
            "v", description="what a fresh network predicts, but for edm"
        )
        sigma_data: float = Field(0.5, gt=0, le=1000, description="deviation of the data, for edm")
        condition_dropout: float = Field(0.1, ge=0, le=1, description="share of items trained without their condition")
        time_law: TimeLaw = Field("uniform", description="which times are drawn")
        time_mean: float = Field(-1.2, ge=-100, le=100, description="of the lognormal and logit-normal laws")
        time_std: float = Field(1.2, gt=0, le=100, description="of the lognormal and logit-normal laws")
        weighting: Literal["prediction", "truncated-snr", "edm"] = Field(
            "prediction", description="error in what is predicted; max(SNR, 1) or EDM's weight times the error in x0"
        )
        guidance: float = Field(1.0, ge=0, le=100, description="scale g that samples are drawn with")
        steps: int = Field(50, ge=1, le=10000, description="steps that samples are drawn with")
        solver: Literal["ddim", "euler", "heun", "dpmpp_2m", "ancestral", "sde"] = Field(
            "ddim", description="its solver"
        )

    def student_process(self, own: Process | None) -> Process:
        options = self.options
        sampling = Sampling(options.solver, options.steps, options.guidance)
        if own is not None and options.schedule is None:
            return Process(own.schedule, own.parameterisation, sampling, own.null_label, own.guidance_input)
        name = options.schedule or "cosine"
        schedule = _SCHEDULES[name]() if name in _SCHEDULES else VPDiscrete.named(name)  # type: ignore[arg-type]  # the options allow its names
        if name == "edm":
            return Process(schedule, Preconditioned(options.sigma_data), sampling, self._null_label())
        direct = Direct(options.kind, usual_time_scale(self.student, schedule))
        return Process(schedule, direct, sampling, self._null_label())

    def _null_label(self) -> int | None:
        return self.data.classes or None

    def step(self, batch: Batch) -> Iterator[Update]:
        x0, condition = self.read(batch)
        denoiser, options = self.denoiser, self.options
        schedule = denoiser.schedule
        draws = self.draws(batch)
        condition = without_condition(denoiser, condition, options.condition_dropout, draws.uniform("condition"))
        t = draw_times(options.time_law, draws.uniform("time"), schedule, options.time_mean, options.time_std)
        noise = draws.normal("noise", x0)
        prediction = denoiser(schedule.add_noise(x0, noise, t), t, condition)
        if options.weighting == "prediction":
            target = from_data_and_noise(x0, noise, prediction.kind, t, schedule)
            loss = (prediction.value - target).square().mean()
        else:
            loss = (along(self._weight(t, schedule), x0) * (prediction.x0 - x0).square()).mean()
        yield Update("student", loss, batch.size)

    def _weight(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Weight of an error in x0 at times (items,)."""
        if self.options.weighting == "truncated-snr":
            return truncated_snr(t, schedule)
        ratio = torch.exp(2 * schedule.log_snr(t))  # alpha^2 / sigma^2
        made = self.denoiser.process.parameterisation
        return ratio + 1 / (made.sigma_data if isinstance(made, Preconditioned) else self.options.sigma_data) ** 2

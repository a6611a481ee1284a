"""Parent of the methods that make a network give the same answer along a path from noise to data."""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import repeating, stream_state
from limbeck.core.target import follow, frozen_copy
from limbeck.core.teacher import Teacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.consistency import (
    doubling_scales,
    lognormal_interval_weights,
    pseudo_huber,
    root_scales,
    squared_distance,
)
from limbeck.diffusion.denoiser import Condition, NetworkDenoiser, Process, Sampling
from limbeck.diffusion.grids import karras_times
from limbeck.diffusion.parameterisations import Preconditioned
from limbeck.diffusion.schedules import EDM
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod, without_condition
from limbeck.methods.trajectory.perceptual import lpips

Weighting = Literal[
    "uniform",
    "karras",
    "inverse-gap",
    "inverse-root-gap",
    "inverse-c-out",
    "inverse-c-out-squared",
    "inverse-sigma-squared",
]


class ConsistencyMethod(DiffusionMethod):
    """f(x_hi, s_hi) is drawn to f(x_lo, s_lo) on two neighbouring noise levels of one path, in EDM's schedule.

    Subclasses give the pair's nearer end in `nearer`, from the data or from a teacher.
    """

    class Options(OptionsBase):
        """Noise levels, distance, weights and target."""

        sigma_data: float = Field(0.5, gt=0, le=1000, description="deviation of the data")
        sigma_min: float = Field(0.002, gt=0, le=10, description="noise at which the function is the identity")
        sigma_max: float = Field(80.0, gt=0, le=1e6, description="noise that sampling starts from")
        rho: float = Field(7.0, ge=1, le=100, description="bend of the grid of noise levels")
        curriculum: Literal["doubling", "root", "constant"] = Field(
            "doubling", description="how the number of noise levels grows from first_scales to last_scales"
        )
        first_scales: int = Field(10, ge=1, le=10**6, description="s0, intervals at the start")
        last_scales: int = Field(1280, ge=1, le=10**6, description="s1, intervals at the end; all along if constant")
        interval_law: Literal["lognormal", "uniform"] = Field("lognormal", description="which intervals are drawn")
        interval_mean: float = Field(-1.1, ge=-100, le=100, description="of log sigma, lognormal")
        interval_std: float = Field(2.0, gt=0, le=100, description="of log sigma, lognormal")
        weighting: Weighting = Field("inverse-gap", description="weight of each pair's distance")
        metric: Literal["pseudo-huber", "squared", "lpips"] = Field("pseudo-huber", description="distance of answers")
        huber_c: float | None = Field(
            None, gt=0, le=1000, description="c of the pseudo-Huber distance; 0.00054 sqrt(numbers an item) if absent"
        )
        target: Literal["stop-gradient", "average"] = Field(
            "stop-gradient", description="the student itself, or a moving average of it, answers at the nearer end"
        )
        target_decay: float | None = Field(
            None, ge=0, lt=1, description="of the average; exp(s0 log 0.9 / levels) if absent, as in consistency models"
        )
        condition_dropout: float = Field(0.0, ge=0, le=1, description="share of items trained without their condition")
        middle_sigma: float = Field(0.821, gt=0, le=1e6, description="noise level of the second of two sampling steps")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.target = frozen_copy(student) if self.options.target == "average" else None

    def student_process(self, own: Process | None) -> Process:
        options = self.options
        known = own.parameterisation if own is not None else None
        noise = known.noise if isinstance(known, Preconditioned) else "quarter-log"
        made = Preconditioned(options.sigma_data, boundary=True, noise=noise)
        null = own.null_label if own is not None else self.data.classes or None
        sampling = Sampling("consistency", 1, middle=options.middle_sigma)
        return Process(EDM(options.sigma_min, options.sigma_max), made, sampling, null)

    def nearer(
        self, x_hi: Tensor, high: Tensor, low: Tensor, x0: Tensor, noise: Tensor, condition: Condition
    ) -> Tensor:
        """The pair's end at the smaller noise (items, ...), on the path through x_hi; no graph is recorded."""
        raise NotImplementedError

    def step(self, batch: Batch) -> Iterator[Update]:
        x0, condition = self.read(batch)
        draws, denoiser = self.draws(batch), self.denoiser
        condition = without_condition(denoiser, condition, self.options.condition_dropout, draws.uniform("condition"))
        low, high = self.pair_levels(draws)
        noise = draws.normal("noise", x0)
        x_hi = denoiser.schedule.add_noise(x0, noise, high)
        state = stream_state(x0.device)
        with torch.no_grad():  # before the student runs: its graph must not lie in memory beside theirs
            x_lo = self.nearer(x_hi, high, low, x0, noise, condition)
            target = self.answering()(x_lo, low, condition).x0
        # The same units must be dropped at both ends, or the noise of dropout is all that is learned.
        with repeating(state, x0.device):
            online = denoiser(x_hi, high, condition).x0
        loss = (self.weight(low, high).to(online.dtype) * self.distance(online, target)).mean()
        yield Update("student", loss, batch.size, {"levels": loss.new_tensor(float(self.scales()))})

    def answering(self) -> NetworkDenoiser:
        """Who answers at the nearer end."""
        return self.denoiser if self.target is None else NetworkDenoiser(self.target, self.denoiser.process)

    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        if self.target is not None:
            follow(self.target, self.student, self.decay())

    def decay(self) -> float:
        """Share of the target's old weights that is kept."""
        if self.options.target_decay is not None:
            return self.options.target_decay
        return math.exp(self.options.first_scales * math.log(0.9) / self.scales())

    def scales(self) -> int:
        """Noise levels now."""
        options, step, steps = self.options, self.clock.step, self.clock.steps
        if options.curriculum == "constant":
            return options.last_scales + 1
        growth = doubling_scales if options.curriculum == "doubling" else root_scales
        return growth(step, steps, options.first_scales, options.last_scales)

    def pair_levels(self, draws: ItemNoise) -> tuple[Tensor, Tensor]:
        """Neighbouring noise levels (low, high) of each item, float64."""
        options = self.options
        grid = karras_times(self.scales(), options.sigma_min, options.sigma_max, options.rho, rising=True)
        chances = torch.full((len(grid) - 1,), 1 / (len(grid) - 1), dtype=torch.float64)
        if options.interval_law == "lognormal":
            chances = lognormal_interval_weights(grid, options.interval_mean, options.interval_std)
        chosen = draws.uniform("interval")
        edges = chances.cumsum(0)[:-1].to(chosen.device)
        place, grid = torch.searchsorted(edges, chosen.double(), right=True), grid.to(chosen.device)
        return grid[place], grid[place + 1]

    def distance(self, online: Tensor, target: Tensor) -> Tensor:
        """Distance of answers (items,)."""
        if self.options.metric == "pseudo-huber":
            return pseudo_huber(online, target, self.options.huber_c)
        if self.options.metric == "squared":
            return squared_distance(online, target)
        return lpips(online, target)

    def weight(self, low: Tensor, high: Tensor) -> Tensor:
        """Weight of each pair's distance (items,)."""
        data = self.options.sigma_data
        c_out = data * high * (high.square() + data**2).rsqrt()
        return {
            "uniform": torch.ones_like(high),
            "karras": high**-2 + data**-2,
            "inverse-gap": 1 / (high - low),
            "inverse-root-gap": (high - low).rsqrt(),
            "inverse-c-out": 1 / c_out,
            "inverse-c-out-squared": 1 / c_out.square(),
            "inverse-sigma-squared": 1 / high.square(),
        }[self.options.weighting]

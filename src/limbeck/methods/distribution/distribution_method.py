"""Parent of the methods that match distributions: a student that makes samples, and a fake score that follows them."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.freezing import frozen
from limbeck.core.low_rank import LowRankNetwork, trainable_copy
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import generator
from limbeck.core.teacher import Teacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition, Denoiser, NetworkDenoiser, Process, Sampling, Transported, process_of
from limbeck.diffusion.generation import generate, guided_model
from limbeck.diffusion.noise_levels import draw_between
from limbeck.diffusion.parameterisations import Preconditioned
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.rollouts import backward_simulation, student_times
from limbeck.diffusion.schedules import EDM, Schedule
from limbeck.diffusion.score_distillation import FakeLoss, denoising_error
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod


class DistributionMethod(DiffusionMethod):
    """A student of one or a few steps, the fake score `critic`, and whose turn it is (the two time-scale rule).

    Noise is added in the teacher's schedule. The critic is a network that starts as a copy of the teacher, or of the
    student where the teacher is no network. Subclasses give the student's loss in `student_loss`, and may add to the
    critic's in `critic_updates`.
    """

    class Options(OptionsBase):
        """Student, teacher, fake score and noise levels."""

        steps: int = Field(1, ge=1, le=1000, description="N, steps that the student samples in")
        input_time: float | None = Field(
            None,
            gt=0,
            le=1e6,
            description="time of the student's first input, pure noise; the schedule's last if absent (one-step SDXL: "
            "399; EDM: its noise level, 80 or 2.5)",
        )
        inputs: Literal["simulated", "data"] = Field(
            "simulated", description="later steps are trained on the student's own rollout, or on noised data"
        )
        guidance: float = Field(
            1.0, ge=0, le=100, description="scale g of the teacher; 1 is its conditional prediction"
        )
        critic: Literal["copy", "low-rank"] = Field(
            "copy", description="fake score: a whole network, or additions to the teacher's frozen weights"
        )
        critic_source: Literal["teacher", "student"] | None = Field(
            None, description="what the fake score starts from; the teacher where it is a network if absent"
        )
        critic_rank: int = Field(64, ge=1, le=65536, description="of a low-rank fake score")
        critic_alpha: float | None = Field(None, gt=0, le=1e6, description="of a low-rank fake score; rank if absent")
        critic_layers: list[str] | None = Field(None, description="of a low-rank fake score; all if absent")
        critic_loss: FakeLoss | None = Field(
            None, description="its error; edm for preconditioned networks, of what is predicted for others if absent"
        )
        critic_updates: int = Field(5, ge=1, le=1000, description="r, updates of the fake score for one of the student")
        critic_always: bool = Field(True, description="update the fake score in iterations of the student too")
        time_low: float = Field(
            0.02, ge=0, lt=1, description="least share of the way to noise where scores are compared"
        )
        time_high: float = Field(0.98, gt=0, le=1, description="largest share of that way")
        time_rho: float = Field(7.0, ge=1, le=1000, description="bend of EDM's grid; 1000 is geometric")
        warm_up: int = Field(
            0, ge=0, le=10**7, description="first steps, in which the student regresses on the teacher's own samples"
        )

    critic_first: ClassVar[bool] = False
    """Whether the critic moves before the student where both move in an iteration."""

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if self.options.time_low >= self.options.time_high:
            raise IncompatibleError("time_low is not below time_high", "exchange them")
        self._critic_process, source = self.critic_source()
        own, schedule = self._critic_process.schedule, self.schedule
        both_edm = isinstance(own, EDM) and isinstance(schedule, EDM)  # their ranges make no difference
        self._same_schedule = both_edm or own is schedule or own.config() == schedule.config()
        self.critic: nn.Module = trainable_copy(source) if self.options.critic == "copy" else self._low_rank(source)

    def student_process(self, own: Process | None) -> Process:
        known, options = super().student_process(own), self.options
        first = options.input_time or self.usual_input_time(known.schedule)
        if not known.schedule.t_min < first <= known.schedule.t_max:
            raise IncompatibleError(f"input_time {first} is no time of the student's schedule")
        times = tuple(map(float, student_times(known.schedule, options.steps, first)))
        # Of EDM's schedules, the one whose last noise is the student's first input: samplers start there.
        schedule = EDM(known.schedule.t_min, first) if isinstance(known.schedule, EDM) else known.schedule
        return replace(known, schedule=schedule, sampling=Sampling("consistency", options.steps, 1.0, times))

    def usual_input_time(self, schedule: Schedule) -> float:
        """Time of the student's first input where no option says it."""
        return schedule.t_max

    @property
    def schedule(self) -> Schedule:
        """The teacher's: where noise is added and scores are compared."""
        return self.teacher_denoiser.schedule

    @property
    def fake(self) -> Denoiser:
        """The fake score as a denoiser in the teacher's schedule."""
        return self.like_critic(self.critic_network)

    def like_critic(self, network: nn.Module) -> Denoiser:
        """A network that denoises as the fake score does, in the teacher's schedule."""
        asked = NetworkDenoiser(network, self._critic_process)
        return asked if self._same_schedule else Transported(asked, self.schedule)

    @property
    def critic_network(self) -> nn.Module:
        """The network of the fake score."""
        return self.critic.network if isinstance(self.critic, LowRankNetwork) else self.critic

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student, "critic": self.critic}

    def step(self, batch: Batch) -> Iterator[Update]:
        data, condition = self.read(batch)
        draws = self.draws(batch)
        if self.clock.step < self.options.warm_up:
            yield Update("student", self.warm_up_loss(data, condition, draws), batch.size)
            return
        is_turn = self.is_student_turn()
        with nullcontext() if is_turn else torch.no_grad():
            x = self.samples(data, condition, draws)
        moves = [self.student_updates(x, data, condition, draws)] if is_turn else []
        if not is_turn or self.options.critic_always:
            moves.append(self.critic_updates(x.detach(), data, condition, draws))
        for move in reversed(moves) if self.critic_first else moves:
            yield from move

    def is_student_turn(self) -> bool:
        """Whether the student moves in this iteration: in every r-th."""
        return (self.clock.step - self.options.warm_up) % self.options.critic_updates == 0

    def student_updates(self, x: Tensor, data: Tensor, condition: Condition, draws: ItemNoise) -> Iterator[Update]:
        """The student's update on its samples x."""
        loss, logs = self.student_loss(x, data, condition, draws)
        yield Update("student", loss, len(x), logs)

    def student_loss(
        self, x: Tensor, data: Tensor, condition: Condition, draws: ItemNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss on its samples x (items, ...), a mean over items, and what to record."""
        raise NotImplementedError

    def critic_updates(self, x: Tensor, data: Tensor, condition: Condition, draws: ItemNoise) -> Iterator[Update]:
        """The updates of all players but the student, on its samples x without their graph."""
        yield Update("critic", self.critic_loss(x, self.noised_for_critic(x, draws), condition), len(x))

    def samples(self, data: Tensor, condition: Condition, draws: ItemNoise) -> Tensor:
        """The student's samples (items, ...) by its last network call alone, after a rollout that keeps no graph."""
        denoiser, sampling, count = self.denoiser, self.denoiser.sampling, self.options.steps
        times = sampling.times_for(denoiser.schedule).to(data.device)
        model = guided_model(denoiser, condition, 1.0)
        noise = draws.normal("noise", data)
        # One number for the batch and all ranks, as in the paper: their rollouts are equally long.
        stop = int(torch.randint(count, (), generator=generator(self.clock.seed, "rollout"))) if count > 1 else 0
        if stop == 0:
            x_in = noise * denoiser.schedule.noise_scale
        else:
            start = data
            if self.options.inputs == "simulated":
                start = backward_simulation(
                    model,
                    draws.normal("start", data) * denoiser.schedule.noise_scale,
                    times,
                    stop,
                    lambda number: draws.normal(f"renoise{number}", data),
                    denoiser.schedule,
                )
            x_in = denoiser.schedule.add_noise(start, noise, times[stop].expand(len(data)))
        return model(x_in, times[stop].expand(len(data))).x0

    def noised(self, x: Tensor, draws: ItemNoise) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, noise) of samples, where the two scores are compared."""
        options = self.options
        shares = draws.uniform("matching time")
        t = draw_between(shares, self.schedule, options.time_low, options.time_high, rho=options.time_rho)
        noise = draws.normal("matching noise", x)
        return self.schedule.add_noise(x, noise, t), t, noise

    def noised_for_critic(self, x: Tensor, draws: ItemNoise) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, noise) that the fake score is trained at: all times of the schedule."""
        t = draw_between(draws.uniform("critic time"), self.schedule, rho=self.options.time_rho)
        noise = draws.normal("critic noise", x)
        return self.schedule.add_noise(x, noise, t), t, noise

    @torch.no_grad()
    def scores(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Prediction]:
        """(the teacher's prediction, guided; the fake score's, never guided), both without a graph."""
        return self.ask(x_t, t, condition, self.options.guidance), guided_model(self.fake, condition, 1.0)(x_t, t)

    def scores_through(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Prediction, Prediction]:
        """The same with graphs that reach x_t, but no weights of either; the fake score is in eval mode."""
        teacher = self.ask_through(x_t, t, condition, self.options.guidance)
        with frozen(self.critic, self.critic_network, evaluating=True):
            return teacher, guided_model(self.fake, condition, 1.0)(x_t, t)

    def critic_loss(self, x: Tensor, at: tuple[Tensor, Tensor, Tensor], condition: Condition) -> Tensor:
        """Denoising error of the fake score at samples x noised to `at` (x_t, t, noise), a mean over items."""
        x_t, t, noise = at
        made = self._critic_process.parameterisation
        kind: FakeLoss = self.options.critic_loss or ("edm" if isinstance(made, Preconditioned) else "prediction")
        sigma_data = made.sigma_data if isinstance(made, Preconditioned) else 0.5
        prediction = guided_model(self.fake, condition, 1.0)(x_t, t)
        return denoising_error(prediction, x, noise, kind, sigma_data).mean()

    def warm_up_loss(self, data: Tensor, condition: Condition, draws: ItemNoise) -> Tensor:
        """Squared error of one step of the student to what the teacher's sampler makes of the same noise."""
        noise, schedule = draws.normal("noise", data), self.denoiser.schedule
        with torch.no_grad():
            target = generate(self.teacher_denoiser, noise, condition, guidance=self.options.guidance)
        t = self.denoiser.sampling.times_for(schedule)[0].to(data.device).expand(len(data))
        return (
            (guided_model(self.denoiser, condition, 1.0)(noise * schedule.noise_scale, t).x0 - target).square().mean()
        )

    def critic_source(self) -> tuple[Process, nn.Module]:
        """What the fake score starts from, and how it denoises."""
        model = self._teacher_model()
        known = process_of(model)
        if self.options.critic_source == "teacher" and known is None:
            raise IncompatibleError("the teacher is no network to copy", "set critic_source: student")
        if known is None or self.options.critic_source == "student":
            return self.denoiser.process, self.student
        return known, model

    def _low_rank(self, source: nn.Module) -> LowRankNetwork:
        if source is self.student:
            raise IncompatibleError("a low-rank fake score needs the frozen weights of a teacher", "set critic: copy")
        options = self.options
        return LowRankNetwork(source, options.critic_rank, options.critic_alpha, options.critic_layers)

"""Parent of the methods that halve a sampler's steps, each student the teacher of the next."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.snapshot import load_module, module_tensors
from limbeck.core.target import frozen_copy
from limbeck.core.teacher import Teacher
from limbeck.core.warm_start import start_from
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition, NetworkDenoiser, Process, note_process
from limbeck.diffusion.guidance import Scale
from limbeck.diffusion.ports import takes_guidance
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.progressive import (
    Jumps,
    Weighting,
    halvings,
    jumps,
    nested_times,
    phase_starts,
    two_step_target,
    weighted_error,
)
from limbeck.diffusion.schedules import EDM
from limbeck.diffusion.solvers import Model, Solver
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod

Length = Annotated[float, Field(gt=0, le=1e6)]


class HalvingOptions(OptionsBase):
    """How far and how fast the steps are halved."""

    start_steps: int = Field(512, ge=1, le=1 << 20, description="steps of the first student; its teacher takes twice")
    end_steps: int = Field(1, ge=1, le=1 << 20, description="steps of the last student: start_steps, halved some times")
    phase_lengths: list[Length] | None = Field(
        None,
        description="training steps of each halving, relative to each other; equal if absent, but twice as many for "
        "students of two steps and one",
    )
    weighting: Weighting = Field(
        "truncated-snr", description="weight of the error in x0: max(SNR, 1), or SNR + 1, which is the error in v"
    )
    initialise: Literal["teacher", "none"] = Field(
        "teacher", description="start from the teacher's weights, by name; none keeps the student's own"
    )

    @model_validator(mode="after")
    def _halve(self) -> "HalvingOptions":
        count = len(halvings(self.start_steps, self.end_steps))
        if self.phase_lengths is not None and len(self.phase_lengths) != count:
            raise ValueError(f"there are {count} halvings, and phase_lengths names {len(self.phase_lengths)}")
        return self


class HalvingMethod(DiffusionMethod):
    """Phases of training: the student of each is the teacher of the next.

    The first phase has the method's teacher. At the start of each later one the student is copied, and the copy teaches
    from then on; it is saved in checkpoints. While a phase runs, the student is sampled with that phase's steps.
    Subclasses say on which jumps, and under which guidance.
    """

    phase: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        ours, theirs = self.denoiser, self.teacher_denoiser
        if ours.schedule.config() != theirs.schedule.config():
            raise IncompatibleError("student and teacher have different noise schedules", "give both the same")
        if self.options.initialise == "teacher":
            if isinstance(theirs, NetworkDenoiser) and ours.process.parameterisation != theirs.process.parameterisation:
                raise IncompatibleError(
                    "the student predicts something else than the teacher whose weights it starts from",
                    "give it the teacher's parameterisation, or set initialise: none",
                )
            start_from(self.student, self._teacher_model())
        self.previous = frozen_copy(self.student)
        self.register_buffer("phase", torch.zeros((), dtype=torch.int64))
        self._now, self._seen = 0, (-1, 0)  # this phase; the last step that was surely taken, and its phase
        try:
            for steps, _ in self.phases():
                jumps(ours.schedule, max(steps, 1), self.kind())
        except ValueError as error:
            raise IncompatibleError(str(error), "lower start_steps") from None

    @abstractmethod
    def scale(self, draws: ItemNoise) -> Scale:
        """The guidance scale g of each item in training, or one for all."""

    @abstractmethod
    def sample_scale(self) -> float:
        """The scale that a student with an input for it is told when samples are drawn."""

    def kind(self) -> Jumps:
        """What kind of jumps the student learns."""
        return "deterministic"

    def phases(self) -> list[tuple[int, float]]:
        """Each phase: the student's steps, 0 where none are halved, and its relative length."""
        options = self.options
        steps = halvings(options.start_steps, options.end_steps)
        lengths = options.phase_lengths or [2.0 if count <= 2 else 1.0 for count in steps]
        return list(zip(steps, lengths, strict=True))

    def student_process(self, own: Process | None) -> Process:
        return self.sampled(super().student_process(own), self.phases()[-1][0])

    def sampled(self, process: Process, steps: int) -> Process:
        """The process of a student of so many steps; of 0, one that is sampled as the teacher is."""
        told = takes_guidance(self.student)
        process = replace(process, guidance_input=told)
        guidance = self.sample_scale() if told else 1.0
        if not steps:
            return replace(process, sampling=replace(self.teacher_denoiser.sampling, guidance=guidance))
        solver: Solver = "stochastic_progressive" if self.kind() == "stochastic" else "ddim"
        grid = isinstance(process.schedule, EDM)  # Karras et al.'s own grid does not nest
        times = tuple(map(float, nested_times(process.schedule, steps))) if grid else None
        return process.sampled(solver=solver, steps=steps, guidance=guidance, times=times)

    def train(self, mode: bool = True) -> "HalvingMethod":
        """Sets the mode of all but the copy, which teaches in eval mode."""
        super().train(mode)
        self.previous.eval()
        return self

    def step(self, batch: Batch) -> Iterator[Update]:
        number = self.enter_phase()
        steps = self.phases()[number][0]
        x0, condition = self.read(batch)
        draws = self.draws(batch)
        scale = self.scale(draws)
        told = self.told(condition, scale, x0)
        prediction, target = self.lesson(steps, self.model_of_teacher(number, condition, scale), x0, told, draws)
        loss = weighted_error(prediction, target, self.options.weighting).mean()
        yield Update("student", loss, batch.size, logs={"steps": loss.new_tensor(float(steps))})

    def lesson(
        self, steps: int, teacher: Model, x0: Tensor, told: Condition, draws: ItemNoise
    ) -> tuple[Prediction, Tensor]:
        """What the student of so many steps predicts at noised data, and the x0 that it should have predicted."""
        denoiser = self.denoiser
        table = jumps(denoiser.schedule, steps, self.kind()).to(x0.device)
        t, between, s = table[draws.integers("jump", len(table))].unbind(1)
        x_t = denoiser.schedule.add_noise(x0, draws.normal("noise", x0), t)
        with torch.no_grad():
            target = two_step_target(teacher, x_t, t, between, s)
        return denoiser(x_t, t, told), target

    def told(self, condition: Condition, scale: Scale, items: Tensor) -> Condition:
        """The condition as the student hears it: with the guidance scale, where it has an input for that."""
        if not self.denoiser.guidance_input:
            return condition
        scales = torch.as_tensor(scale, dtype=torch.float32, device=items.device)
        return {**condition, "guidance": scales.expand(len(items))}

    def model_of_teacher(self, number: int, condition: Condition, scale: Scale) -> Model:
        """Who teaches in a phase: the method's teacher in the first, the student of the last phase in all others."""
        if number == 0:
            return lambda x_t, t: self.ask(x_t, t, condition, scale)
        previous = NetworkDenoiser(self.previous)
        return lambda x_t, t: previous(x_t, t, self.told(condition, scale, x_t))

    def enter_phase(self) -> int:
        """The number of this step's phase; where it has just begun, the student becomes the teacher."""
        phases = self.phases()
        try:
            starts = phase_starts([length for _, length in phases], self.clock.steps)
        except ValueError as error:
            raise IncompatibleError(str(error), "train longer, or halve fewer times") from None
        number = sum(start <= self.clock.step for start in starts) - 1
        # A skipped update takes buffers back to what they were before: the copy is then made again.
        sure = self._seen[0] == self.clock.step - 1
        if number != (self._seen[1] if sure else int(self.phase)):
            load_module(self.previous, module_tensors(self.student))
            self.phase.fill_(number)
        self._now = number
        note_process(self.student, self.sampled(self.denoiser.process, phases[number][0]))
        return number

    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        """Notes that this step, with a copy that it may have made, will not be taken back."""
        self._seen = (self.clock.step, self._now)

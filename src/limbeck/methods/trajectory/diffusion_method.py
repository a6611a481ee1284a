"""Parent of the methods that work on denoisers."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method
from limbeck.core.options import OptionsBase
from limbeck.core.teacher import Teacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import (
    Condition,
    Denoiser,
    NetworkDenoiser,
    Process,
    condition_of,
    denoiser_of,
    note_process,
    process_of,
)
from limbeck.diffusion.guidance import Scale, guided
from limbeck.diffusion.ports import share_null_prompt
from limbeck.diffusion.predictions import Prediction


class DiffusionMethod(Method):
    """Student and teacher as denoisers, and what a batch holds for them.

    A student without a process of its own, such as a fresh network, gets the teacher's; subclasses that train another
    one give it in `student_process`. The teacher never records a graph, unless it is asked by `ask_through`.
    """

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if getattr(teacher, "adapt", None) is not None:
            raise IncompatibleError(
                "the teacher was trained on images normalised in another way", "set data.mean and data.std to its own"
            )
        self.note_student()

    def note_student(self) -> None:
        """Notes on the student how it denoises, and the empty prompt where the teacher knows one."""
        note_process(self.student, self.student_process(process_of(self.student)))
        share_null_prompt(self.student, getattr(self.teacher, "model", None))

    def student_process(self, own: Process | None) -> Process:
        """How the student denoises and is sampled from; `own` is what is noted on it, None on a fresh network.

        Raises:
            IncompatibleError: nothing is known of it, and there is no teacher to take it from.
        """
        known = own or process_of(self._teacher_model())
        if known is None:
            raise IncompatibleError(
                "nothing is known of how the student denoises", "take a trained one, or train one with 'denoising'"
            )
        return known

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The student as a denoiser."""
        return NetworkDenoiser(self.student)

    @property
    def teacher_denoiser(self) -> Denoiser:
        """The teacher as a denoiser; `ask` asks it."""
        try:
            return denoiser_of(self._teacher_model())
        except ValueError as error:
            raise IncompatibleError(f"the teacher is no denoiser: {error}", "take a diffusion model") from error

    def _teacher_model(self) -> nn.Module:
        model: Any = getattr(self.teacher, "model", None)
        if model is None:
            raise IncompatibleError("this method needs a live teacher, a diffusion model that it can ask")
        return model

    @torch.no_grad()
    def ask(self, x_t: Tensor, t: Tensor, condition: Condition, scale: Scale = 1.0) -> Prediction:
        """The teacher's prediction, guided with the scale g; of both conditions in one call, and without a graph.

        A teacher that takes the scale as an input is told it instead.
        """
        return self.ask_through(x_t, t, condition, scale)

    def ask_through(self, x_t: Tensor, t: Tensor, condition: Condition, scale: Scale = 1.0) -> Prediction:
        """The same with a graph that reaches x_t: losses through the teacher move what made its input.

        The teacher's weights are frozen and take no part, so what is kept for the way back is its activations alone.
        """
        teacher = self.teacher_denoiser
        if teacher.guidance_input:
            told = torch.as_tensor(scale, dtype=torch.float32, device=x_t.device).expand(len(x_t))
            return teacher(x_t, t, {**condition, "guidance": told})
        return guided(teacher, x_t, t, condition, scale)

    def draws(self, batch: Batch) -> ItemNoise:
        """The random numbers of this step, by item; items that have no number are counted within the batch."""
        items = batch["index"] if "index" in batch else torch.arange(batch.size, device=batch["image"].device)
        return ItemNoise(self.clock.seed, items)

    def read(self, batch: Batch) -> tuple[Tensor, Condition]:
        """The data (items, ...) of a batch and what they are conditioned on."""
        condition = dict(condition_of(batch, self.denoiser.process.null_label))
        if not self.data.classes:
            condition.pop("label", None)
        return batch["image"], condition


def without_condition(denoiser: Denoiser, condition: Condition, rate: float, draws: Tensor) -> Condition:
    """The condition, but with probability `rate` an item's is the null condition (classifier-free training).

    All parts of an item's condition are dropped together, where its uniform draw (items,) is below the rate.
    """
    if not condition or not rate:
        return condition
    null, dropped = denoiser.null(condition), draws < rate
    return {
        name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), null[name], value)
        for name, value in condition.items()
    }

"""TAID: a target that moves from the student to the teacher (Shing et al., 2025)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.methods.language.token_method import TokenDivergence, TokenMethod, WeightOptions
from limbeck.objectives.interpolation import Clock, advance_clock, interpolated_cross_entropy, start_clock


@register
class TAID(TokenMethod):
    r"""Forward-KL distillation toward a target between the student's own prediction and the teacher's.

    .. math:: J_t = -\frac{1}{|M|}\sum_{i\in M}\sum_v p^{(t)}_{iv}\log q_{iv}, \qquad
        p^{(t)} = \mathrm{softmax}\big((1-t)\,\mathrm{sg}(z_s) + t\,z_t\big)

    The time :math:`t` starts at `start`, never falls, is never behind a linear clock, and runs ahead of it while the
    loss falls: :math:`m \leftarrow \beta m + (1-\beta)\frac{J_{prev}-J}{J_{prev}}`,
    :math:`t \leftarrow \min(t_{end}, \max(t_{lin}, t + \alpha\,\sigma(m)(1-t)))`. The original keeps one clock a rank;
    here :math:`J` is the mean over micro-batches and ranks, so that all share one, and the cross-entropy with the text
    that `label_weight` adds does not move it.
    """

    card = Card(
        slug="taid",
        title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
        arxiv="2501.16937",
        year=2025,
        family="language",
        task="language-modelling",
        needs=("teacher", "student"),
        use="When the teacher is many times larger than the student and training is long enough to move the target.",
    )

    class Options(WeightOptions):
        """The clock, and the weights of the two losses; the target is interpolated at temperature 1."""

        weight: float = Field(1.0, gt=0, le=1e6, description="weight of the divergence, whose value moves the clock")
        start: float = Field(0.4, ge=0, le=1, description="interpolation time at the beginning")
        end: float = Field(1.0, ge=0, le=1, description="interpolation time at the end; 1 is the teacher itself")
        speed: float = Field(5e-4, ge=0, le=1, description="the paper's alpha: how far the clock may run ahead a step")
        momentum: float = Field(0.99, ge=0, lt=1, description="the paper's beta: memory of the loss's relative fall")
        adaptive: bool = Field(True, description="off: the clock is linear")

        @model_validator(mode="after")
        def _forward(self) -> "TAID.Options":
            if self.end < self.start:
                raise ValueError("end must not lie before start")
            return self

    time: Tensor
    momentum: Tensor
    previous_loss: Tensor
    increment: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        clock = start_clock(self.options.start)
        for name in ("time", "momentum", "previous_loss", "increment"):
            self.register_buffer(name, getattr(clock, name))

    def divergence(self) -> TokenDivergence:
        return lambda student, teacher, temperature: interpolated_cross_entropy(student, teacher, self.time)

    def match(self, batch: Batch) -> Update:
        update = super().match(batch)
        return replace(update, logs={**update.logs, "time": self.time.clone()})

    @torch.no_grad()
    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        """Moves the clock, once an optimizer step, by the interpolated loss alone."""
        options = self.options
        before = Clock(self.time, self.momentum, self.previous_loss, self.increment)
        after = advance_clock(
            before,
            logs["divergence"],
            self.clock.progress,
            start=options.start,
            end=options.end,
            speed=options.speed,
            momentum=options.momentum,
            adaptive=options.adaptive,
        )
        for name in ("time", "momentum", "previous_loss", "increment"):
            getattr(self, name).copy_(getattr(after, name))

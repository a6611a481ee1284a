"""FKD: soft labels of crops, stored with how each crop was made (Shen and Xing, 2021); relabelling of SRe2L and CDA."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import derive, generator
from limbeck.core.registry import register
from limbeck.data.crop_labels import CropLabels
from limbeck.data.noise import uniforms
from limbeck.objectives.logits import kd
from limbeck.synthesis.soft_labels import CropViews, boxes_of, draw_paste, show

if TYPE_CHECKING:
    from limbeck.core.teacher import Teacher


@register
class FastKnowledgeDistillation(Method):
    r"""A student learns from the teacher's soft labels of random crops, and from nothing else.

    .. math:: L = \frac1B \sum_b \mathrm{KL}\bigl(\sigma(z_t(A x_b) / T) \,\|\, \sigma(z_s(A x_b) / T)\bigr)

    without the factor :math:`T^2`. A crops and mirrors each image, and CutMix pastes one rectangle of another image of
    the batch into each. With `labels` naming a folder, crops, partners, rectangle and logits (half precision) of each
    batch of each step are stored there when they are first needed; a later training with the same seed, batch size and
    number of processes reads them, of whatever student, and never runs the teacher. Logits are rounded to half
    precision in either case, so both give the same.

    The papers train on a recovered set: with the stage's `data: stage:NAME` on that of an earlier stage `sre2l` or
    `cda`, on the 256 levels that are stored. They take 300 epochs with AdamW at 0.001, weight decay 0.01, cosine, in
    batches of 1,024, and of 64 to 128 where there are few images. CutMix couples the items of a batch: under gradient
    accumulation partners come from the same micro-batch.
    """

    card = Card(
        slug="fkd",
        title="A Fast Knowledge Distillation Framework for Visual Recognition",
        arxiv="2112.01528",
        year=2022,
        family="datasets",
        task="classification",
        needs=("teacher", "student", "index"),
        use="Training on a synthetic set, or several students on any set, with a teacher asked once for each crop.",
        couples_batch=True,
    )

    class Options(OptionsBase):
        """Temperature, crops and where labels are kept; defaults of SRe2L's scripts."""

        temperature: float = Field(20.0, gt=0, le=1000, description="T, softens both distributions")
        least_area: float = Field(0.08, gt=0, le=1, description="least share of the image that a crop shows")
        flip: float = Field(0.5, ge=0, le=1, description="probability of a mirror; 0 where sides matter, as of digits")
        cutmix: float = Field(1.0, ge=0, le=100, description="alpha of CutMix; 0 pastes nothing")
        labels: str | None = Field(None, description="folder of stored labels; they are not stored if absent")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: "Teacher | None" = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        assert teacher is not None
        self.stored: CropLabels | None = None
        if self.options.labels is not None:
            views = self.options.model_dump(include={"least_area", "flip", "cutmix"})
            self.stored = CropLabels(self.options.labels, {"teacher": teacher.fingerprint, **views})

    def step(self, batch: Batch) -> Iterator[Update]:
        shown, target = self.labelled(batch)
        logits, warmth = logits_of(call(self.student, shown)), self.options.temperature
        loss = kd(logits, target, temperature=warmth) / warmth**2
        yield Update("student", loss, batch.size)

    @torch.no_grad()
    def labelled(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch as it is shown, and the teacher's logits of it (items, classes), rounded to half precision."""
        known = None if self.stored is None else self.stored.read(self.clock.step, batch["index"])
        if known is not None:
            return batch.replace(image=show(batch["image"], CropViews.of(known))), known["logits"]
        views = self.views(batch)
        shown = batch.replace(image=show(batch["image"], views))
        assert self.teacher is not None
        logits = self.teacher.signal(shown).logits
        if logits is None:
            raise IncompatibleError("the teacher gives no logits", "use a teacher with a classification head")
        logits = logits.half()
        if self.stored is not None:
            self.stored.write(self.clock.step, batch["index"], {**views.tensors(), "logits": logits})
        return shown, logits

    def views(self, batch: Batch) -> CropViews:
        """How a batch's images are cropped and pasted, from the step's seed and their numbers alone."""
        options, seed, image = self.options, self.clock.seed, batch["image"]
        draws = uniforms(derive(seed, "crop"), batch["index"], 5)
        shared = generator(seed, "paste")
        paste = draw_paste((image.shape[2], image.shape[3]), options.cutmix, shared)
        partners = torch.randperm(batch.size, generator=shared)
        flips = draws[:, 4] < options.flip
        return CropViews(boxes_of(draws[:, :4], (options.least_area, 1.0)), flips, partners.to(flips.device), paste)

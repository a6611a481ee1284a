"""MEAL V2: an ensemble's soft labels and a discriminator of outputs, without any label (Shen and Savvides, 2020)."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Ensemble, Teacher
from limbeck.methods.classic.logit_method import check_same_classes, label_cross_entropy
from limbeck.methods.vision.mixing import mixed
from limbeck.objectives.adversarial import reverse_gradient
from limbeck.objectives.logits import soft_cross_entropy


@register
class MealV2(Method):
    r"""A student that is trained already learns from the mean of its teachers' probabilities, and from nothing else.

    .. math:: L_s = -\frac1B \sum_{b,c} p_c \log \sigma(z_s)_c - \lambda L_D, \qquad
        p = \frac1N \sum_n \sigma(z_n), \qquad
        L_D = \overline{\mathrm{BCE}}\bigl(D(z_s), (1, 0)\bigr) + \overline{\mathrm{BCE}}\bigl(D(\bar z_n), (0, 1)\bigr)

    A discriminator D, a second player, learns to tell the student's logits from the mean of the teachers' (both bars
    together are one mean over 2B pairs of outputs), and the student learns to mislead it (`reversal`, as the paper says
    it). In the published code the student helps it instead, :math:`+\lambda L_D` (`cooperative`). Both players move
    along gradients taken at the same weights, as one optimizer of both would.

    Give the student its own trained weights: an earlier stage, a run, or timm's `pretrained: true`. The paper trains
    with SGD without weight decay, at 0.01 and, after 100 of 180 epochs, 0.001, the discriminator at 0.0001, on random
    crops and flips alone. Soft labels computed once for each crop are a recipe's `cache`, whose teachers count as one.
    """

    card = Card(
        slug="meal-v2",
        title="MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
        arxiv="2009.08453",
        year=2020,
        family="vision",
        task="classification",
        needs=("teacher", "student"),
        use="To raise a trained classifier further with several strong teachers and images without labels.",
    )

    class Options(OptionsBase):
        """How teachers are asked, and the discriminator; defaults of the paper."""

        soft_labels: Literal["ensemble", "random"] = Field(
            "ensemble", description="the teachers' mean, or one teacher, drawn anew for each batch"
        )
        adversarial: Literal["reversal", "cooperative", "none"] = Field(
            "reversal", description="the student misleads the discriminator, or helps it as in the code, or has none"
        )
        adversarial_weight: float = Field(
            1.0, ge=0, le=1e6, description="lambda, how much the student minds the discriminator; 0 removes it"
        )
        least_width: int = Field(
            8,
            ge=1,
            le=4096,
            description="least width of its layers of classes / 8 and classes / 64 units; with few classes narrower "
            "ones are often dead from the start",
        )
        final_relu: bool = Field(
            False, description="ReLU after its last layer too, as in the code; outputs below 0 then learn nothing"
        )
        label_weight: float = Field(0.0, ge=0, le=1e6, description="weight of the cross-entropy with labels; paper: 0")
        cutmix: float = Field(0.0, ge=0, le=100, description="alpha of CutMix, 0 for none; paper's variant: 1")
        teacher_sizes: list[Annotated[int, Field(ge=4, le=4096)]] = Field(
            default_factory=list,
            description="side in pixels that images are resized to for the teachers, one for all or one a teacher; "
            "the student's own if empty",
        )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        assert teacher is not None
        self.teachers = teacher.teachers if isinstance(teacher, Ensemble) else [teacher]
        sizes: list[int | None] = [*self.options.teacher_sizes] or [None]
        self.sizes = sizes * len(self.teachers) if len(sizes) == 1 else sizes
        if len(self.sizes) != len(self.teachers):
            raise IncompatibleError(
                f"{len(sizes)} teacher_sizes for {len(self.teachers)} teachers", "give one size, or one a teacher"
            )
        plays = self.options.adversarial != "none" and self.options.adversarial_weight > 0
        widths = self.options.least_width, self.options.final_relu
        self.discriminator = discriminator(data.classes, *widths) if plays else None

    def players(self) -> dict[str, nn.Module]:
        """The student, and the discriminator where there is one."""
        players = {"student": self.student}
        return players | {"discriminator": self.discriminator} if self.discriminator is not None else players

    def step(self, batch: Batch) -> Iterator[Update]:
        options = self.options
        batch = mixed(batch, self.data.classes, cutmix_alpha=options.cutmix)
        soft_label, mean_logits = self.ask(batch)
        logits = logits_of(call(self.student, batch))
        check_same_classes(logits, soft_label)
        similarity = soft_cross_entropy(logits, soft_label)
        loss, logs = similarity, {"similarity": similarity}
        if options.label_weight:
            logs["cross_entropy"] = label_cross_entropy(logits, batch)
            loss = loss + options.label_weight * logs["cross_entropy"]
        if self.discriminator is None:
            yield Update("student", loss, batch.size, logs)
            return
        sign = 1.0 if options.adversarial == "reversal" else -1.0  # reversed twice, a gradient is itself
        seen = reverse_gradient(logits, sign * options.adversarial_weight)
        told_apart = discrimination(self.discriminator, seen, mean_logits)
        yield Update("student", loss + told_apart, batch.size, {**logs, "discrimination": told_apart})
        own = discrimination(self.discriminator, logits.detach(), mean_logits)  # logits from before the update
        yield Update("discriminator", own, batch.size)

    @torch.no_grad()
    def ask(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the soft label, and the mean logits that the discriminator sees, (items, classes)."""
        several = self.teacher if isinstance(self.teacher, Ensemble) and len(self.teachers) > 1 else None
        if several is None or "random" in (several.reduce, self.options.soft_labels):
            drawn = int(torch.randint(len(self.teachers), ())) if several is not None else 0
            logits = self.logits_of_teacher(drawn, batch)
            return logits, logits
        each = [self.logits_of_teacher(number, batch).float() for number in range(len(self.teachers))]
        weights = several.weights.to(each[0])
        mean = torch.stack([weight * one for weight, one in zip(weights, each, strict=True)]).sum(0)
        return several.combined(each), mean

    def logits_of_teacher(self, number: int, batch: Batch) -> Tensor:
        """One teacher's logits (items, classes) of the images in its own size."""
        size = self.sizes[number]
        if size is not None and tuple(batch["image"].shape[2:]) != (size, size):
            image = batch["image"]
            resized = functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
            batch = batch.replace(image=resized)
        logits = self.teachers[number].signal(batch).logits
        if logits is None:
            raise IncompatibleError("a teacher gives no logits", "use teachers with a classification head")
        return logits


def discriminator(classes: int, least_width: int = 8, final_relu: bool = False) -> nn.Sequential:
    """A fresh discriminator of logits: linear layers of classes / 8, classes / 64 and 2 units with ReLU between.

    Args:
        classes: number of logits it sees.
        least_width: of the two inner layers; with few classes their quotients would be 0.
        final_relu: add a ReLU after the last layer.
    """
    widths = [classes, max(classes // 8, least_width), max(classes // 64, least_width), 2]
    layers: list[nn.Module] = []
    for one, other in pairwise(widths):
        layers += [nn.Linear(one, other), nn.ReLU()]
    return nn.Sequential(*layers if final_relu else layers[:-1])


def discrimination(judge: nn.Module, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How badly a discriminator tells both sides' logits (items, classes) apart: a scalar, log 2 for a guess.

    Binary cross-entropy of its two outputs with (1, 0) for the student and (0, 1) for the teachers, a mean over all.
    """
    judged = judge(torch.cat([student_logits, teacher_logits.to(student_logits.dtype)])).float()
    ours, theirs = len(student_logits), len(teacher_logits)
    wanted = torch.tensor([[1.0, 0.0]] * ours + [[0.0, 1.0]] * theirs, device=judged.device)
    return functional.binary_cross_entropy_with_logits(judged, wanted.to(judged.dtype))

"""SRe2L: squeeze, recover and relabel (Yin et al., 2023); this is its recovery."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.call import logits_of
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import generator
from limbeck.core.registry import register
from limbeck.core.taps import Taps
from limbeck.synthesis.recovery import apply_view, draw_view, from_bytes, groups_of, to_bytes, with_gradient
from limbeck.synthesis.statistics import batch_norms, statistics_matching
from limbeck.synthesis.synthetic_set import SyntheticSet

if TYPE_CHECKING:
    from limbeck.core.teacher import Teacher


@register
class SRe2L(Method):
    r"""Images that a trained classifier takes for their classes and that look usual to its batch norms; no real ones.

    .. math:: L = \mathrm{CE}\bigl(f(A(x)), y\bigr) + r \sum_l m_l \bigl(
        \lVert \mu_l(A(x)) - \mu_l \rVert_2 + \lVert \sigma^2_l(A(x)) - \sigma^2_l \rVert_2 \bigr)

    over all batch norms l of the teacher f, with their running means and variances, :math:`m_1` = `first_weight` for
    the first and 1 for the others. A is one random crop, mirror and cyclic shift for all images of a group: the first
    image of each class (at most `group` classes), then the second, and so on. Each group is a problem of its own: the
    step's loss is the sum over groups, of which Adam makes what it would make of each alone, and one group's graph is
    held at a time. After each step images are clamped to what a picture can show; after the last they are put on the
    256 levels that are stored.

    The paper's three stages: squeeze is `supervised` with batch norms; this is recover, with
    `optimizer: {name: adam, betas: [0.5, 0.9], lr: 0.25, schedule: cosine}` and 4,000 steps on ImageNet at 224 pixels,
    from a `synthetic-set` of noise; relabel, and training on the result, is `fkd` with this stage as its `data`. The
    data of this stage tell their classes, size and normalisation alone. All processes do the same work. An average of
    weights (`train.ema`) would not lie on the 256 levels.
    """

    card = Card(
        slug="sre2l",
        title="Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective",
        arxiv="2306.13092",
        year=2023,
        family="datasets",
        task="dataset",
        needs=("teacher", "student"),
        use="A synthetic set of large images from nothing but a trained classifier with batch norms.",
        tiny={"jitter": 2},
    )

    class Options(OptionsBase):
        """Weights and views; defaults of ImageNet-1K with a ResNet-18."""

        statistics_weight: float = Field(
            0.01, ge=0, le=1e6, description="r, weight of batch-norm statistics; papers: 0.01 to 0.25"
        )
        first_weight: float = Field(10.0, ge=0, le=1e6, description="multiplier m of the first batch norm")
        group: int = Field(100, ge=1, le=100_000, description="classes, one image each, whose statistics are taken")
        least_area: float = Field(0.08, gt=0, le=1, description="least share of the image that a crop shows")
        flip: float = Field(0.5, ge=0, le=1, description="probability of a mirror; 0 where sides matter, as of digits")
        jitter: int = Field(32, ge=0, le=4096, description="largest cyclic shift, pixels; 32 of 224 in the paper")

    student: SyntheticSet
    mean: Tensor
    std: Tensor

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: "Teacher | None" = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if not isinstance(student, SyntheticSet) or student.soft:
            raise IncompatibleError(
                "the student is no set of images with a class each", "take a synthetic-set with hard labels"
            )
        if data.normalisation is None:
            raise IncompatibleError("nothing tells which values an image can have", "take images, not whitened")
        try:
            batch_norms(self.model)
        except ValueError as error:
            raise IncompatibleError(f"the teacher: {error}", "take a network with batch norms") from error
        self.groups = groups_of(student.labels, self.options.group)
        for name, values in zip(("mean", "std"), data.normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    @property
    def model(self) -> nn.Module:
        """The classifier that images are recovered from.

        Raises:
            IncompatibleError: the teacher is an ensemble, a cache or a server, through which no gradient flows.
        """
        model = getattr(self.teacher, "model", None)
        if not isinstance(model, nn.Module):
            raise IncompatibleError("images are recovered through one live teacher", "give a single model, uncached")
        return model

    def least_area(self) -> float:
        """Least share of the image that this step's crops show."""
        return self.options.least_area

    def step(self, batch: Batch) -> Iterator[Update]:
        images = self.student.images
        gradient, fits, gaps = torch.zeros_like(images), [], []
        for number, rows in enumerate(self.groups):
            shown = images.detach()[rows].requires_grad_()
            fit, gap = self.terms(shown, self.student.labels[rows], generator(self.clock.seed, "view", number))
            (gradient[rows],) = torch.autograd.grad(fit + self.options.statistics_weight * gap, shown)
            fits.append(fit.detach())
            gaps.append(gap.detach())
        fit, gap = torch.stack(fits), torch.stack(gaps)
        loss = with_gradient((fit + self.options.statistics_weight * gap).sum(), images, gradient)
        yield Update("student", loss, batch.size, {"cross_entropy": fit.mean(), "statistics": gap.mean()})

    def terms(self, images: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cross-entropy, a mean over one group's images, and the distance of their statistics, under one random view.

        Args:
            images: (items, channels, height, width), in the data's normalised units.
            labels: class of each (items,).
            draws: the view's.
        """
        options, size = self.options, (images.shape[2], images.shape[3])
        view = draw_view(size, (self.least_area(), 1.0), draws, flip=options.flip, jitter=options.jitter)
        seen = Batch({"image": apply_view(images, view)})
        adapt, norms = getattr(self.teacher, "adapt", None), batch_norms(self.model)
        with Taps(self.model, list(norms), kind="input") as taps:
            logits = logits_of(taps.run(seen if adapt is None else adapt(seen)))
            gap = statistics_matching(taps.values(), list(norms.values()), options.first_weight)
        return functional.cross_entropy(logits.float() if logits.element_size() < 4 else logits, labels), gap

    @torch.no_grad()
    def after_update(self, player: str, logs: Mapping[str, Tensor]) -> None:
        images, channels = self.student.images, (-1, 1, 1)
        low, high = (-self.mean / self.std).view(channels), ((1 - self.mean) / self.std).view(channels)
        images.copy_(torch.minimum(torch.maximum(images, low), high))
        if self.clock.step == self.clock.steps - 1:
            images.copy_(from_bytes(to_bytes(images, self.mean, self.std), self.mean, self.std))

"""SSLD: label-free distillation on mined images (Cui et al., 2021)."""

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.taps import match_modules
from limbeck.core.teacher import Teacher
from limbeck.objectives.divergences import divergence, token_cross_entropy


@register
class SSLD(Method):
    r"""The student agrees with a strong teacher on images whose labels are never read, so that any images will do.

    .. math::
        L = \frac1B \sum_b \tfrac12 \big[ \mathrm{KL}(p_t \,\|\, p_s) + \mathrm{KL}(p_s \,\|\, p_t) \big],
        \qquad p = \mathrm{softmax}(z)

    The authors call this Jensen-Shannon divergence; it is the symmetric KL. The divergence proper,
    :math:`\tfrac12 [\mathrm{KL}(p_t \| m) + \mathrm{KL}(p_s \| m)]` with :math:`m = (p_t + p_s)/2`, and the soft
    cross-entropy of later configurations are options.

    The paper's stages are runs of this method. Mine a pool with `limbeck.data.selection.mine` and train on
    `JoinedSource([base, mined.source])`, given from Python as `data`: a recipe cannot name a pool, as it has one data
    set and no labeller for it. Then fine-tune on the base set at a hundredth of the rate, and last ("fix") train
    `layers: [head]` alone on larger images: a run of its own with its `data.image_size`, whose student is `run:FOLDER`.
    Rates by depth for other tasks are `train.optimizer.lr_multipliers`. Weight decay has to be small (1e-5 to 7e-5).
    Duplicates of evaluation images are found by perceptual hash and a descriptor; SIFT, which the authors used, is not
    here, and goes in as a descriptor.
    """

    card = Card(
        slug="ssld",
        title="Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve Backbones",
        arxiv="2103.05959",
        year=2021,
        family="vision",
        task="classification",
        needs=("teacher", "student"),
        use="Where a good teacher and many images without labels are at hand.",
    )

    class Options(OptionsBase):
        """What is compared, and what is trained."""

        divergence: Literal["symmetric-kl", "jensen-shannon", "soft-ce"] = Field(
            "symmetric-kl", description="of probabilities: half the sum of both KL, the divergence proper, or soft CE"
        )
        layers: list[str] = Field(
            default_factory=list,
            description="module paths or globs of the only layers to train, as [head]; all else is frozen and keeps "
            "its batch statistics. The whole student if empty",
        )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.compare = _COMPARED[self.options.divergence]
        self.trained = match_modules(student, self.options.layers) if self.options.layers else []
        if self.trained:
            student.requires_grad_(False)
        for path in self.trained:
            student.get_submodule(path).requires_grad_(True)

    def train(self, mode: bool = True) -> "SSLD":
        """Frozen layers stay in eval mode: their dropout is off and their batch statistics do not move."""
        super().train(mode)
        if mode and self.trained:
            self.student.eval()
            for path in self.trained:
                self.student.get_submodule(path).train()
        return self

    def step(self, batch: Batch) -> Iterator[Update]:
        assert self.teacher is not None
        target = self.teacher.signal(batch).logits
        logits = logits_of(call(self.student, batch))
        if target is None or target.shape != logits.shape:
            found = "no logits" if target is None else f"{target.shape[-1]} classes"
            raise IncompatibleError(
                f"the student has {logits.shape[-1]} classes and the teacher {found}", "take one of the same classes"
            )
        yield Update("student", self.compare(logits, target).mean(), batch.size)


_COMPARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "symmetric-kl": divergence("symmetric-kl", weight=0.5),
    "jensen-shannon": divergence("jsd", beta=0.5),
    "soft-ce": token_cross_entropy,
}

"""DisWOT's measures as distillers: relations between items and between classes (Dong et al., 2023)."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.distributed import gather
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.taps import Taps
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.methods.classic.feature_method import FeatureMethod, Observation
from limbeck.objectives.network_similarity import class_channel_map, rmi, semantic_difference
from limbeck.objectives.relations import similarity_preserving
from limbeck.search.proxies import SemanticAxis, chosen_axis, head_of


@register
class DisWOTDistillation(FeatureMethod):
    r"""What DisWOT chooses a student by is also what the student is taught with.

    .. math:: L = w_y\,\mathrm{CE} + w_{kd}\,T^2\,\mathrm{KL} + w \Bigl(
        \frac{w_r}{B^2} \|G_t - G_s\|_F^2 + \frac{w_s}{K C} \sum_k \|H_{t,k} - H_{s,k}\|_F^2 + w_m\,\mathrm{RMI}\Bigr)

    with G the Gram matrix of the items' last maps and :math:`H_k` that of row k of the class-channel map, the gradient
    of the cross-entropy on the classifier's weight, all rows of unit length; and RMI the number of paired stages less
    the sum of their linear alignments (CKA). Where student and teacher have unequally many channels in front of their
    heads, the semantic term compares classes in place of channels, which is an extension. All three terms couple the
    items of a batch: ranks gather them, and gradient accumulation changes the loss.
    """

    card = Card(
        slug="diswot-kd",
        title="DisWOT: Student Architecture Search for Distillation WithOut Training (its distillers)",
        arxiv="2303.15678",
        year=2023,
        family="vision",
        task="classification",
        needs=("teacher", "student", "labels", "features"),
        use="To distil into a student that DisWOT chose, with the measures that it was chosen by.",
        couples_batch=True,
        tiny={"relation_weight": 10.0, "rmi_weight": 0.1},
    )

    class Options(FeatureMethod.Options):
        """Weights of the terms; the paper leaves them open, and those of similarity-preserving and ICKD are taken."""

        kd_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the Hinton term on the logits")
        relation_weight: float = Field(1000.0, ge=0, le=1e6, description="weight of the relations between items")
        semantic_weight: float = Field(2.5, ge=0, le=1e6, description="weight of the class-channel maps")
        rmi_weight: float = Field(0.0, ge=0, le=1e6, description="weight of RMI, over all paired layers")
        semantic_axis: SemanticAxis = Field(
            "auto", description="Gram matrices of the semantic term: channels (paper), classes, or by what fits"
        )
        student_head: str | None = Field(None, description="module path of the student's linear head; found if absent")
        teacher_head: str | None = Field(None, description="module path of the teacher's linear head; found if absent")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if not isinstance(teacher, LiveTeacher):
            raise IncompatibleError("the semantic term needs the input of the teacher's head", "leave out the cache")
        teacher.until_layers = False  # its head must run
        self.heads = self.options.student_head or head_of(student), self.options.teacher_head or head_of(teacher.model)

    def step(self, batch: Batch) -> Iterator[Update]:
        assert isinstance(self.teacher, LiveTeacher)
        ours, theirs = self.heads
        with Taps(self.student, [ours], "input") as student, Taps(self.teacher.model, [theirs], "input") as teacher:
            seen = self.observe(batch)
            inputs = student[ours], teacher[theirs]
        terms = self._terms(seen, inputs, batch)
        weights = {name: getattr(self.options, f"{name}_weight") for name in terms}
        objective = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        update = self.combine(seen, objective, batch)
        yield Update(update.player, update.loss, update.weight, {**update.logs, **terms})

    def _terms(self, seen: Observation, inputs: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The terms by name; RMI only where it has a weight."""
        sides = (seen.student_features, seen.teacher_features)
        student, teacher = ([gather(one.flatten(1)) for one in side] for side in sides)
        assert seen.teacher_logits is not None
        label = gather(batch["label"])
        ours, theirs = (
            class_channel_map(gather(logits), gather(features), label)
            for logits, features in zip((seen.student_logits, seen.teacher_logits), inputs, strict=True)
        )
        axis = chosen_axis(self.options.semantic_axis, ours, theirs)
        terms = {
            "relation": similarity_preserving(student[-1], teacher[-1]),
            "semantic": semantic_difference(ours, theirs, axis=axis),
        }
        return {**terms, "rmi": rmi(student, teacher)} if self.options.rmi_weight else terms

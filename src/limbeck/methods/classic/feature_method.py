"""Parent of the methods that match features: outputs of layers tapped in student and teacher."""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import logits_of
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.taps import Taps, match_modules
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.methods.classic.logit_method import label_cross_entropy
from limbeck.models.describe import default_layers
from limbeck.objectives.logits import kd


class FeatureMethod(Method):
    """Cross-entropy with the labels plus a weighted objective on the outputs of paired layers.

    Subclasses give `objective`, and `connect` where they train connectors between the two sides. Connectors are put
    into `self.connectors`, which learns together with the student and is left behind at the end.
    """

    class Options(OptionsBase):
        """Which layers, and the weights of the terms."""

        label_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the cross-entropy with the labels")
        weight: float = Field(1.0, ge=0, le=1e6, description="weight of the method's objective")
        kd_weight: float = Field(0.0, ge=0, le=1e6, description="weight of a Hinton term added on the logits")
        temperature: float = Field(4.0, gt=0, le=1000, description="temperature of that term")
        student_layers: list[str] | None = Field(
            None, description="module paths or globs in the student; its stages if absent"
        )
        teacher_layers: list[str] | None = Field(
            None, description="module paths or globs in the teacher, paired in order; its stages if absent"
        )

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        assert teacher is not None
        self.student_layers, self.teacher_layers = self._paired_layers(teacher)
        self.connectors = nn.ModuleDict()
        student_features, teacher_features = self._example_features(data.example, teacher)
        self.connect(student_features, teacher_features)

    def connect(self, student_features: list[Tensor], teacher_features: list[Tensor]) -> None:
        """Builds `self.connectors` from example features (2, …) of each layer; nothing unless a method learns some."""

    def objective(self, student_features: list[Tensor], teacher_features: list[Tensor], batch: Batch) -> Tensor:
        """What the method adds: a scalar, the mean over the batch, from one feature per layer and side."""
        raise NotImplementedError

    def players(self) -> dict[str, nn.Module]:
        """The student, together with the connectors where there are any."""
        return {"student": nn.ModuleList([self.student, self.connectors]) if self.connectors else self.student}

    def step(self, batch: Batch) -> Iterator[Update]:
        assert self.teacher is not None
        signal = self.teacher.signal(batch, self.teacher_layers)
        with Taps(self.student, self.student_layers) as taps:
            logits = logits_of(taps.run(batch))
            features = taps.values()
        labels_loss = label_cross_entropy(logits, batch)
        objective = self.objective(features, list(signal.features.values()), batch)
        loss = self.options.label_weight * labels_loss + self.options.weight * objective
        if self.options.kd_weight:
            assert signal.logits is not None
            loss = loss + self.options.kd_weight * kd(logits, signal.logits, self.options.temperature)
        yield Update("student", loss, batch.size, {"cross_entropy": labels_loss, "objective": objective})

    def default_layers(self, model: nn.Module) -> list[str]:
        """The layers of a model that are matched when the options name none: its stages."""
        return default_layers(model)

    def _paired_layers(self, teacher: Teacher) -> tuple[list[str], list[str]]:
        """Layer paths of both sides, equally many; where both are defaults they are aligned at their ends."""
        student_globs, teacher_globs = self.options.student_layers, self.options.teacher_layers
        if teacher_globs is None and not isinstance(teacher, LiveTeacher):
            raise IncompatibleError("this teacher does not tell its layers", "name them in the option teacher_layers")
        model = teacher.model if isinstance(teacher, LiveTeacher) else None
        ours = match_modules(self.student, student_globs or self.default_layers(self.student))
        theirs = teacher_globs or []
        if model is not None:
            theirs = match_modules(model, teacher_globs or self.default_layers(model))
        if student_globs is None and teacher_globs is None:
            depth = min(len(ours), len(theirs))
            return ours[-depth:], theirs[-depth:]
        if len(ours) != len(theirs):
            raise IncompatibleError(
                f"{len(ours)} student layers cannot be paired with {len(theirs)} teacher layers",
                "name equally many in student_layers and teacher_layers",
            )
        return ours, theirs

    @torch.no_grad()
    def _example_features(self, example: Batch, teacher: Teacher) -> tuple[list[Tensor], list[Tensor]]:
        """Features of the example batch; batch norms are not updated by it."""
        device = next(self.student.parameters()).device
        example, training = example.to(device), self.student.training
        teacher.to(device)
        self.student.eval()
        with Taps(self.student, self.student_layers) as taps:
            taps.run(example)
            ours = taps.values()
        self.student.train(training)
        return ours, list(teacher.signal(example, self.teacher_layers).features.values())


def pooled(feature: Tensor) -> Tensor:
    """A feature as one vector an item: maps (items, channels, …) averaged over space, vectors as they are.

    Token sequences (items, tokens, width) are averaged over tokens.
    """
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature


def channel_counts(features: Sequence[Tensor]) -> list[int]:
    """Channels of each feature: dimension 1 of maps and vectors, the last of token sequences."""
    return [feature.shape[-1] if feature.ndim == 3 else feature.shape[1] for feature in features]

"""Parent of the methods that match features: outputs of layers tapped in student and teacher."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from limbeck.methods.classic.logit_method import check_same_classes, label_cross_entropy
from limbeck.models.describe import default_layers
from limbeck.objectives.logits import kd


@dataclass(frozen=True, slots=True)
class Observation:
    """What student and teacher make of one batch: logits (items, classes), and one feature a tapped layer."""

    student_logits: Tensor
    teacher_logits: Tensor | None
    student_features: list[Tensor]
    teacher_features: list[Tensor]


class FeatureMethod(Method):
    """Cross-entropy with the labels plus a weighted objective on the outputs of paired layers.

    Subclasses give `layer_objective`, and `connector` where something trained stands between the two sides: it learns
    together with the student and is left behind at the end. Methods that look at several layers at once give
    `objective` and `connect` instead.
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
        if isinstance(teacher, LiveTeacher):
            teacher.until_layers = not self.options.kd_weight  # what lies behind the last layer is then never run
        self.student_layers, self.teacher_layers = self._paired_layers(teacher)
        self.connectors = nn.ModuleDict()
        student_features, teacher_features = self._example_features(data.example, teacher)
        self.connect(student_features, teacher_features)

    def connect(self, student_features: list[Tensor], teacher_features: list[Tensor]) -> None:
        """Fills `self.connectors` from example features (2, …) of each layer: one `connector` a pair of layers."""
        for layer, pair in enumerate(zip(student_features, teacher_features, strict=True)):
            connector = self.connector(layer, *pair)
            if connector is not None:
                self.connectors[str(layer)] = connector

    def connector(self, layer: int, student: Tensor, teacher: Tensor) -> nn.Module | None:
        """What stands between the two sides at one pair of layers, given example features; None for nothing."""
        return None

    def objective(self, student_features: list[Tensor], teacher_features: list[Tensor], batch: Batch) -> Tensor:
        """What the method adds: a scalar, the mean over the batch; the sum of `layer_objective` over the layers."""
        pairs = zip(student_features, teacher_features, strict=True)
        terms = [self.layer_objective(layer, student, teacher) for layer, (student, teacher) in enumerate(pairs)]
        return torch.stack(terms).sum()

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The objective at one pair of layers: a scalar, the mean over the batch."""
        raise NotImplementedError

    def players(self) -> dict[str, nn.Module]:
        """The student, together with the connectors where there are any."""
        return {"student": nn.ModuleList([self.student, self.connectors]) if self.connectors else self.student}

    def schedule(self) -> float:
        """A factor on the objective that may depend on `self.clock`; 1 unless the paper warms up."""
        return 1.0

    def step(self, batch: Batch) -> Iterator[Update]:
        seen = self.observe(batch)
        objective = self.objective(seen.student_features, seen.teacher_features, batch)
        yield self.combine(seen, objective, batch)

    def observe(self, batch: Batch) -> Observation:
        """Runs the teacher, then the student, and collects what their paired layers return."""
        assert self.teacher is not None
        signal = self.teacher.signal(batch, self.teacher_layers)
        with Taps(self.student, self.student_layers) as taps:
            logits = logits_of(taps.run(batch))
            return Observation(logits, signal.logits, taps.values(), list(signal.features.values()))

    def combine(self, seen: Observation, objective: Tensor, batch: Batch) -> Update:
        """The student's update: labels, the scheduled objective, and a Hinton term where one is asked for."""
        options = self.options
        labels_loss = label_cross_entropy(seen.student_logits, batch)
        loss = options.label_weight * labels_loss + options.weight * self.schedule() * objective
        if options.kd_weight:
            if seen.teacher_logits is None:
                raise IncompatibleError("the teacher gives no logits for kd_weight", "set kd_weight: 0")
            check_same_classes(seen.student_logits, seen.teacher_logits)
            hinton = kd(seen.student_logits, seen.teacher_logits, temperature=options.temperature)
            loss = loss + options.kd_weight * hinton
        return Update("student", loss, batch.size, {"cross_entropy": labels_loss, "objective": objective})

    def default_layers(self, model: nn.Module) -> list[str]:
        """The layers of a model that are matched when the options name none: its stages."""
        return default_layers(model)

    def _paired_layers(self, teacher: Teacher) -> tuple[list[str], list[str]]:
        """Layer paths of both sides, equally many; where both are defaults they are aligned at their ends."""
        student_globs, teacher_globs = self.options.student_layers, self.options.teacher_layers
        ours = match_modules(self.student, student_globs or self.default_layers(self.student))
        if isinstance(teacher, LiveTeacher):
            theirs = match_modules(teacher.model, teacher_globs or self.default_layers(teacher.model))
        else:  # a cached teacher tells which layers it holds
            theirs = list(teacher_globs or getattr(teacher, "layers", ()))
        if not theirs:
            raise IncompatibleError("this teacher does not tell its layers", "name them in the option teacher_layers")
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


def spatial(feature: Tensor) -> Tensor:
    """A feature as maps (items, channels, height, width): maps as they are, tokens laid out on their square grid.

    Tokens before the grid's (class, distillation and register tokens, at most five) are left out.

    Raises:
        IncompatibleError: a vector has no positions, or the tokens fill no square grid.
    """
    if feature.ndim == 4:
        return feature
    if feature.ndim != 3:
        raise IncompatibleError(
            f"a layer returns {tuple(feature.shape)}, which has no positions to compare",
            "tap layers that return maps or tokens (student_layers, teacher_layers), or use rkd, pkt or sp",
        )
    side = math.isqrt(feature.shape[1])
    before = feature.shape[1] - side**2
    if before > 5:
        raise IncompatibleError(f"{feature.shape[1]} tokens fill no square grid", "use square images")
    return feature[:, before:].mT.unflatten(2, (side, side))


def channel_counts(features: Sequence[Tensor]) -> list[int]:
    """Channels of each feature: dimension 1 of maps and vectors, the last of token sequences."""
    return [feature.shape[-1] if feature.ndim == 3 else feature.shape[1] for feature in features]

"""One-for-all distillation between architectures of different families (Hao et al., 2023)."""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import logits_of
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.taps import Taps, match_modules
from limbeck.core.teacher import Ensemble, LiveTeacher, Teacher
from limbeck.methods.classic.logit_method import LogitMethod, check_same_classes, label_cross_entropy
from limbeck.methods.vision.exit_branches import exit_branch, last_stages, layout_of, readout_width
from limbeck.methods.vision.mixing import mixed
from limbeck.models.describe import default_layers
from limbeck.objectives.target_enhanced import target_enhanced


@register
class OneForAll(LogitMethod):
    r"""Exits on the student's stages give logits, and all of them match the teacher's, leaning towards the label.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,D_\epsilon(z_s) + w_e \sum_i D_{\epsilon_i}(b_i(F_i)), \qquad
        D_\epsilon(z) = -\frac1B \sum_{b,c} \bigl((p_{t,c} + [c = y])^\epsilon - [c = y]\bigr) \log p_c(z)

    with p softmaxes at temperature T and b the exits, which learn with the student and are dropped at the end:
    separable convolutions on maps, patch merging and transformer blocks on tokens, linear maps on vectors. Nothing of
    the teacher but its logits is used, so that it may be of any family, cached, or several teachers as one.

    An item without a label takes the class that the teacher finds most likely. Mixup and CutMix, with which the paper
    trains transformers and MLPs, pair the items of a micro-batch.
    """

    card = Card(
        slug="ofa-kd",
        title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        arxiv="2310.19444",
        year=2023,
        family="vision",
        task="classification",
        needs=("teacher", "student"),
        use="Between architectures of different families: a CNN, a transformer and an MLP, whose features differ.",
    )

    class Options(LogitMethod.Options):
        """Weights, and how far soft labels lean towards the label; weights and temperature of the paper."""

        weight: float = Field(1.0, ge=0, le=1e6, description="weight of the objective on the student's own logits")
        exit_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the sum over exits; 0 makes none")
        power: float = Field(
            1.5, gt=0, le=10, description="epsilon of all terms, chosen in 1 to 1.5 a pair; 1 is plain soft labels"
        )
        exit_powers: list[Annotated[float, Field(gt=0, le=10)]] | None = Field(
            None, description="an epsilon of its own for each exit, first stage first"
        )
        temperature: float = Field(1.0, gt=0, le=1000, description="softens both distributions; there is no factor T²")
        stages: list[str] | None = Field(
            None, description="module paths or globs of the student's stages that carry exits; the last four if absent"
        )
        mixup: float = Field(0.0, ge=0, le=100, description="alpha of mixup, 0 for none; paper: 0.8 for ViT and MLP")
        cutmix: float = Field(0.0, ge=0, le=100, description="alpha of CutMix, 0 for none; paper: 1 for ViT and MLP")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.exits = nn.ModuleList()
        self.layers: list[str] = []
        if self.options.exit_weight:
            self.layers = match_modules(student, self.options.stages or last_stages(default_layers(student)))
            self.exits.extend(self._exits())
        self.powers = self._powers()

    def players(self) -> dict[str, nn.Module]:
        """The student, together with its exits."""
        return {"student": nn.ModuleList([self.student, self.exits]) if self.exits else self.student}

    def step(self, batch: Batch) -> Iterator[Update]:
        options = self.options
        batch = mixed(batch, self.data.classes, mixup_alpha=options.mixup, cutmix_alpha=options.cutmix)
        target = self.teacher_logits(batch)
        logits, features = self.observe(batch)
        check_same_classes(logits, target)
        classes = self.target_classes(batch, target)
        labels_loss = label_cross_entropy(logits, batch)
        objective = self.enhanced(logits, target, classes, options.power)
        loss = options.label_weight * labels_loss + options.weight * objective
        logs = {"cross_entropy": labels_loss, "objective": objective}
        if self.exits:
            triples = zip(self.exits, features, self.powers, strict=True)
            terms = [self.enhanced(branch(f), target, classes, power) for branch, f, power in triples]
            logs["exits"] = torch.stack(terms).sum()
            loss = loss + options.exit_weight * logs["exits"]
        yield Update("student", loss, batch.size, logs)

    def observe(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The student's logits (items, classes) and what its stages return."""
        with Taps(self.student, self.layers) as taps:
            logits = logits_of(taps.run(batch))
            try:
                return logits, taps.values()
            except KeyError as error:
                raise IncompatibleError(
                    f"a stage of {type(self.student).__name__} is not called as a module ({error.args[0]})",
                    "name other layers in the option stages",
                ) from error

    def enhanced(self, logits: Tensor, target: Tensor, classes: Tensor, power: float) -> Tensor:
        """The target-enhanced objective at the method's temperature."""
        return target_enhanced(logits, target, classes, power=power, temperature=self.options.temperature)

    def target_classes(self, batch: Batch, teacher_logits: Tensor) -> Tensor:
        """The class of each item (items,): its label, a mixed one's largest, or the teacher's where it has none."""
        guess = teacher_logits.argmax(1)
        if "label" not in batch:
            return guess
        label = batch["label"]
        if label.ndim == 1:
            return torch.where(label >= 0, label, guess)
        return torch.where(label.sum(1) > 0, label.argmax(1), guess)

    def _powers(self) -> list[float]:
        """The epsilon of each exit."""
        powers = self.options.exit_powers or [self.options.power] * len(self.exits)
        if len(powers) != len(self.exits):
            raise IncompatibleError(
                f"{len(powers)} exit_powers for {len(self.exits)} exits",
                "give one for each stage that carries an exit",
            )
        return powers

    @torch.no_grad()
    def _exits(self) -> list[nn.Module]:
        """A fresh exit for each stage, fitted to what it returns for the example; batch norms are not updated."""
        example = self.data.example.to(next(self.student.parameters()).device)
        training = self.student.training
        self.student.eval()
        _, features = self.observe(example)
        self.student.train(training)
        pairs = zip(features, self.layers, strict=True)
        layouts = [layout_of(feature, example["image"], self.student, path) for feature, path in pairs]
        final, classes = layouts[-1].width, self.data.classes
        widest = max(readout_width(self.student, classes) or final, *map(self._width_of, self._teachers()), 0)
        places = enumerate(layouts)
        return [exit_branch(one, len(layouts) - 1 - place, final, widest, classes) for place, one in places]

    def _teachers(self) -> list[Teacher | None]:
        return [*self.teacher.teachers] if isinstance(self.teacher, Ensemble) else [self.teacher]

    def _width_of(self, teacher: Teacher | None) -> int:
        """Width of a teacher's last feature; 0 where it shows its logits alone."""
        return readout_width(teacher.model, self.data.classes) if isinstance(teacher, LiveTeacher) else 0

"""FitNets: a hint from inside the teacher (Romero et al., 2014)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.registry import register
from limbeck.methods.classic.feature_method import FeatureMethod, pooled, spatial
from limbeck.objectives.features import hint


@register
class FitNet(FeatureMethod):
    r"""A regressor on the student's middle layer reproduces the teacher's.

    .. math:: L = w_y\,\mathrm{CE}(z_s, y) + w\,\mathrm{mean}\,\bigl(r(F_s) - F_t\bigr)^2

    The regressor r is a convolution (strided or transposed where the maps differ in size) with batch norm and, where
    the teacher's feature is never negative, a ReLU; for tokens and vectors it is a linear map. It learns with the
    student and is dropped at the end.
    """

    card = Card(
        slug="fitnet",
        title="FitNets: Hints for Thin Deep Nets",
        arxiv="1412.6550",
        year=2014,
        family="classic",
        task="classification",
        needs=("teacher", "student", "features"),
        use="For a student of the teacher's own kind, thinner or deeper; between different kinds it may harm.",
    )

    class Options(FeatureMethod.Options):
        """Which stage gives the hint, and how much it counts; defaults of the CIFAR recipe."""

        weight: float = Field(100.0, ge=0, le=1e6, description="weight of the hint")
        hint_layer: int = Field(2, ge=1, le=1000, description="stage that is matched on both sides, counted from 1")

    def default_layers(self, model: nn.Module) -> list[str]:
        stages, chosen = super().default_layers(model), self.options.hint_layer
        if chosen > len(stages):
            raise IncompatibleError(
                f"{type(model).__name__} has {len(stages)} stages, so none is number {chosen}",
                "lower hint_layer, or name student_layers and teacher_layers",
            )
        return [stages[chosen - 1]]

    def connector(self, layer: int, student: Tensor, teacher: Tensor) -> nn.Module:
        return regressor(*comparable(student, teacher))

    def layer_objective(self, layer: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = comparable(student, teacher)
        return hint(self.connectors[str(layer)](student), teacher)


def comparable(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features in a form between which a regressor can stand: vectors, equally many tokens, or maps."""
    if teacher.ndim == 2:
        return pooled(student), teacher
    if student.ndim == teacher.ndim == 3 and student.shape[1] == teacher.shape[1]:
        return student, teacher
    return spatial(student), spatial(teacher)


def regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """A fresh regressor from features like `student` to features like `teacher`; see `comparable`.

    Raises:
        IncompatibleError: maps whose sizes no convolution brings together.
    """
    if teacher.ndim < 4:
        return nn.Linear(student.shape[-1], teacher.shape[-1])
    convolution = _resizing_convolution(student.shape, teacher.shape)
    if convolution(torch.zeros(student.shape)).shape != teacher.shape:
        raise IncompatibleError(
            f"no convolution turns maps of {tuple(student.shape[2:])} into {tuple(teacher.shape[2:])}",
            "pair layers of like resolution in student_layers and teacher_layers",
        )
    parts = [convolution, nn.BatchNorm2d(teacher.shape[1])]
    # A ReLU helps where the teacher's feature comes out of one itself, and would make it unreachable elsewhere.
    return nn.Sequential(*parts, nn.ReLU()) if teacher.min() >= 0 else nn.Sequential(*parts)


def _resizing_convolution(source: tuple[int, ...], target: tuple[int, ...]) -> nn.Module:
    """The convolution that brings maps of a source's height to a target's: 1x1, strided, transposed or unpadded."""
    (inputs, height), (outputs, wanted) = source[1:3], target[1:3]
    if height == wanted:
        return nn.Conv2d(inputs, outputs, 1)
    if height % wanted == 0:
        stride = height // wanted
        return nn.Conv2d(inputs, outputs, 2 * stride - 1, stride=stride, padding=stride - 1)
    if wanted % height == 0:
        stride = wanted // height
        return nn.ConvTranspose2d(inputs, outputs, stride + 2 * (stride // 2), stride=stride, padding=stride // 2)
    if height > wanted:
        return nn.Conv2d(inputs, outputs, 1 + height - wanted)
    raise IncompatibleError(f"maps of height {height} cannot grow to {wanted}", "pair layers of like resolution")

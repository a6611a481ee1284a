"""Scores of a student that need no training: what two networks make of one batch, compared by any feature loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import logits_of
from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import Taps
from limbeck.models.describe import default_layers
from limbeck.objectives.channels import ickd
from limbeck.objectives.features import attention_transfer, hint
from limbeck.objectives.network_similarity import Axis, class_channel_map, rmi, semantic_difference
from limbeck.objectives.relations import rkd, similarity_preserving
from limbeck.objectives.similarity import linear_cka

Proxy = Literal["diswot", "relation", "semantic", "rmi", "cka", "ickd", "at", "fitnet", "rkd"]
"""`diswot` is the sum of `relation` and `semantic`; all others are feature losses with their sign turned."""

SemanticAxis = Literal["auto", "channel", "class"]
"""What a class-channel map is compared by; `auto` takes the channels where both sides have equally many."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one network makes of a batch: outputs of its stages, and the class-channel map of its head if asked for."""

    features: list[Tensor]
    class_map: Tensor | None


def look(model: nn.Module, batch: Batch, layers: Sequence[str] | None, stages: int, *, head: bool) -> Look:
    """Runs a network once, in the mode in which it is, without recording a graph.

    Args:
        model: a classifier.
        batch: labelled items.
        layers: module paths or globs to tap; its last stages if None.
        stages: how many of these.
        head: also find the class-channel map of the linear head.

    Raises:
        IncompatibleError: fewer stages than asked for, or no linear head.
    """
    paths = default_layers(model)[-stages:] if layers is None else list(layers)
    if len(paths) < stages:
        raise IncompatibleError(f"{type(model).__name__} has {len(paths)} stages, and {stages} are compared")
    classifier = [head_of(model)] if head else []
    with torch.no_grad(), Taps(model, paths) as taps, Taps(model, classifier, kind="input") as inputs:
        logits = logits_of(taps.run(batch))
        class_map = class_channel_map(logits, inputs.values()[0], batch["label"]) if head else None
        return Look(taps.values(), class_map)


def head_of(model: nn.Module) -> str:
    """Module path of a classifier's linear head: the last linear layer, in the order in which the model lists them.

    Raises:
        IncompatibleError: it has no linear layer.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise IncompatibleError(f"{type(model).__name__} has no linear head", "take the proxy 'relation'")
    return paths[-1]


def stages_of(proxy: Proxy) -> int:
    """How many stages a proxy looks at: three for RMI, and the last one for all others."""
    return 3 if proxy == "rmi" else 1


def needs_head(proxy: Proxy) -> bool:
    """Whether a proxy looks at class-channel maps."""
    return proxy in ("diswot", "semantic")


def scores(proxy: Proxy, student: Look, teacher: Look, axis: SemanticAxis = "auto") -> dict[str, float]:
    """How alike two looks are, `score` and its terms by name; never above 0 but for rounding, 0 where they agree.

    Raises:
        IncompatibleError, ValueError: the shapes cannot be compared by this proxy.
    """
    if proxy == "diswot":
        terms = {"relation": relation(student, teacher), "semantic": semantic(student, teacher, axis)}
        return {"score": terms["relation"] + terms["semantic"], **terms}
    if proxy == "semantic":
        return {"score": semantic(student, teacher, axis)}
    return {"score": -float(_LOSSES[proxy](student.features, teacher.features))}


def relation(student: Look, teacher: Look) -> float:
    """How alike the items of the batch are to each other for both networks; see `similarity_preserving`."""
    return -float(similarity_preserving(student.features[-1], teacher.features[-1]))


def semantic(student: Look, teacher: Look, axis: SemanticAxis) -> float:
    """How alike the channels are assigned to the classes in both networks; see `semantic_difference`."""
    ours, theirs = student.class_map, teacher.class_map
    assert ours is not None
    assert theirs is not None
    return -float(semantic_difference(ours, theirs, axis=chosen_axis(axis, ours, theirs)))


def chosen_axis(axis: SemanticAxis, student_map: Tensor, teacher_map: Tensor) -> Axis:
    """What two class-channel maps (classes, channels) are compared by: for `auto` the channels if equally many."""
    if axis != "auto":
        return axis
    return "channel" if student_map.shape == teacher_map.shape else "class"


_Loss = Callable[[list[Tensor], list[Tensor]], Tensor]
_LOSSES: dict[str, _Loss] = {
    "relation": lambda student, teacher: similarity_preserving(student[-1], teacher[-1]),
    "rmi": rmi,
    "cka": lambda student, teacher: 1 - linear_cka(student[-1].flatten(1), teacher[-1].flatten(1)),
    "ickd": lambda student, teacher: ickd(_maps(student), _maps(teacher)),
    "at": lambda student, teacher: attention_transfer(_maps(student), _maps(teacher)),
    "fitnet": lambda student, teacher: hint(student[-1], teacher[-1]),
    "rkd": lambda student, teacher: rkd(_vectors(student[-1]), _vectors(teacher[-1])),
}


def _maps(features: list[Tensor]) -> Tensor:
    if features[-1].ndim != 4:
        raise IncompatibleError(
            f"a layer returns {tuple(features[-1].shape)}, which is no map", "take relation, cka or rkd, or tap a map"
        )
    return features[-1]


def _vectors(feature: Tensor) -> Tensor:
    """Averaged over positions: of maps the last two dimensions, of tokens the middle one."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature

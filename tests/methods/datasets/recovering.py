"""A small teacher, a set of noise and a method on them, for the tests of what recovers images."""

from typing import Any

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.method import Clock, DataInfo, Method
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.models.convnet import ConvNet
from limbeck.synthesis.synthetic_set import SyntheticSet

CLASSES, SIDE = 4, 8
MEAN, STD = [0.3], [0.4]
LABELS = torch.arange(CLASSES).repeat_interleave(2)
PLAIN = {"least_area": 1.0, "flip": 0.0, "jitter": 0}
"""Options under which images are seen as they are."""


def net() -> ConvNet:
    """A teacher whose batch norms remember something."""
    torch.manual_seed(1)
    made = ConvNet(classes=CLASSES, width=4, depth=2)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return made


def noise(labels: torch.Tensor = LABELS) -> SyntheticSet:
    """A fresh set."""
    return SyntheticSet(torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2)), labels)


def info(**changes: Any) -> DataInfo:
    """What is known of the data."""
    example = Batch({"image": torch.zeros(2, 1, SIDE, SIDE), "index": torch.arange(2)})
    return DataInfo(**{"items": 8, "classes": CLASSES, "example": example, "normalisation": (MEAN, STD), **changes})


def recovering(
    slug: str,
    *,
    teacher: nn.Module | Teacher | None = None,
    student: nn.Module | None = None,
    data: DataInfo | None = None,
    step: int = 0,
    steps: int = 100,
    **options: Any,
) -> Method:
    """A method in the given moment."""
    kind = method_class(slug)
    model = teacher if teacher is not None else net()
    live = LiveTeacher(model) if isinstance(model, nn.Module) else model
    method = kind(kind.Options(**options), student=student or noise(), teacher=live, data=data or info())
    method.clock = Clock(step=step, steps=steps, seed=11)
    return method.train()

"""A tiny classifier pair and a batch, on which the loss of a method is worked out by hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import Clock, DataInfo, Method, Update
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.models.convnet import ConvNet
from limbeck.models.vit import VisionTransformer

ITEMS, CLASSES = 20, 10


def batch(items: int = 6) -> Batch:
    """Random 8x8 images of all classes, the first items of the data."""
    draws = torch.Generator().manual_seed(3)
    images = torch.randn(items, 1, 8, 8, generator=draws)
    return Batch({"image": images, "label": torch.arange(items) % CLASSES, "index": torch.arange(items) * 3 % ITEMS})


def teacher_net(**changes: Any) -> nn.Module:
    """A teacher with batch-norm statistics and scales that are not the fresh ones."""
    torch.manual_seed(1)
    net = ConvNet(**{"width": 6, "depth": 3, **changes})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return net


def student_net(**changes: Any) -> nn.Module:
    """A thinner student."""
    torch.manual_seed(2)
    return ConvNet(**{"width": 4, "depth": 3, **changes})


def vit(distilled: bool = False, **changes: Any) -> nn.Module:
    """A vision transformer with 4x4 patches' tokens, one class token and, on request, a distillation token."""
    torch.manual_seed(4)
    settings = {"image_size": 8, "patch_size": 2, "channels": 1, "dim": 8, "depth": 3, "heads": 2, **changes}
    return VisionTransformer(distilled=distilled, **settings)


def build(
    slug: str, *, student: nn.Module | None = None, teacher: nn.Module | Teacher | None = None, **options: Any
) -> Method:
    """A method in train mode, past any warm-up, with seeded connectors."""
    kind = method_class(slug)
    teacher = teacher if teacher is not None else teacher_net()
    live = LiveTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
    torch.manual_seed(5)
    data = DataInfo(ITEMS, CLASSES, batch(2), labels=torch.arange(ITEMS) % CLASSES)
    method = kind(kind.Options(**options), student=student or student_net(), teacher=live, data=data)
    method.clock = Clock(step=10_000, steps=20_000, epoch=500.0)
    return method.train()


def update_of(method: Method, items: Batch | None = None) -> Update:
    """The one update of a step."""
    (update,) = list(method.step(items or batch()))
    return update


def stages(net: nn.Module, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every stage's output and the logits of a `ConvNet`, by its own submodules and without taps."""
    features = []
    for stage in net.stages:
        image = stage(image)
        features.append(image)
    return features, net.head(image.mean((2, 3)))


def both(method: Method) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Stages and logits of student and teacher on the batch."""
    with torch.no_grad():
        theirs = stages(method.teacher.model, batch().image)
    return *stages(method.student, batch().image), *theirs


def labels_loss(logits: Tensor) -> Tensor:
    """Cross-entropy with the labels of the batch."""
    return F.cross_entropy(logits, batch().label)


def check_gradients(method: Method) -> None:
    """The step's gradient reaches the student and every connector, and leaves the teacher alone."""
    update = update_of(method)
    assert update.player == "student"
    assert update.weight == 6
    update.loss.backward()
    trained = dict(method.players()["student"].named_parameters())
    connectors = dict(method.connectors.named_parameters()) if hasattr(method, "connectors") else {}
    assert {id(p) for p in trained.values()} == {id(p) for p in (*method.student.parameters(), *connectors.values())}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, parameter in connectors.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    for parameter in method.teacher.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad

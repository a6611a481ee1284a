"""Scenes, exact teachers and networks for the tests of methods on scenes."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import Clock, DataInfo
from limbeck.core.registry import method_class
from limbeck.core.teacher import Ensemble, LiveTeacher
from limbeck.diffusion.denoiser import Process, note_process
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import VPDiscrete
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.rendering.images import ImageScene

SCHEDULE = VPDiscrete.named("scaled-linear")


def batch_of(images: Tensor, labels: Tensor | None = None, **more: Tensor) -> Batch:
    """Items with their numbers, all of class 0 unless labels are given."""
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return Batch({"image": images, "label": labels, "index": torch.arange(len(images)), **more})


def denoiser(numbers: int, classes: int = 0, kind: Any = "eps", seed: int = 0, width: int = 16) -> nn.Module:
    """A small network with a process in discrete times."""
    torch.manual_seed(seed)
    network = DenoisingMLP(numbers=numbers, classes=classes, width=width, depth=2)
    process = Process(SCHEDULE, Direct(kind, 0.001), null_label=classes or None)
    return note_process(network, process)


def gaussian(mean: float, std: float, dim: int = 2) -> GaussianMixtureDenoiser:
    """One Gaussian."""
    return GaussianMixtureDenoiser(torch.full((1, dim), mean), std, SCHEDULE)


def points(values: Tensor) -> ImageScene:
    """Particles (items, dim) as a scene."""
    return ImageScene(values[..., None, None])


def build(
    slug: str, scene: nn.Module, images: Tensor, *teachers: nn.Module, classes: int = 0, step: int = 0, **options: Any
) -> Any:
    """A method on given data, matching the first teacher."""
    kind = method_class(slug)
    live = [LiveTeacher(teacher) for teacher in teachers]
    speaking = live[0] if len(live) == 1 else Ensemble(live)
    info = DataInfo(len(images), classes, batch_of(images[:2]))
    method = kind(kind.Options(**options), student=scene, teacher=speaking, data=info)
    method.clock = Clock(step, 100, 0.0, 7 + step)
    return method

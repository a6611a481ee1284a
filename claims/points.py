"""The common protocol of the diffusion families in the plane: a mixture whose denoiser is known exactly.

Eight Gaussians on a circle of radius 1.4 with deviation 0.1; all students are small networks with the same initial
weights, batches and optimizer, and are measured by the sliced 2-Wasserstein distance to fresh data. Two sets of 4,000
true points differ by about 0.05 by chance.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.randomness import reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.source import Source
from limbeck.diffusion.denoiser import Process, note_process
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.metrics.distances import sliced_wasserstein
from limbeck.models.denoising_mlp import DenoisingMLP


class PointSource(Source):
    """Points (items, dim) with the class of the component that they came from, where components have classes."""

    def __init__(self, points: Tensor, labels: Tensor | None = None, classes: int = 0) -> None:
        self.points, self.classes = points, classes
        self.labels = torch.full((len(points),), -100) if labels is None else labels

    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        """See `Source.fetch`."""
        return Batch({"image": self.points[indices], "label": self.labels[indices], "index": indices})

    def select(self, rows: Tensor) -> "PointSource":
        """See `Source.select`."""
        return PointSource(self.points[rows], self.labels[rows], self.classes)


def drawn_from(mixture: GaussianMixtureDenoiser, items: int, seed: int) -> PointSource:
    """Fresh data of a mixture, a function of the seed."""
    reseed(seed, "points")
    points = mixture.draw(items)
    if mixture.labels is None:
        return PointSource(points)
    labels = mixture.labels[mixture.label_of(points)]
    return PointSource(points, labels, int(mixture.labels.max()) + 1)


def network(seed: int, width: int = 128, depth: int = 3, classes: int = 0, guidance: bool = False) -> DenoisingMLP:
    """A fresh network for points in the plane, a function of the seed."""
    reseed(seed, "network")
    return DenoisingMLP(numbers=2, classes=classes, width=width, depth=depth, guidance=guidance)


def with_process(model: nn.Module, process: Process) -> nn.Module:
    """The network with its process noted."""
    return note_process(model, process)


def train(
    slug: str,
    student: nn.Module,
    source: Source,
    seed: int,
    *,
    steps: int,
    batch: int = 512,
    lr: float = 1e-3,
    teacher: nn.Module | None = None,
    ema: float | None = 0.995,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    betas: tuple[float, float] = (0.9, 0.999),
    rates: Mapping[str, float] | None = None,
    prepare: Callable[[Method], object] = lambda method: None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    every: int | None = None,
    **options: object,
) -> nn.Module:
    """Trains a student with one method and returns the method's result.

    `rates` are learning rates of players that have another than `lr`; `prepare` may change the method before it runs;
    `measure` is shown the result so far after `every` so many steps.
    """
    kind = method_class(slug)
    reseed(seed, "method", slug)
    speaking = None if teacher is None else LiveTeacher(teacher)
    method = kind(kind.Options(**options), student=student, teacher=speaking, data=source.info())
    assert isinstance(method, Method)
    prepare(method)

    def moving(rate: float) -> OptimizerSpec:
        return OptimizerSpec.model_validate({"name": optimizer, "lr": rate, "schedule": schedule, "betas": betas})

    spec = TrainSpec(
        steps=steps,
        batch_size=batch,
        ema=ema,
        evaluate_every=every,
        optimizer=moving(lr),
        players={name: moving(rate) for name, rate in (rates or {}).items()},
    )
    loader = Loader(source, batch, seed)
    return Trainer(method, loader, spec, steps=steps, items=len(source), seed=seed, evaluate=measure).fit()


def distance(
    sampler: Callable[[Tensor], Tensor], mixture: GaussianMixtureDenoiser, seed: int, items: int = 4000
) -> float:
    """Sliced Wasserstein distance between samples from standard normal noise (items, 2) and fresh data."""
    reseed(seed, "measure")
    truth, noise = mixture.draw(items), torch.randn(items, 2)
    with torch.no_grad():
        return sliced_wasserstein(sampler(noise), truth)

"""The common protocol of teachers and students of different families: convolutional networks teach perceptrons.

Scikit-learn's digits, in an order of each seed's own, are cut into parts: some rows train the teachers, some the
students, and what neither part of a claim trains on measures. Every arm of a claim has the student's same initial
weights, the same batches in the same order, the same optimizer and as many steps, unless the claim says otherwise.
Sizes and steps were chosen on seeds 100 to 102, and margins fixed there; seeds 0 to 4 had not been seen.
"""

from functools import cache
from typing import Any

import torch
from torch import nn

from limbeck.core.distributed import World
from limbeck.core.method import Method
from limbeck.core.randomness import generator, reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import Teacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import open_data
from limbeck.data.source import ArraySource
from limbeck.metrics.classification import evaluate
from limbeck.models.build import build_model

BATCH = 64
STUDENT = ModelSpec(name="mlp", arguments={"width": 32, "depth": 3})
TEACHER = ModelSpec(name="convnet", arguments={"width": 24})


@cache
def rows(seed: int, start: int, stop: int | None = None, augment: tuple[str, ...] = ()) -> ArraySource:
    """Digits `start` up to `stop` of the 1,797 in the seed's order; all parts are normalised alike."""
    images, labels, normalisation = digits()
    part = torch.randperm(len(images), generator=generator(seed, "rows"))[start:stop]
    made = ArraySource(images[part], labels[part], classes=10, augmentations=augment)
    made.set_normalisation(*normalisation)
    return made


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor, Any]:
    """All images and labels, and the mean and deviation of the images that are usually trained on."""
    parts = open_data(DataSpec())
    sources = (parts.train, parts.validation)
    images = torch.cat([source.images(torch.arange(len(source))) for source in sources])
    return images, torch.cat([source.labels for source in sources]), parts.train.normalisation


def network(spec: ModelSpec, seed: int) -> nn.Module:
    """A fresh network for the digits; the same for the same seed."""
    return build_model(spec, rows(seed, 0).info(), seed)


def fit(
    slug: str,
    student: nn.Module,
    source: ArraySource,
    seed: int,
    steps: int,
    lr: float,
    teacher: Teacher | None = None,
    **options: Any,
) -> nn.Module:
    """Trains a network with a method, AdamW and a cosine; returns it in eval mode."""
    method = method_class(slug)
    reseed(seed, "method", slug)
    made = method(method.Options(**options), student=student, teacher=teacher, data=source.info())
    assert isinstance(made, Method)
    spec = TrainSpec(steps=steps, batch_size=BATCH, optimizer=OptimizerSpec(lr=lr))
    loader = Loader(source, BATCH, seed)
    Trainer(made, loader, spec, steps=steps, items=len(source), seed=seed, world=World()).fit()
    return made.result().eval()


def accuracy(model: nn.Module, measured: ArraySource) -> float:
    """Share of digits that a network names rightly."""
    return float(evaluate(model, measured)["accuracy"])

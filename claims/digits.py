"""The common protocol of the classic family: few digits, one teacher a seed, one initial student.

Two hundred of scikit-learn's digits train; all others measure. So few leave room between a small network and a larger
one. Every arm has the student's same initial weights, the same batches in the same order, the same optimizer and as
many steps; methods run with the defaults of their papers. Sizes and steps are those of an earlier setting of the demo,
chosen by the gain of `kd` on seeds 100 to 107 and 200 to 209. `kd` alone had been seen on seeds 0 to 2 of that setting,
with a gain of one point and two seeds of three; the other methods, and seeds 3 and 4, had not.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from limbeck.core.distributed import World
from limbeck.core.method import Method
from limbeck.core.randomness import reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import DataSplit, open_data
from limbeck.data.source import ArraySource
from limbeck.metrics.classification import evaluate
from limbeck.models.build import build_model

ITEMS, BATCH = 200, 32
STUDENT_STEPS, STUDENT_LR = 500, 1e-2
TEACHER_STEPS, TEACHER_LR = 300, 2e-3
BUDGET = (
    f"{STUDENT_STEPS} steps of {BATCH} of {ITEMS} digits, AdamW at {STUDENT_LR}, cosine; ConvNet of width 4 "
    "from width 24; measured on 1,597 other digits"
)
STUDENT = ModelSpec(name="convnet", arguments={"width": 4, "norm": "group"})
TEACHER = ModelSpec(name="convnet", arguments={"width": 24})


@cache
def data() -> DataSplit:
    """Two hundred digits to train on, and all others to measure on."""
    everything = open_data(DataSpec())
    rest = everything.train.select(torch.arange(ITEMS, len(everything.train)))
    sources = (rest, everything.validation)
    images = torch.cat([source.images(torch.arange(len(source))) for source in sources])
    measured = ArraySource(images, torch.cat([source.labels for source in sources]), classes=rest.classes)
    train = everything.train.select(torch.arange(ITEMS))
    measured.set_normalisation(*train.normalisation)
    return DataSplit(train, measured)


@cache
def teacher(seed: int) -> LiveTeacher:
    """The seed's teacher, six times as wide as the student, trained on the same labels."""
    info = data().train.info()
    network = build_model(TEACHER, info, 1000 + seed)
    method = method_class("supervised")
    made = method(method.Options(), student=network, data=info)
    assert isinstance(made, Method)
    fit(made, seed, TEACHER_STEPS, TEACHER_LR)
    return LiveTeacher(network)


def accuracy(slug: str, seed: int, **options: Any) -> float:
    """Accuracy, on the measuring set, of the student trained with one method."""
    info = data().train.info()
    method = method_class(slug)
    with_teacher = "teacher" in method.card.needs
    reseed(seed, "method", slug)
    made = method(
        method.Options(**options),
        student=build_model(STUDENT, info, seed),
        teacher=teacher(seed) if with_teacher else None,
        data=info,
    )
    assert isinstance(made, Method)
    fit(made, seed, STUDENT_STEPS, STUDENT_LR)
    return float(evaluate(made.result(), data().validation)["accuracy"])


def against_alone(slug: str, **options: Any) -> Any:
    """One seed of a method's claim: the distilled student, the student alone, and the teacher for reference."""

    def run(seed: int) -> Mapping[str, float]:
        return {
            "student alone": _alone(seed),
            slug: accuracy(slug, seed, **options),
            "teacher": float(evaluate(teacher(seed).model, data().validation)["accuracy"]),
        }

    return run


def fit(method: Method, seed: int, steps: int, lr: float) -> None:
    """Trains a method on the protocol's data."""
    train = data().train
    spec = TrainSpec(steps=steps, batch_size=BATCH, optimizer=OptimizerSpec(lr=lr, weight_decay=1e-4))
    Trainer(method, Loader(train, BATCH, seed), spec, steps=steps, items=len(train), seed=seed, world=World()).fit()


@cache
def _alone(seed: int) -> float:
    return accuracy("supervised", seed)

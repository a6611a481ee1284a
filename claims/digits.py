"""The common protocol of the classic family: few digits, one teacher a seed, one student from one initialisation.

A fifth of scikit-learn's digits trains, the rest measures: few labels leave a teacher something to tell, and a large
measuring set keeps the noise of a figure near half a point. Every arm has the student's same initial weights, the same
batches in the same order, the same optimizer and as many steps.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from limbeck.core.distributed import World
from limbeck.core.method import Method
from limbeck.core.randomness import reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import DataSplit, open_data
from limbeck.metrics.classification import evaluate
from limbeck.models.build import build_model

STEPS, BATCH, LR = 400, 64, 3e-3
BUDGET = f"{STEPS} steps of {BATCH} items, AdamW at {LR}, cosine; 20 % of digits train, 80 % measure"
STUDENT = ModelSpec(name="convnet", arguments={"width": 4})
TEACHER = ModelSpec(name="convnet", arguments={"width": 32})


@cache
def data() -> DataSplit:
    """A fifth of the digits to train on, the rest to measure on."""
    return open_data(DataSpec(validation=0.8))


@cache
def teacher(seed: int) -> Teacher:
    """The seed's teacher: eight times as wide, and trained on augmented images for three times as long."""
    split = open_data(DataSpec(validation=0.8, augment=["crop"]))
    network = build_model(TEACHER, split.train.info(), 1000 + seed)
    method = method_class("supervised")
    made = method(method.Options(), student=network, data=split.train.info())
    assert isinstance(made, Method)
    fit(made, split, seed, steps=3 * STEPS)
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
    fit(made, data(), seed)
    return float(evaluate(made.result(), data().validation)["accuracy"])


def against_alone(slug: str, **options: Any) -> Any:
    """One seed of a method's claim: the distilled student, the student alone, and the teacher for reference."""

    def run(seed: int) -> Mapping[str, float]:
        return {
            "student alone": _alone(seed),
            slug: accuracy(slug, seed, **options),
            "teacher": float(evaluate(teacher(seed).model, data().validation)["accuracy"]),  # type: ignore[attr-defined]
        }

    return run


def fit(method: Method, split: DataSplit, seed: int, steps: int = STEPS) -> None:
    """Trains a method with the protocol's budget."""
    spec = TrainSpec(steps=steps, batch_size=BATCH, optimizer=OptimizerSpec(lr=LR))
    loader = Loader(split.train, BATCH, seed)
    Trainer(method, loader, spec, steps=steps, items=len(split.train), seed=seed, world=World()).fit()


@cache
def _alone(seed: int) -> float:
    return accuracy("supervised", seed)

"""The common protocol of data-set distillation on digits: one image a class, or a few, in place of all of them.

All arms are images of scikit-learn's digits, as many of each class, and begin with the same real ones. Distilled arms
take as many steps, each on 640 real digits, with the same ConvNet of two blocks of 32 channels, without augmentation.
Fresh networks, three blocks of 32 channels, are then trained on every arm in the same way and measured on the digits
that were held out. How they are trained was set so that all digits teach them 99 %: with 200 steps at a rate of 0.03,
as in a first run on the same seeds, they had not learned what there is to learn, which is unfair to real images.
"""

from functools import cache
from typing import Any

from limbeck.core.distributed import World
from limbeck.core.method import Method
from limbeck.core.randomness import derive, reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, OptimizerSpec, TrainSpec
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import DataSplit, open_data
from limbeck.metrics.synthetic import Protocol, Trial
from limbeck.synthesis.synthetic_set import Start, SyntheticSet

STEPS, BATCH = 300, 640
PROTOCOL = Protocol(steps=300, lr=0.1, networks=3)
BUDGET = (
    f"{STEPS} steps on {BATCH} of 1,438 digits, ConvNet of 2 blocks of width 32, SGD with momentum 0.5, "
    f"no augmentation; accuracy of {PROTOCOL.networks} networks of 3 blocks, {PROTOCOL.steps} steps of SGD, on "
    "359 other digits"
)


@cache
def data() -> DataSplit:
    """The embedded digits."""
    return open_data(DataSpec())


def started(seed: int, per_class: int, how: Start = "real") -> SyntheticSet:
    """The real images that every arm of a seed begins with."""
    return SyntheticSet.initialise(data().train, per_class, how, seed=derive(seed, "claim"))


def distilled(slug: str, seed: int, per_class: int, *, lr: float, steps: int = STEPS, **options: Any) -> SyntheticSet:
    """The set that a method makes of the seed's first images."""
    train = data().train
    kind, images = method_class(slug), started(seed, per_class)
    reseed(seed, "method", slug)
    asked = kind.Options(**{"width": 32, "depth": 2, "augmentation": False, **options})
    method = kind(asked, student=images, data=train.info())
    assert isinstance(method, Method)
    optimizer = OptimizerSpec(name="sgd", lr=lr, momentum=0.5, schedule="constant")
    spec = TrainSpec(steps=steps, batch_size=BATCH, optimizer=optimizer)
    Trainer(method, Loader(train, BATCH, seed), spec, steps=steps, items=len(train), seed=seed, world=World()).fit()
    return images


def accuracy(images: SyntheticSet) -> float:
    """The mean accuracy of the networks that are trained on a set."""
    found = Trial(data().validation, PROTOCOL).accuracies(*(part.detach() for part in images()))
    return sum(found) / len(found)

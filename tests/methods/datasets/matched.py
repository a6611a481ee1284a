"""A tiny matching problem that the tests of DM, DataDAM and DC share."""

import torch

from limbeck.core.batch import Batch
from limbeck.core.method import Clock
from limbeck.core.registry import method_class
from limbeck.data.source import ArraySource
from limbeck.synthesis.synthetic_set import SyntheticSet


def source():
    draws = torch.Generator().manual_seed(0)
    return ArraySource(torch.rand(24, 2, 8, 8, generator=draws), torch.arange(24) % 3, classes=3)


def method(slug, *, student=None, augmentation=(), step=0, seed=5, **options):
    """A method on the source, with a set of two images a class from noise."""
    data = source()
    if student is None:
        student = SyntheticSet.initialise(data, 2, "noise")
    student.augmentation = augmentation
    kind = method_class(slug)
    torch.manual_seed(3)
    made = kind(kind.Options(**{"width": 6, "depth": 3, **options}), student=student, data=data.info())
    made.clock = Clock(step=step, steps=100, seed=seed)
    return made


def batch(rows=None):
    return source().fetch(torch.arange(24) if rows is None else rows)


def copy_of(real: Batch) -> SyntheticSet:
    """A set that equals a batch."""
    return SyntheticSet(real["image"], real["label"])


def loss_of(made, real=None):
    (update,) = made.step(batch() if real is None else real)
    return update

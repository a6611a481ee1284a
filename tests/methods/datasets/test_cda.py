"""CDA: which crops each step allows, SRe2L as its limit, and what whole images first do for the whole."""

import pytest
import torch
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.method import Clock, Method
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import open_data
from limbeck.models.convnet import ConvNet
from limbeck.synthesis.synthetic_set import SyntheticSet
from tests.methods.datasets.recovering import PLAIN, SIDE, recovering

BATCH = Batch({"image": torch.zeros(3, 1, SIDE, SIDE), "index": torch.arange(3)})


@pytest.mark.parametrize("curriculum", ["cosine", "linear"])
def test_the_least_area_of_a_step(curriculum):
    def area(step: int, **options: float) -> float:
        return recovering("cda", step=step, curriculum=curriculum, **options).least_area()

    assert area(0) == 1.0
    assert area(50) == pytest.approx(0.54)
    assert area(25, milestone=0.5) == pytest.approx(0.54)
    assert area(50, milestone=0.5) == 0.08
    assert area(99, milestone=0.5) == 0.08
    assert area(0, least_area=0.5, milestone=0.0) == 0.5


def test_step_is_all_or_nothing():
    assert recovering("cda", curriculum="step", step=99).least_area() == 1.0
    assert recovering("cda", curriculum="step", step=29, milestone=0.3).least_area() == 1.0
    assert recovering("cda", curriculum="step", step=30, milestone=0.3).least_area() == 0.08


def gradient(slug: str, step: int, **options: object) -> torch.Tensor:
    method = recovering(slug, step=step, jitter=2, **options)
    (update,) = method.step(BATCH)
    update.loss.backward()
    return torch.cat([update.loss.detach().view(1), method.student.images.grad.flatten()])


@pytest.mark.parametrize("step", [0, 40])
def test_without_a_milestone_it_is_sre2l(step):
    assert torch.equal(gradient("cda", step, milestone=0.0), gradient("sre2l", step))
    assert not torch.equal(gradient("cda", step), gradient("sre2l", step))


def test_the_first_step_sees_whole_images():
    whole = gradient("cda", 0, flip=0.0)
    assert torch.equal(whole, gradient("sre2l", 0, flip=0.0, least_area=1.0))
    unseen = recovering("cda", **{**PLAIN, "least_area": 0.08})
    (update,) = unseen.step(BATCH)
    model, images, labels = unseen.model, unseen.student.images, unseen.student.labels
    expected = sum(functional.cross_entropy(model(images[n::2]), labels[n::2]) for n in (0, 1)) / 2
    assert torch.allclose(update.logs["cross_entropy"], expected, rtol=1e-5)


def fit(method: Method, source: object, steps: int, stop: int, spec: TrainSpec) -> None:
    trainer = Trainer(method, Loader(source, spec.batch_size, 0), spec, steps=steps, items=len(source), seed=0)
    method.train()
    for micro_batches in trainer.loader.steps(0, stop):
        trainer.train_step(micro_batches)
        trainer.step += 1


def test_after_a_sixth_of_the_way_the_whole_images_are_clearer_than_without_curriculum():
    train = open_data(DataSpec()).train
    torch.manual_seed(0)
    model = ConvNet(width=8, depth=3)
    supervised = method_class("supervised")
    spec = TrainSpec(steps=80, batch_size=32, optimizer=OptimizerSpec(lr=1e-2))
    fit(supervised(supervised.Options(), student=model, data=train.info()), train, 80, 80, spec)
    teacher, kind, found = LiveTeacher(model), method_class("cda"), {}
    images = TrainSpec(steps=300, batch_size=8, optimizer=OptimizerSpec(name="adam", lr=0.1, betas=(0.5, 0.9)))
    for milestone in (0.0, 1.0):
        student = SyntheticSet.initialise(train, 1, "noise", seed=0)
        options = kind.Options(milestone=milestone, flip=0.0, jitter=1, statistics_weight=0.05)
        fit(kind(options, student=student, teacher=teacher, data=train.info()), train, 300, 50, images)
        with torch.no_grad():
            found[milestone] = float(functional.cross_entropy(model(student.images), student.labels))
    assert found[1.0] < found[0.0]
    assert found[1.0] < 0.5


def test_the_clock_of_another_training_is_another_curriculum():
    method = recovering("cda", step=50)
    method.clock = Clock(step=50, steps=200)
    assert method.least_area() == pytest.approx(0.08 + 0.92 * (1 + 0.5**0.5) / 2)

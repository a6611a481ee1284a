"""CDA: images recovered with crops that shrink teach a student more than those recovered with SRe2L's random crops.

Digits enlarged to 16 x 16 pixels, a ConvNet of three stages with batch norms as teacher, trained on random crops as
the paper's teachers were, five images a class recovered from noise, and a fresh student of the same shape trained on
what is stored, with FKD. Digits have sides, so nothing is mirrored; the shift of 32 of 224 pixels is one of 2 of 16.
The weight of the statistics was chosen among 0.05 and 1 on seed 100, at twice the width, where both kinds of images
were worth the same to within a point.

Students learn at 0.03 and without CutMix, which the claim of `fkd` found best on this protocol (seeds 100 and 101, on
images of `cda`). In a first run of this claim, on seeds 0 to 2 at 0.001 with CutMix, students were undertrained (0.41
for cda, 0.34 for SRe2L) and it held. This one is on seeds 20 to 25 (`--first 20`): the difference of the means stands,
but of six teachers two give better images to SRe2L, so that it does not hold.

What is not seen: as many real digits, drawn at random, teach more than either. The paper's setting is one in which no
real images are at hand in recovery.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from claims.claim import Claim
from limbeck.core.batch import Batch
from limbeck.core.distributed import World
from limbeck.core.method import Method
from limbeck.core.randomness import derive, reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.noise import uniforms
from limbeck.data.open import DataSplit, open_data
from limbeck.data.source import ArraySource
from limbeck.metrics.classification import evaluate
from limbeck.models.build import build_model
from limbeck.synthesis.recovery import to_bytes
from limbeck.synthesis.soft_labels import CropViews, boxes_of, show
from limbeck.synthesis.synthetic_set import SyntheticSet

SIDE, PER_CLASS, CLASSES = 16, 5, 10
LEAST_AREA = 0.08
RECOVERY, STUDENT_STEPS, STUDENT_BATCH = 300, 1000, 10
NETWORK = ModelSpec(name="convnet", arguments={"width": 8, "depth": 3})
TEACHER = TrainSpec(steps=600, batch_size=64, optimizer=OptimizerSpec(lr=3e-3))
IMAGES = TrainSpec(steps=RECOVERY, batch_size=8, optimizer=OptimizerSpec(name="adam", lr=0.25, betas=(0.5, 0.9)))
STUDENT = TrainSpec(steps=STUDENT_STEPS, batch_size=STUDENT_BATCH, optimizer=OptimizerSpec(lr=3e-2, weight_decay=0.01))
VIEWS: dict[str, Any] = {"flip": 0.0, "jitter": 2, "statistics_weight": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "cda": {},
    "sre2l": {"milestone": 0.0},
    "whole images": {"curriculum": "step"},
}


@cache
def data() -> DataSplit:
    """All digits, enlarged."""
    split = open_data(DataSpec())
    parts = []
    for source in (split.train, split.validation):
        images = source.images(torch.arange(len(source)))
        assert images.is_floating_point()  # in [0, 1]
        large = functional.interpolate(images, (SIDE, SIDE), mode="bilinear").clamp(0, 1)
        parts.append(ArraySource(large, source.labels, classes=CLASSES))
    parts[1].set_normalisation(*parts[0].normalisation)
    return DataSplit(*parts)


def fit(slug: str, student: nn.Module, source: ArraySource, spec: TrainSpec, seed: int, **more: Any) -> nn.Module:
    """A network or set trained with one method."""
    kind = method_class(slug)
    teacher = more.pop("teacher", None)
    method = kind(kind.Options(**more), student=student, teacher=teacher, data=source.info())
    assert isinstance(method, Method)
    steps, loader = spec.total_steps(len(source)), Loader(source, spec.batch_size, seed)
    return Trainer(method, loader, spec, steps=steps, items=len(source), seed=seed, world=World()).fit()


class Cropped(ArraySource):
    """Images of which training sees random crops, as the teachers of the paper did."""

    varied = True

    def fetch(self, indices: torch.Tensor, seed: int | None = None) -> Batch:
        """See `Source.fetch`."""
        batch = super().fetch(indices)
        if seed is None:
            return batch
        draws = uniforms(seed, indices, 4)
        whole = torch.zeros(len(indices), dtype=torch.bool)
        boxes = CropViews(boxes_of(draws, (LEAST_AREA, 1.0)), whole, torch.arange(len(indices)), torch.zeros(4).long())
        return batch.replace(image=show(batch["image"], boxes), view=torch.full_like(indices, seed))


@cache
def teacher(seed: int) -> LiveTeacher:
    """The seed's classifier, trained on real digits: squeeze."""
    network = build_model(NETWORK, data().train.info(), 1000 + seed)
    train = data().train
    images = train.images(torch.arange(len(train)))
    source = Cropped(images, train.labels, classes=CLASSES, normalisation=train.normalisation)
    return LiveTeacher(fit("supervised", network, source, TEACHER, seed))


def recovered(seed: int, **options: Any) -> ArraySource:
    """A set recovered from the seed's teacher, as it is stored."""
    reseed(seed, "noise")
    begun = SyntheticSet.initialise(data().train, PER_CLASS, "noise", seed=derive(seed, "set"))
    made = fit("cda", begun, data().train, IMAGES, seed, teacher=teacher(seed), **VIEWS, **options)
    assert isinstance(made, SyntheticSet)
    mean, std = data().train.normalisation
    pixels = to_bytes(made.images.detach(), torch.tensor(mean), torch.tensor(std))
    return ArraySource(pixels, made.labels, classes=CLASSES, normalisation=(mean, std))


def taught(seed: int, source: ArraySource) -> float:
    """Accuracy on real digits of a fresh student that saw these images alone: relabel, and training."""
    network = build_model(NETWORK, data().train.info(), seed)
    student = fit("fkd", network, source, STUDENT, seed, teacher=teacher(seed), flip=0.0, cutmix=0.0)
    return float(evaluate(student, data().validation)["accuracy"])


def real(seed: int) -> ArraySource:
    """As many real digits, drawn at random."""
    train = data().train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    rows = [order[train.labels[order] == label][:PER_CLASS] for label in range(CLASSES)]
    return train.select(torch.cat(rows))


def run(seed: int) -> Mapping[str, float]:
    """Accuracy of a student trained on a set of each kind."""
    figures = {arm: taught(seed, recovered(seed, **options)) for arm, options in ARMS.items()}
    figures["random real"] = taught(seed, real(seed))
    return figures | {"teacher": float(evaluate(teacher(seed).model, data().validation)["accuracy"])}


claim = Claim(
    slug="cda",
    statement="Five images a class recovered with a cosine curriculum of crops teach a fresh student more than those "
    "recovered with crops of all sizes throughout (SRe2L), and no less than those never cropped.",
    metric="accuracy",
    budget=f"{PER_CLASS} images of {SIDE} x {SIDE} a class, {RECOVERY} steps of Adam at 0.25, from one teacher; "
    f"students trained {STUDENT_STEPS} steps of {STUDENT_BATCH} with FKD; measured on real digits held out",
    claimed="cda",
    baseline="sre2l",
    margin=0.015,
    also={"whole images": -0.01},
    methods={"sre2l": "sre2l"},
    run=run,
    seeds=6,
)

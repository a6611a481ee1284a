"""FKD: a crop's own soft label teaches more than its image's label does, hard or soft.

The digits recovered for CDA's claim, and its networks. All arms see the same crops of the same images in the same order
from the same first weights; they differ in what a crop is said to be.

Every arm had six settings tried on seeds 100 and 101, and keeps the best by the mean: rates of 0.001 and 0.003 with and
without CutMix, 0.01 and 0.03 without it. Of a pasted crop FKD's teacher saw the whole, and the labels of images were
mixed by the share of the area. CutMix, which the papers use, gained no arm anything on average at this size. The means
kept are 0.69 for FKD, 0.34 for hard labels and 0.41 for soft ones of images; margins are half of the differences. The
soft labels of images were tried at FKD's temperature alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from claims.cda import CLASSES, NETWORK, PER_CLASS, SIDE, STUDENT_BATCH, STUDENT_STEPS, data, recovered, teacher
from claims.claim import Claim
from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.distributed import World
from limbeck.core.method import Update
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.source import ArraySource
from limbeck.methods.datasets.fkd import FastKnowledgeDistillation
from limbeck.metrics.classification import evaluate
from limbeck.models.build import build_model
from limbeck.objectives.logits import soft_cross_entropy
from limbeck.synthesis.soft_labels import kept_share, show


class SoftImages(FastKnowledgeDistillation):
    """One soft label an image: what the teacher says of the whole of it, whichever crop is shown."""

    def step(self, batch: Batch) -> Iterator[Update]:
        """The divergence from labels that are mixed as the images are, but for what no weight changes."""
        views, warmth = self.views(batch), self.options.temperature
        share = kept_share(views, (SIDE, SIDE))
        labels = self.labels(batch)
        mixed = share * labels + (1 - share) * labels[views.partners]
        shown = batch.replace(image=show(batch["image"], views))
        logits = logits_of(call(self.student, shown))
        loss = soft_cross_entropy(logits, warmth * mixed.log(), temperature=warmth) / warmth**2
        yield Update("student", loss, batch.size)

    @torch.no_grad()
    def labels(self, batch: Batch) -> Tensor:
        """Probabilities (items, classes), of images uncropped."""
        assert self.teacher is not None
        logits = self.teacher.signal(batch).logits
        assert logits is not None
        return functional.softmax(logits / self.options.temperature, 1)


class HardLabels(SoftImages):
    """The class that each image was recovered for."""

    def labels(self, batch: Batch) -> Tensor:
        """See `SoftImages.labels`."""
        return functional.one_hot(batch["label"], CLASSES).float()


VIEWS: dict[str, Any] = {"flip": 0.0, "cutmix": 0.0}
ARMS: dict[str, tuple[type[FastKnowledgeDistillation], float, dict[str, Any]]] = {
    "fkd": (FastKnowledgeDistillation, 3e-2, {}),
    "hard labels": (HardLabels, 3e-3, {"temperature": 1.0}),
    "one soft label an image": (SoftImages, 1e-2, {}),
}


def taught(seed: int, source: ArraySource, arm: str) -> float:
    """Accuracy on real digits of a fresh student that saw these images alone, labelled as the arm does it."""
    kind, rate, options = ARMS[arm]
    student = build_model(NETWORK, data().train.info(), seed)
    method = kind(kind.Options(**VIEWS, **options), student=student, teacher=teacher(seed), data=source.info())
    optimizer = OptimizerSpec(lr=rate, weight_decay=0.01)
    spec = TrainSpec(steps=STUDENT_STEPS, batch_size=STUDENT_BATCH, optimizer=optimizer)
    loader = Loader(source, STUDENT_BATCH, seed)
    Trainer(method, loader, spec, steps=STUDENT_STEPS, items=len(source), seed=seed, world=World()).fit()
    return float(evaluate(student, data().validation)["accuracy"])


def run(seed: int) -> Mapping[str, float]:
    """Accuracy of a student trained with labels of each kind on the recovered images."""
    images = recovered(seed)
    figures = {arm: taught(seed, images, arm) for arm in ARMS}
    return figures | {"teacher": float(evaluate(teacher(seed).model, data().validation)["accuracy"])}


claim = Claim(
    slug="fkd",
    statement="On the same crops of the same recovered images, a student learns more from the teacher's soft label of "
    "each crop than from the images' classes, and than from one soft label an image.",
    metric="accuracy",
    budget=f"{PER_CLASS} images of {SIDE} x {SIDE} a class, recovered as in the claim of `cda`; students trained "
    f"{STUDENT_STEPS} steps of {STUDENT_BATCH} with AdamW, cosine, each arm at the best of four rates; "
    "measured on real digits held out",
    claimed="fkd",
    baseline="hard labels",
    margin=0.17,
    also={"one soft label an image": 0.14},
    run=run,
    seeds=5,
)

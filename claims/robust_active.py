"""RAD: questions that the teacher can answer, and that the student still gains from.

Forty labelled digits train teacher and student; a hundred more measure the teacher's error; of the other digits of the
training set 150 are asked about. Margins alone ask where the teacher, trained on as little, is wrong too. What is
claimed is the share of right answers; each arm's mean gain of what was asked (1 less the student's margin) stands
beside it, because random questions are answered best of all and ask what the student knows already. The accuracy of
the student is noted too. The setting was chosen on seeds 100 to 111. On seeds 0 to 4 another one had been seen (two
hidden layers, half the steps: 4.3 points, three seeds of five), this one had not.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from claims.claim import Claim
from limbeck.core.distributed import World
from limbeck.core.method import Method, ProcedureContext
from limbeck.core.registry import method_class
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import DataSplit, open_data
from limbeck.data.querying import look
from limbeck.data.split import split_pool
from limbeck.metrics.classification import evaluate
from limbeck.models.build import build_model
from limbeck.objectives.uncertainty import uncertainty

LABELLED, HOLDOUT, BUDGET = 40, 100, 150
STEPS, TEACHER_STEPS, BATCH, LR, TEACHER_LR = 600, 300, 32, 1e-3, 3e-3
SELECTORS = ("rad", "margin", "entropy", "random", "k-centre", "cluster-margin")


@cache
def data() -> DataSplit:
    """The digits."""
    return open_data(DataSpec())


def teacher(seed: int) -> LiveTeacher:
    """A perceptron eight times as wide as the student, trained on the student's labels."""
    source = data().train
    known = source.select(split_pool(source.labels, LABELLED, HOLDOUT, seed).labelled)
    network = build_model(ModelSpec(name="mlp", arguments={"width": 256, "depth": 1}), source.info(), 1000 + seed)
    kind = method_class("supervised")
    method = kind(kind.Options(), student=network, data=known.info())
    assert isinstance(method, Method)
    spec = TrainSpec(steps=TEACHER_STEPS, batch_size=BATCH, optimizer=OptimizerSpec(lr=TEACHER_LR))
    Trainer(
        method, Loader(known, BATCH, seed), spec, steps=TEACHER_STEPS, items=LABELLED, seed=seed, world=World()
    ).fit()
    return LiveTeacher(network)


def bought(selector: str, seed: int, who: LiveTeacher) -> dict[str, float]:
    """One round with a selector: share of right answers, mean gain of the items, and the student's accuracy."""
    kind, source = method_class("robust-active"), data().train
    sizes = {"labelled": LABELLED, "holdout": HOLDOUT, "budget": BUDGET}
    options = kind.Options(selector=selector, **sizes, steps=STEPS, batch_size=BATCH, lr=LR)
    student = build_model(ModelSpec(name="mlp", arguments={"width": 32, "depth": 1}), source.info(), seed)
    gains = torch.zeros(len(source))
    with TemporaryDirectory() as folder:

        def log(row: Mapping[str, object]) -> None:
            if "queries" in row:  # the student is the one that has chosen, and not trained on yet
                gains.copy_(uncertainty(look(student, source, torch.arange(len(source)))[0]))

        made = kind(options, student=student, teacher=who, data=source.info())
        made.run(ProcedureContext(source, Path(folder), seed, log, lambda *a: None))
    rows = made.bought.rows
    right = made.bought.answers.argmax(1) == source.labels[rows]
    return {
        "right": float(right.float().mean()),
        "gain": float(gains[rows].mean()),
        "accuracy": float(evaluate(student, data().validation)["accuracy"]),
    }


def run(seed: int) -> Mapping[str, float]:
    """Share of right answers by selector, and, for reference, mean gains and accuracies."""
    who = teacher(seed)
    found = {selector: bought(selector, seed, who) for selector in SELECTORS}
    gains = {f"{selector} (mean gain)": one["gain"] for selector, one in found.items()}
    scores = {
        f"{selector} (student's accuracy)": found[selector]["accuracy"] for selector in ("rad", "margin", "random")
    }
    return {selector: one["right"] for selector, one in found.items()} | gains | scores


claim = Claim(
    slug="robust-active",
    statement="Robust selection buys more right answers than margins do, where the teacher knows little more itself.",
    metric="share of right answers",
    budget=(
        f"{BUDGET} questions after {STEPS} steps of {BATCH} of {LABELLED} labelled digits, AdamW at {LR}; MLP 1x32 "
        "from an MLP 1x256 trained on the same digits"
    ),
    claimed="rad",
    baseline="margin",
    margin=0.08,
    also={"entropy": 0.08},
    run=run,
)

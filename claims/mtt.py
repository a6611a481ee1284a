"""MTT: one image a class along which training goes the way of experts on real data teaches more than a real one.

The experts are those of the claim of `ftd`, trained by plain SGD; so the networks that learn from the images are
perceptrons too, twice as wide. Networks on distilled images take the step size that was distilled with them. The rate
was chosen among 3, 10 and 50 on seed 100: with 50, the recipe's for five images a class, the images fell apart.
"""

from collections.abc import Mapping

from claims.claim import Claim
from claims.ftd import BATCH, COUNT, EPOCHS, LR, experts
from claims.synthetic_digits import PROTOCOL, data, started
from limbeck.core.distributed import World
from limbeck.core.method import Method
from limbeck.core.randomness import derive
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.metrics.synthetic import Trial
from limbeck.synthesis.synthetic_set import SyntheticSet

STEPS, INNER, SEGMENT, LATEST, RATE = 300, 20, 2, 10, 3.0


def distilled(seed: int) -> SyntheticSet:
    """The set that MTT makes of the seed's first images; its step size begins as the experts'."""
    train, kind = data().train, method_class("mtt")
    images = SyntheticSet.initialise(train, 1, seed=derive(seed, "claim"), lr=LR)
    options = kind.Options(steps=INNER, segment=SEGMENT, latest=LATEST, augmentation=False)
    method = kind(options, student=images, teacher=LiveTeacher(experts(seed, 0.0)), data=train.info())
    assert isinstance(method, Method)
    own = {"log_lr": 0.05 / RATE}  # the logarithm of the step size moves at a rate of 0.05
    optimizer = OptimizerSpec(name="sgd", lr=RATE, momentum=0.5, schedule="constant", lr_multipliers=own)
    spec = TrainSpec(steps=STEPS, batch_size=8, optimizer=optimizer)
    Trainer(method, Loader(train, 8, seed), spec, steps=STEPS, items=len(train), seed=seed, world=World()).fit()
    return images


def accuracy(images: SyntheticSet) -> float:
    """The mean accuracy of the perceptrons that are trained on a set."""
    lr = None if images.lr is None else float(images.lr.detach())
    parts = (part.detach() for part in images())
    found = Trial(data().validation, PROTOCOL).accuracies(*parts, lr=lr, network="mlp")
    return sum(found) / len(found)


def run(seed: int) -> Mapping[str, float]:
    """One seed: sets of one image a class."""
    return {
        "random": accuracy(started(seed, 1)),
        "herding": accuracy(started(seed, 1, "herding")),
        "mtt": accuracy(distilled(seed)),
    }


claim = Claim(
    slug="mtt",
    statement="Perceptrons learn more from one image a class that was distilled along trajectories than from a real "
    "one, drawn or chosen by herding.",
    metric="accuracy",
    budget=f"{STEPS} steps of {INNER} on all images at rate {RATE}, for {SEGMENT} epochs of one of {COUNT} experts "
    f"(MLP 64-48-10, {EPOCHS} epochs of {BATCH} of 1,438 digits); accuracy of {PROTOCOL.networks} perceptrons of width "
    f"128, {PROTOCOL.steps} steps of SGD, on 359 other digits",
    claimed="mtt",
    baseline="random",
    margin=0.08,
    run=run,
    also={"herding": 0.02},
    seeds=3,
)

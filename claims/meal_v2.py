"""MEAL V2: two teachers raise a student that is trained already, without labels and where more labels' steps do not.

The paper's other point, that the student's own trained weights are needed, is not seen: a perceptron on digits learns
as well "from scratch", with as many steps in all. Nor does the discriminator matter beyond a seed's chance.
"""

import copy
from collections.abc import Mapping

from claims.claim import Claim
from claims.families import BATCH, STUDENT, accuracy, fit, network, rows
from limbeck.core.specs import ModelSpec
from limbeck.core.teacher import Ensemble, LiveTeacher

TEACHER = ModelSpec(name="convnet", arguments={"width": 16})
ITEMS, HALF = 100, 500
FIRST_STEPS, STEPS, LR = 400, 600, 2e-3
TEACHER_STEPS = 300
AUGMENT = ("crop",)
NO_GAME = {"adversarial": "none"}
ARMS = {
    "meal-v2": {},
    "no discriminator": NO_GAME,
    "as in the code": {"adversarial": "cooperative", "final_relu": True},
    "with labels": {"label_weight": 1.0},
}


def run(seed: int) -> Mapping[str, float]:
    """Accuracy of a perceptron after its second training, of each kind."""
    shown, measured = rows(seed, 0, ITEMS, AUGMENT), rows(seed, 2 * HALF)
    halves = [rows(seed, 0, HALF, AUGMENT), rows(seed, HALF, 2 * HALF, AUGMENT)]
    nets = [
        fit("supervised", network(TEACHER, 1000 + 2 * seed + number), half, seed, TEACHER_STEPS, LR)
        for number, half in enumerate(halves)
    ]
    alone = [LiveTeacher(net) for net in nets]
    begun = fit("supervised", network(STUDENT, seed), shown, seed, FIRST_STEPS, LR)

    def then(slug: str, *teachers: LiveTeacher, **options: object) -> float:
        """The student after a second training, on other batches than the first."""
        listened = Ensemble(teachers) if len(teachers) > 1 else next(iter(teachers), None)
        student = fit(slug, copy.deepcopy(begun), shown, 10_000 + seed, STEPS, LR, listened, **options)
        return accuracy(student, measured)

    figures = {"start": accuracy(begun, measured), "further labels": then("supervised")}
    figures["one teacher"] = sum(then("meal-v2", one) for one in alone) / 2
    figures |= {arm: then("meal-v2", *alone, **options) for arm, options in ARMS.items()}
    untrained, steps = network(STUDENT, seed), FIRST_STEPS + STEPS
    scratch = fit("meal-v2", untrained, shown, 10_000 + seed, steps, LR, Ensemble(alone))
    figures["from scratch"] = accuracy(scratch, measured)
    return figures | {f"teacher {number}": accuracy(net, measured) for number, net in enumerate(nets, 1)}


claim = Claim(
    slug="meal-v2",
    statement="A trained student gains more from the mean of two teachers' probabilities, without any label, than from "
    "further training on its labels, no less than from one teacher, and labels on top add little.",
    metric="accuracy",
    budget=f"{STEPS} steps of {BATCH} of {ITEMS} digits after {FIRST_STEPS} on labels (from scratch: "
    f"{FIRST_STEPS + STEPS}), AdamW at {LR}, cosine; MLP 64-32-32-32-10 from two ConvNets of width 16 that saw {HALF} "
    "digits each",
    claimed="meal-v2",
    baseline="further labels",
    margin=0.01,
    also={"one teacher": 0.0, "with labels": -0.015},
    run=run,
)

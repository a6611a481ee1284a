"""OFA: of a weak teacher, soft labels that lean towards the label teach more than plain ones.

The student sees the objective alone here, no cross-entropy, so that the leaning is all that differs; the arm "with
exits" adds those. The arms of "strong teacher", judged by nobody, compare with other methods where labels are few.
There the paper's order, OFA before Hinton's distillation before FitNets' hints, is seen at temperature 1 and with plain
soft labels in the exits only: a perceptron gains most from the teacher's logits at temperature 4, and leaning towards
the label gives away what a strong teacher knows. Hints on the last feature harm it in some seeds.
"""

from collections.abc import Mapping

from torch import nn

from claims.claim import Claim
from claims.families import BATCH, STUDENT, TEACHER, accuracy, fit, network, rows
from limbeck.core.teacher import LiveTeacher
from limbeck.models.convnet import ConvNet

STEPS, LR = 300, 2e-3
WEAK_LABELS, WEAK_STUDENT = 60, 460
LABELLED, SEEN_BY_TEACHER = 100, 1000
OBJECTIVE_ALONE = {"label_weight": 0.0, "exit_weight": 0.0}
WEAK_ARMS = {
    "plain soft labels": {"power": 1.0, **OBJECTIVE_ALONE},
    "ofa-kd": OBJECTIVE_ALONE,
    "power 2": {"power": 2.0, **OBJECTIVE_ALONE},
    "with exits": {"label_weight": 0.0},
}
LAST = {"student_layers": ["stages.2"], "teacher_layers": ["2"]}
STRONG_ARMS = {
    "labels alone": ("supervised", {}),
    "kd": ("kd", {"label_weight": 1.0, "weight": 1.0}),
    "kd at temperature 1": ("kd", {"label_weight": 1.0, "weight": 1.0, "temperature": 1.0}),
    "fitnet": ("fitnet", LAST),
    "ofa-kd": ("ofa-kd", {}),
    "ofa-kd, power 1": ("ofa-kd", {"power": 1.0}),
}


def teacher(seed: int, stop: int) -> LiveTeacher:
    """A convolutional network trained on the first digits; its layer 2 gives the last feature as a vector."""
    made = network(TEACHER, 1000 + seed)
    fit("supervised", made, rows(seed, 0, stop), seed, STEPS, LR)
    assert isinstance(made, ConvNet)
    return LiveTeacher(nn.Sequential(made.stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), made.head))


def run(seed: int) -> Mapping[str, float]:
    """Accuracy of a perceptron trained in each way."""
    weak, shown, measured = teacher(seed, WEAK_LABELS), rows(seed, WEAK_LABELS, WEAK_STUDENT), rows(seed, WEAK_STUDENT)
    figures = {"the teacher itself": accuracy(weak.model, measured)}
    for arm, options in WEAK_ARMS.items():
        student = fit("ofa-kd", network(STUDENT, seed), shown, seed, STEPS, LR, weak, **options)
        figures[arm] = accuracy(student, measured)
    strong, shown, measured = teacher(seed, SEEN_BY_TEACHER), rows(seed, 0, LABELLED), rows(seed, SEEN_BY_TEACHER)
    for arm, (slug, options) in STRONG_ARMS.items():
        listened = strong if slug != "supervised" else None
        student = fit(slug, network(STUDENT, seed), shown, seed, STEPS, LR, listened, **options)
        figures[f"strong teacher: {arm}"] = accuracy(student, measured)
    return figures | {"strong teacher: itself": accuracy(strong.model, measured)}


claim = Claim(
    slug="ofa-kd",
    statement="Taught by a weak convolutional network, a perceptron learns more from soft labels that lean towards the "
    "label (epsilon 1.5) than from plain ones, and becomes better than its teacher.",
    metric="accuracy",
    budget=f"{STEPS} steps of {BATCH} of 400 digits, AdamW at {LR}, cosine; MLP 64-32-32-32-10 from ConvNet of width "
    f"24 that saw {WEAK_LABELS} others; strong teachers saw {SEEN_BY_TEACHER}, their students {LABELLED} of these",
    claimed="ofa-kd",
    baseline="plain soft labels",
    margin=0.025,
    also={"the teacher itself": 0.0},
    run=run,
)

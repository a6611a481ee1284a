"""Hinton KD: a small student learns more from softened logits than from labels alone."""

from claims.claim import Claim
from claims.digits import BUDGET, against_alone

claim = Claim(
    slug="kd",
    statement="With few labels, a student that also matches its teacher's softened logits beats the student alone.",
    metric="accuracy",
    budget=BUDGET,
    claimed="kd",
    baseline="student alone",
    margin=0.01,
    run=against_alone("kd"),
)

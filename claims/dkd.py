"""DKD: weighing target and non-target classes apart helps a student beyond its labels."""

from claims.claim import Claim
from claims.digits import BUDGET, against_alone

claim = Claim(
    slug="dkd",
    statement="With few labels, a student that weighs target and other classes apart beats the student alone.",
    metric="accuracy",
    budget=BUDGET,
    claimed="dkd",
    baseline="student alone",
    margin=0.01,
    run=against_alone("dkd"),
)

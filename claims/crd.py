"""CRD: contrasting the teacher's representation helps a student."""

from claims.claim import Claim
from claims.digits import BUDGET, against_alone

claim = Claim(
    slug="crd",
    statement="With few labels, a student that contrasts its teacher's representation beats the student alone.",
    metric="accuracy",
    budget=BUDGET,
    claimed="crd",
    baseline="student alone",
    margin=0.01,
    run=against_alone("crd"),
)

"""FitNets: a hint from a middle layer helps a thinner student."""

from claims.claim import Claim
from claims.digits import BUDGET, against_alone

claim = Claim(
    slug="fitnet",
    statement="With few labels, a student whose middle layer reproduces its teacher's beats the student alone.",
    metric="accuracy",
    budget=BUDGET,
    claimed="fitnet",
    baseline="student alone",
    margin=0.01,
    run=against_alone("fitnet"),
)

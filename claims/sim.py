"""SIM: a one-step student by the pseudo-Huber distance between scores, against one by SiD's loss.

The toy of DMD2's claim: eight Gaussians of deviation 0.3 on a circle of radius 2, the exact teacher, student and fake
score as EDM networks of width 128, five updates of the fake score for one of the student. Both arms have the same
initial weights, batches, optimizers and learning rates, which stay constant; they differ in the loss alone. Both move
about at the end, SiD's with peaks, so the mean over the last 200 updates is compared, without averaged weights; medians
are told beside it. On the trial seed 100 SIM was at 0.120 (median 0.105) and SiD at 0.187 (median 0.116): there the
peaks are most of the difference. The margin is the spec's 15 % of SiD's mean on that seed.

On the seeds of the claim SiD had no such peaks, and was closer on two of three. The spec's trial, on one seed, saw
SIM ahead after 600 and 1,500 updates.
"""

from collections.abc import Mapping
from statistics import mean, median

from torch import nn

from claims.claim import Claim
from claims.dmd2 import PROCESS, RANGE, SHARED
from claims.points import distance, drawn_from, network, train, with_process
from limbeck.diffusion.denoiser import denoiser_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser

UPDATES, RATIO, EVERY, LAST = 500, 5, 20, 10
CRITIC = {"critic_time_mean": -0.7, "critic_time_std": 1.3, "critic_updates": RATIO}
ARMS = {
    "SIM, pseudo-Huber": {"distance": "pseudo-huber", "c": 0.1},
    "SiD, alpha 1.2": {"distance": "sid", "alpha": 1.2},
}


def run(seed: int) -> Mapping[str, float]:
    """One seed of both arms: the mean over the last evaluations."""
    mixture = GaussianMixtureDenoiser.ring(RANGE, radius=2.0, std=0.3)
    source = drawn_from(mixture, 20000, seed)
    figures = {}
    for name, options in ARMS.items():
        seen: list[float] = []

        def measure(student: nn.Module, seen: list[float] = seen) -> Mapping[str, float]:
            seen.append(distance(lambda noise: generate(denoiser_of(student), noise), mixture, seed))
            return {}

        student = with_process(network(seed), PROCESS)
        learning = {"lr": 3e-4, "rates": {"critic": 1e-3}, "measure": measure, "every": EVERY * RATIO}
        train(
            "sim",
            student,
            source,
            seed,
            steps=UPDATES * RATIO,
            teacher=mixture,
            **{**SHARED, **CRITIC, **learning, **options},
        )
        figures[name] = mean(seen[-LAST:])
        figures[f"{name}: median"] = median(seen[-LAST:])
    return figures


claim = Claim(
    slug="sim",
    statement="Trained by the pseudo-Huber distance between scores, samples end closer to the data than by SiD's loss "
    "with alpha 1.2.",
    metric=f"sliced Wasserstein distance, mean of the last {LAST} evaluations; their median in the rows that say so",
    budget=f"{UPDATES} updates of the student of 256 items at 3e-4, {UPDATES * RATIO} of the fake score at 1e-3, Adam; "
    f"evaluated every {EVERY} updates on 4,000 samples",
    claimed="SIM, pseudo-Huber",
    baseline="SiD, alpha 1.2",
    margin=0.028,
    higher_is_better=False,
    run=run,
    seeds=3,
)

"""iCT: from data alone, one step of improved consistency training against one of consistency training.

The conditions are those of the spec's own trial (seeds of its own): eight Gaussians of deviation 0.5 over all. Margins
were set from that trial, before this was run. The baseline has the same learning rate; it was not tuned for it.

What was seen: the gain over consistency training is twice its margin in every seed. That an averaged target is worse
shows at two steps, not at one, where here it is better; the claim as a whole is therefore recorded as not holding.
"""

from collections.abc import Mapping
from functools import partial

from claims.claim import Claim
from claims.points import distance, drawn_from, network, train
from limbeck.diffusion.denoiser import denoiser_of
from limbeck.diffusion.generation import generate
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.schedules import EDM

STEPS, BATCH = 3000, 256


def run(seed: int) -> Mapping[str, float]:
    """Sliced Wasserstein distance of each arm, at one step and at two."""
    mixture = GaussianMixtureDenoiser.ring(EDM(), radius=0.7, std=0.05)
    source = drawn_from(mixture, 20000, seed)
    shared = {"steps": STEPS, "batch": BATCH, "optimizer": "radam", "schedule": "constant", "ema": 0.99}
    improved = {"first_scales": 10, "last_scales": 160}
    arms = {
        "ict": train("ict", network(seed), source, seed, **shared, **improved),
        "ict, averaged target": train(
            "ict", network(seed), source, seed, **shared, **improved, target="average", target_decay=0.99
        ),
        "consistency training": train("consistency-training", network(seed), source, seed, **shared),
    }
    figures = {}
    for name, student in arms.items():
        for steps in (1, 2):
            sampler = partial(generate, denoiser_of(student.eval()), steps=steps)
            figures[name if steps == 1 else f"{name}, two steps"] = distance(sampler, mixture, seed)
    return figures


claim = Claim(
    slug="ict",
    statement="One step of a generator trained with all of iCT's changes is closer to the data than one of consistency "
    "training, and than one with an averaged target alone changed back.",
    metric="sliced Wasserstein distance",
    budget=f"{STEPS} steps of {BATCH}, RAdam at 1e-3, MLP of width 128 and depth 3; 4,000 samples",
    claimed="ict",
    baseline="consistency training",
    margin=0.15,
    also={"ict, averaged target": 0.02},
    higher_is_better=False,
    run=run,
    seeds=3,
)

"""InstaFlow: straighten the flow first, then one step is easy to learn.

The teacher is the exact 1-rectified flow of the eight Gaussians, from independent noise. Its pairs (20,000, 100 Heun
steps) train a network by reflow, and that network's pairs (25 Heun steps, the same noise) train its one-step student.
Distilling the teacher's pairs directly gets the same network and as many steps in all, in one run. With shuffled noise
the pairs are an independent coupling again, and reflow on them is plain flow matching. Two rows are no distances but
the straightness E int |X1 - X0 - v|^2 of the two flows, for reference.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from claims.claim import Claim
from claims.points import distance, drawn_from, network, train
from limbeck.core.randomness import reseed
from limbeck.data.pairs import PairSource
from limbeck.diffusion.denoiser import Denoiser, denoiser_of
from limbeck.diffusion.generation import generate, guided_model
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.pairs import PairSampling, endpoints
from limbeck.diffusion.rectified import straightness
from limbeck.diffusion.schedules import FlowMatching

PAIRS, REFLOW, DISTIL = 20_000, 2000, 2000
EXACT = {"solver": "heun", "solver_steps": 100}
LEARNED = {"solver": "heun", "solver_steps": 25}


def one_step(model: nn.Module, mixture: GaussianMixtureDenoiser, seed: int) -> float:
    """Distance of samples by one Euler step."""
    denoiser = denoiser_of(model)
    return distance(lambda noise: generate(denoiser, noise, steps=1, solver="euler"), mixture, seed)


def straight(denoiser: Denoiser, seed: int) -> float:
    """Straightness of a flow along its own paths."""
    reseed(seed, "straightness")
    noise = torch.randn(4000, 2)
    data = endpoints(denoiser, noise, how=PairSampling(solver="heun", steps=100))
    return float(straightness(guided_model(denoiser), noise, data))


def two_stages(pairs: object, mixture: nn.Module, seed: int) -> tuple[nn.Module, nn.Module]:
    """(the reflowed network, its one-step student)."""
    fresh, again = network(seed), network(seed)
    common = {"initialise": "none", **EXACT}
    flow = train("instaflow", fresh, pairs, seed, steps=REFLOW, teacher=mixture, **common)
    student = train("instaflow", again, pairs_of(pairs), seed, steps=DISTIL, teacher=flow, phase="distil", **LEARNED)
    return flow, student


def pairs_of(source: object) -> object:
    """The same items without their pairs, so that the next teacher makes its own."""
    if not isinstance(source, PairSource):
        return source
    from claims.points import PointSource

    return PointSource(source.rows["image"])


def shuffled(mixture: GaussianMixtureDenoiser, seed: int) -> PairSource:
    """The teacher's data, each beside another's noise."""
    reseed(seed, "shuffled")
    noise = torch.randn(PAIRS, 2)
    data: Tensor = endpoints(mixture, noise, how=PairSampling(solver="heun", steps=100))
    return PairSource({"noise": noise[torch.randperm(PAIRS)], "image": data})


def run(seed: int) -> Mapping[str, float]:
    """One seed of all arms."""
    mixture = GaussianMixtureDenoiser.ring(FlowMatching())
    source = drawn_from(mixture, PAIRS, seed)
    flow, student = two_stages(source, mixture, seed)
    _, random = two_stages(shuffled(mixture, seed), mixture, seed)
    options = {"phase": "distil", "initialise": "none", **EXACT}
    direct = train("instaflow", network(seed), source, seed, steps=REFLOW + DISTIL, teacher=mixture, **options)
    return {
        "reflow, distilled": one_step(student, mixture, seed),
        "distilled directly": one_step(direct, mixture, seed),
        "reflow, one Euler step": one_step(flow, mixture, seed),
        "teacher, one Euler step": one_step(mixture, mixture, seed),
        "reflow of shuffled pairs, distilled": one_step(random, mixture, seed),
        "straightness of the reflow": straight(denoiser_of(flow), seed),
        "straightness of the teacher": straight(mixture, seed),
    }

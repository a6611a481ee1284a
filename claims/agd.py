"""AGD: adapters that are trained where guided sampling goes, against the same adapters on noised data.

The teacher is a network of four residual layers on scikit-learn's digits, sampled in 50 DDIM steps with guidance. Both
arms train the same adapters, at most a tenth of its weights, from the same start with equal budgets and scales of 1 to
6: on the states of as many guided paths as there are training digits, or on those digits with noise, at the same times.
(On trial seed 100, 200 paths left 0.32 after 600 steps and 0.34 after 1,200; one path a digit 0.23 after 800.) The
figure is the squared error of the one guided evaluation at g = 4 on the states of 200 fresh guided paths, in units of
what guidance adds to the conditional prediction: the network without adapters is at 1. Further rows: the same error at
g = 7, beyond what was trained, and shares of samples in which a judge, fitted to the other digits, sees the class that
was asked for. The margin is a fifth of what the noised data left on the trial seed.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from claims.claim import Claim
from claims.points import train
from limbeck.core.randomness import reseed
from limbeck.core.specs import DataSpec
from limbeck.data.open import DataSplit, open_data
from limbeck.diffusion.denoiser import NetworkDenoiser
from limbeck.diffusion.generation import generate, guided_model
from limbeck.diffusion.grids import usual_times
from limbeck.diffusion.solvers import path
from limbeck.models.denoising_mlp import DenoisingMLP

STEPS, WIDTH, GUIDANCE = 50, 256, 4.0
TEACHER, STUDENT = 1500, 800
ADAPTERS: dict[str, Any] = {"adapter": "attention", "hidden": 16, "heads": 8, "label": "base", "time": "base"}


@cache
def data() -> DataSplit:
    """The digits, in [-1, 1]."""
    return open_data(DataSpec(name="digits", mean=[0.5], std=[0.5]))


def teacher(seed: int) -> nn.Module:
    """The seed's teacher, trained to do without its class in one case of ten."""
    reseed(seed, "teacher")
    network = DenoisingMLP(numbers=64, classes=10, width=WIDTH, depth=4)
    arguments: dict[str, Any] = {"steps": TEACHER, "batch": 128, "lr": 2e-3, "guidance": GUIDANCE}
    return train("denoising", network, data().train, seed, **arguments).eval()


def adapted(parent: nn.Module, seed: int, kind: str) -> nn.Module:
    """The teacher's network with adapters, trained on one kind of states."""
    options: dict[str, Any] = {"data": kind, "solver": "ddim", "path_steps": STEPS, **ADAPTERS}
    student = copy.deepcopy(parent)
    return train("agd", student, data().train, seed, steps=STUDENT, batch=64, lr=2e-3, teacher=parent, **options).eval()


def noise(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Where paths to measure on start, and their classes."""
    reseed(seed, "measure")
    return torch.randn(200, 1, 8, 8), {"label": torch.arange(200) % 10}


@torch.no_grad()
def error(model: nn.Module, parent: nn.Module, seed: int, scale: float) -> float:
    """Squared error of the guided prediction on fresh guided paths, over what guidance adds to the conditional one."""
    start, condition = noise(seed)
    denoiser, theirs = NetworkDenoiser(model), NetworkDenoiser(parent)
    times = usual_times(theirs.schedule, STEPS)
    states = path(guided_model(theirs, condition, scale), start, times)
    gap = added = torch.zeros(())
    for state, time in zip(states[:-1], times[:-1], strict=True):
        t = time.expand(len(state))
        target = guided_model(theirs, condition, scale)(state, t).value
        gap = gap + (guided_model(denoiser, condition, scale)(state, t).value - target).square().mean()
        added = added + (theirs(state, t, condition).value - target).square().mean()
    return float(gap / added)


@torch.no_grad()
def judged(model: nn.Module, seed: int, scale: float) -> float:
    """Share of samples in which the judge sees the class that was asked for."""
    start, condition = noise(seed + 1000)
    samples = generate(NetworkDenoiser(model), start, condition, steps=STEPS, guidance=scale).flatten(1)
    return float(_judge().score(samples.double().numpy(), condition["label"].numpy()))


@cache
def _judge() -> Any:
    held = data().validation.fetch(torch.arange(len(data().validation)))
    return LogisticRegression(max_iter=2000).fit(held["image"].flatten(1).double().numpy(), held["label"].numpy())


def run(seed: int) -> Mapping[str, float]:
    """One seed of all arms."""
    parent = teacher(seed)
    student, plain = (adapted(parent, seed, kind) for kind in ("trajectories", "forward-noised"))
    weights = {name: value for name, value in student.state_dict().items() if name.startswith("network.")}
    assert all(torch.equal(weights[f"network.{name}"], value) for name, value in parent.state_dict().items())
    own = sum(value.numel() for value in student.parameters() if value.requires_grad)
    return {
        "guided paths": error(student, parent, seed, GUIDANCE),
        "noised data": error(plain, parent, seed, GUIDANCE),
        "no adapters": 1.0,
        "(guided paths, g = 7)": error(student, parent, seed, 7.0),
        "(noised data, g = 7)": error(plain, parent, seed, 7.0),
        "(judged, guided paths)": judged(student, seed, GUIDANCE),
        "(judged, noised data)": judged(plain, seed, GUIDANCE),
        "(judged, teacher with guidance)": judged(parent, seed, GUIDANCE),
        "(judged, teacher without)": judged(parent, seed, 1.0),
        "(weights of adapters / network)": own / sum(value.numel() for value in parent.parameters()),
    }


claim = Claim(
    slug="agd",
    statement="Adapters that were trained where guided sampling goes are closer to guidance there, in one evaluation.",
    metric="squared error of the guided prediction at g = 4, over that of the conditional one",
    budget=f"{STUDENT} steps of 64, AdamW at 2e-3, cosine; the same adapters, at most a tenth of the network's weights",
    claimed="guided paths",
    baseline="noised data",
    margin=0.07,
    also={"no adapters": 0.5},
    run=run,
    higher_is_better=False,
    seeds=3,
)

import math
from functools import cache

import pytest
import torch

from limbeck.diffusion import solvers
from limbeck.diffusion.grids import usual_times
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import Cosine, FlowMatching, TrigFlow, VPDiscrete
from limbeck.diffusion.steps import ddim_step
from tests.diffusion.cases import SCHEDULES, normal, wave_denoiser

# From noise to a little of it, evenly spaced in lambda so that the schedule's own shape plays no part.
NOISY, NEARLY_CLEAN = -2.0, 2.0


def laboratory(schedule):
    """A smooth mixture, in float64."""
    means = torch.tensor([[1.0, 0.4], [-0.7, -1.1], [-0.2, 0.9]], dtype=torch.float64)
    return GaussianMixtureDenoiser(means, torch.tensor([0.5, 0.4, 0.6]).double(), schedule)


def spaced(schedule, steps):
    return schedule.time_of(torch.linspace(NOISY, NEARLY_CLEAN, steps + 1, dtype=torch.float64))


@cache
def reference():
    """Noisy items and where the probability-flow ODE takes them, both divided by alpha: the same in all schedules."""
    torch.manual_seed(0)
    schedule = Cosine()
    model, times = laboratory(schedule), spaced(schedule, 400)
    x = schedule.add_noise(model.draw(32), normal(32, 2), times[:1].expand(32))
    end = solvers.solve(model, x, times, "heun")
    return x / schedule.alpha(times[0]), end / schedule.alpha(times[-1])


def error(solver, schedule, steps):
    """How far a solver ends from the reference, divided by alpha too."""
    start, truth = reference()
    times = spaced(schedule, steps)
    end = solvers.solve(laboratory(schedule), start * schedule.alpha(times[0]), times, solver)
    return float((end / schedule.alpha(times[-1]) - truth).norm())


@pytest.mark.parametrize("schedule", [Cosine(), FlowMatching(), SCHEDULES["edm"]], ids=["cosine", "flow", "edm"])
@pytest.mark.parametrize(("solver", "expected"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_orders(solver, schedule, expected):
    """Slope of log error against log steps, by least squares.

    As the theory says, within 0.15: 1 for DDIM and Euler, 2 for Heun and DPM-Solver++(2M).
    """
    counts = [12, 24, 48, 96]
    logs = torch.tensor([[math.log(n), math.log(error(solver, schedule, n))] for n in counts])
    centred = logs - logs.mean(0)
    slope = float((centred[:, 0] * centred[:, 1]).sum() / centred[:, 0].square().sum())
    assert abs(-slope - expected) < 0.15


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_all_deterministic_solvers_end_in_the_same_place(solver, name):
    """Of all 32 items together; those of first order within 0.2, those of second within 0.02."""
    assert error(solver, SCHEDULES[name], 64) < (0.2 if solver in ("ddim", "euler") else 0.02)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [name for name in solvers.SOLVERS if name != "consistency"])
def test_every_solver_draws_the_mixture(solver, name):
    """From noise to clean data along the usual times: the samples' mean and covariance are those of the data.

    Within 0.08 and 0.14; TCD's jumps below the next time make it blur a little more.
    """
    schedule = SCHEDULES[name]
    model = laboratory(schedule)
    torch.manual_seed(0)
    noise = torch.randn(3000, 2, dtype=torch.float64)
    drawn = solvers.solve(model, schedule.noise_scale * noise, usual_times(schedule, 60), solver)
    data = model.draw(100000)
    assert float((drawn.mean(0) - data.mean(0)).abs().max()) < 0.08
    assert float((drawn.T.cov() - data.T.cov()).abs().max()) < (0.2 if solver == "tcd" else 0.14)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_predictions_are_counted(solver):
    schedule = VPDiscrete.named("scaled-linear")
    model = wave_denoiser(schedule)
    asked = model.network.asked
    solvers.solve(model, normal(2, 3), usual_times(schedule, 6), solver)
    assert len(asked) == solvers.count_predictions(solver, 6)
    assert all(time.shape == (2,) for time in asked)
    assert asked[0][0] == 999


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_path_holds_every_state(solver):
    schedule = TrigFlow()
    model, x, times = wave_denoiser(schedule, "v"), normal(2, 3), usual_times(schedule, 4)
    torch.manual_seed(1)
    path = solvers.path(model, x, times, solver)
    torch.manual_seed(1)
    end = solvers.solve(model, x, times, solver)
    assert path.shape == (5, 2, 3)
    assert path[0].equal(x)
    assert path[-1].equal(end)


def test_random_solvers_follow_torchs_stream():
    schedule = Cosine()
    model, x, times = wave_denoiser(schedule, "v"), normal(2, 3), usual_times(schedule, 4)
    for solver in ("ancestral", "sde", "consistency", "tcd"):
        ends = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            ends.append(solvers.solve(model, x, times, solver))
        assert ends[0].equal(ends[1])
        assert not ends[0].allclose(ends[2])


def test_consistency_sampling_keeps_the_last_answer():
    """A point mass's consistency function: every answer is its x0, and the states in between carry noise."""
    schedule = Cosine()
    target = normal(1, 3)

    def function(x, t):
        return Prediction(target.expand_as(x), "x0", x, t, schedule)

    torch.manual_seed(0)
    path = solvers.path(function, normal(2000, 3), usual_times(schedule, 2), "consistency")
    s = usual_times(schedule, 2)[1]
    assert path[-1].equal(target.expand(2000, 3))
    left = (path[1] - schedule.alpha(s) * target) / schedule.sigma(s)
    assert abs(float(left.mean())) < 0.05
    assert abs(float(left.std()) - 1) < 0.03


def test_consistency_functions_that_end_at_a_little_noise():
    """x = f + sqrt(s^2 - s_min^2) n (Song et al., 2023)."""
    schedule = SCHEDULES["edm"]
    target, s = normal(1, 3), 0.821

    def function(x, t):
        return Prediction(target.expand_as(x), "x0", x, t, schedule)

    torch.manual_seed(0)
    states = list(solvers.consistency(function, normal(2, 3), torch.tensor([80.0, s, 0.0]).double(), lands_at=0.5))
    torch.manual_seed(0)
    noise = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(states[0], target + math.sqrt(s**2 - 0.25) * noise)


def test_tcd_without_noise_is_ddim():
    schedule = VPDiscrete.named("scaled-linear")
    model, x, times = wave_denoiser(schedule), normal(2, 3), torch.tensor([999.0, 759.0, 499.0, 0.0]).double()
    quiet = list(solvers.tcd(model, x, times, gamma=0.0))
    for one, other in zip(quiet, solvers.ddim(model, x, times), strict=True):
        torch.testing.assert_close(one, other)


def test_the_last_step_of_tcd_is_without_noise():
    """Also where the times end far from the data."""
    schedule = VPDiscrete.named("scaled-linear")
    model, x, times = wave_denoiser(schedule), normal(2, 3), torch.tensor([999.0, 759.0, 499.0]).double()
    torch.manual_seed(0)
    first, last = solvers.tcd(model, x, times, gamma=0.5)
    torch.testing.assert_close(last, ddim_step(model(first, times[1:2].expand(2)), times[2]))


def test_solving_has_a_gradient():
    """Methods differentiate through a few steps."""
    schedule = Cosine()
    x = normal(2, 3).requires_grad_()
    solvers.solve(wave_denoiser(schedule, "v"), x, usual_times(schedule, 3), "ddim").sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0

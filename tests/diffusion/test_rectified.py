"""Rectified flow: the recorded losses, times and gradients, and what is exact of straight flows."""

import math

import numpy
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from limbeck.diffusion.adaptive import rk45
from limbeck.diffusion.denoiser import Denoiser
from limbeck.diffusion.generation import generate, guided_model
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.pairs import PairSampling, endpoints
from limbeck.diffusion.rectified import (
    TauFlow,
    as_flow,
    draw_taus,
    empirical_flow,
    flow_errors,
    interpolate,
    rectified_euler,
    straightness,
    transport_cost,
)
from limbeck.diffusion.schedules import Cosine, FlowMatching
from tests.diffusion.cases import normal
from tests.oracles.oracle import load

EPS = 1e-3


@pytest.fixture(scope="module")
def case():
    (case,) = load("slimflow")
    return case


def toy(a: float = 0.5, b: float = 0.1, c: float = 0.02) -> tuple[list[Tensor], TauFlow]:
    """The recorded network v = a x + b sin(tau) + c, told 999 tau."""
    weights = [torch.tensor(value, requires_grad=True) for value in (a, b, c)]

    def velocity(x: Tensor, told: Tensor, condition: object) -> Tensor:
        return weights[0] * x + weights[1] * torch.sin(told / 999).to(x).view(-1, 1, 1, 1) + weights[2]

    return weights, TauFlow(velocity, 999.0)


def constant(shift: Tensor) -> TauFlow:
    return TauFlow(lambda x, tau, condition: shift.expand_as(x))


def loss_of(flow: Denoiser, noise: Tensor, data: Tensor, tau: Tensor) -> Tensor:
    x_tau = interpolate(noise, data, tau)
    return flow_errors(-flow(x_tau, 1 - tau).velocity, noise, data).mean()


def check_gradients(case, name: str, loss: Tensor, weights: list[Tensor]) -> None:
    for weight, gradient in zip("abc", torch.autograd.grad(loss, weights), strict=True):
        case.check(f"{name}_grad_{weight}", gradient, of_largest=True)


def test_times_paths_and_the_reflow_loss_are_the_recorded_ones(case):
    tensors = case.tensors
    noise, data = tensors["annealed_noise_beta0.6"], tensors["data"]
    tau = draw_taus("uniform", tensors["u"], EPS)
    case.check("t", tau)
    case.check("xt", interpolate(noise, data, tau), atol=1e-6)
    weights, flow = toy()
    loss = loss_of(flow, noise, data, tau)
    case.check("reflow_loss", loss)
    check_gradients(case, "reflow", loss, weights)


def test_the_loss_of_one_step_distillation_is_the_recorded_one(case):
    weights, flow = toy()
    tau = draw_taus("t0", case.tensors["u"], EPS)
    loss = loss_of(flow, case.tensors["z"], case.tensors["data"], tau)
    case.check("distill_loss_t0", loss)
    check_gradients(case, "distill", loss, weights)


def test_the_exact_flow_to_a_finite_set_is_the_recorded_one(case):
    tensors = case.tensors
    flow = empirical_flow(tensors["an_data"].flatten(1))
    x = tensors["an_x"]
    case.check("an_v", -flow(x, 1 - tensors["an_t999"].double() / 999).velocity, atol=1e-5)


def test_tau_modes_by_hand():
    draws = torch.tensor([0.0, 0.24, 0.26, 0.5, 0.99])
    for u, tau in zip(draws.tolist(), draw_taus("uniform", draws, 0.01).tolist(), strict=True):
        assert tau == pytest.approx(u * 0.99 + 0.01)
    for u, tau in zip(draws.tolist(), draw_taus(4, draws, 0.01).tolist(), strict=True):
        assert tau == pytest.approx(math.floor(4 * u) * 0.99 / 4 + 0.01)
    assert (draw_taus("t0", draws, 0.01) == 0.01).all()
    assert torch.equal(draw_taus(1, draws, 0.01), draw_taus("t0", draws, 0.01))
    assert draw_taus(4, torch.tensor([1 - 2**-24]), 0.0).item() == 0.75  # the last of four steps starts there


def test_reductions_by_hand():
    velocity, noise, data = (normal(2, 3, seed=seed, dtype=torch.float32) for seed in range(3))
    for reduction, factor in (("mean", 1 / 3), ("half-sum", 0.5)):
        expected = [
            factor * sum((v - (x1 - x0)) ** 2 for v, x0, x1 in zip(*rows, strict=True))
            for rows in zip(velocity.tolist(), noise.tolist(), data.tolist(), strict=True)
        ]
        assert flow_errors(velocity, noise, data, reduction).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_shifted_coupling_is_learned_by_its_shift_alone():
    noise, shift = normal(6, 2, dtype=torch.float32), torch.tensor([1.5, -0.5])
    for mode in ("uniform", "t0", 3):
        tau = draw_taus(mode, torch.rand(6), EPS)
        assert loss_of(constant(shift), noise, noise + shift, tau) < 1e-10
        assert loss_of(constant(shift + 0.1), noise, noise + shift, tau).item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3, 25])
def test_euler_is_exact_on_a_constant_velocity(steps):
    noise, shift = normal(5, 2), torch.tensor([1.5, -0.5], dtype=torch.float64)
    exact = rectified_euler(constant(shift), noise, steps, eps=0.0)
    torch.testing.assert_close(exact, noise + shift)
    torch.testing.assert_close(rectified_euler(constant(shift), noise, steps, 0.1), noise + 0.9 * shift)
    torch.testing.assert_close(rectified_euler(constant(shift), noise, steps, 0.1, compat=True), noise + shift)
    torch.testing.assert_close(generate(constant(shift), noise, steps=steps), noise + shift)


def test_the_authors_euler_by_hand():
    _, flow = toy()
    noise = normal(2, 1, 1, 1, dtype=torch.float32)
    for compat in (False, True):
        for start, end in zip(
            noise.flatten().tolist(), rectified_euler(flow, noise, 3, EPS, compat).flatten().tolist(), strict=True
        ):
            x = start
            for i in range(3):
                tau = i / 3 * (1 - EPS) + EPS
                x += (0.5 * x + 0.1 * math.sin(tau) + 0.02) * (1 if compat else 1 - EPS) / 3
            assert end == pytest.approx(x, rel=1e-5)


def test_a_straight_flow_needs_one_step():
    """v = (target - x) / (1 - tau) leads everything straight to one point."""
    target = torch.tensor([2.0, -1.0], dtype=torch.float64)
    flow = empirical_flow(target[None])
    noise = normal(50, 2)
    model = guided_model(flow)
    data = generate(flow, noise, steps=20, solver="euler")
    assert straightness(model, noise, data) < 1e-20
    torch.testing.assert_close(generate(flow, noise, steps=1, solver="euler"), data)


def test_straightness_by_hand_and_of_a_bent_flow():
    noise, data, shift = normal(4, 2), normal(4, 2, seed=1), torch.tensor([0.3, 0.1], dtype=torch.float64)
    expected = (data - noise - shift).square().sum(1).mean()
    torch.testing.assert_close(straightness(constant(shift), noise, data, times=3), expected)
    ring = GaussianMixtureDenoiser.ring(FlowMatching())
    noise = normal(500, 2, dtype=torch.float32)
    bent = straightness(guided_model(ring), noise, endpoints(ring, noise, how=PairSampling("heun", 50)))
    assert bent > 0.1


def test_rectifying_keeps_the_marginals_and_never_lengthens_the_way():
    torch.manual_seed(0)
    ring = GaussianMixtureDenoiser.ring(FlowMatching())
    independent, noise = ring.draw(4000), torch.randn(4000, 2)
    data = endpoints(ring, noise, how=PairSampling("heun", 50))
    assert (data.mean(0) - independent.mean(0)).abs().max() < 0.08  # three standard errors
    assert (data.T.cov() - independent.T.cov()).abs().max() < 0.08
    assert transport_cost(noise, data) < 0.7 * transport_cost(noise, independent)
    again = noise[torch.randperm(4000)]
    assert transport_cost(again, data) > 0.9 * transport_cost(noise, independent)


def test_rk45_agrees_with_scipy_and_with_the_solution():
    def slope(x: Tensor, t: Tensor) -> Tensor:
        return x * torch.cos(3 * t)[:, None] + t[:, None]

    x = normal(4, 2)
    ours = rk45(slope, x, 1.0, 0.0, 1e-6, 1e-6)
    for start, end in zip(x.numpy(), ours.numpy(), strict=True):
        known = solve_ivp(lambda t, y: y * numpy.cos(3 * t) + t, (1.0, 0.0), start, rtol=1e-10, atol=1e-10)
        numpy.testing.assert_allclose(end, known.y[:, -1], atol=1e-5)
    grown = rk45(lambda x, t: x, x, 0.0, 1.0, 1e-8, 1e-8)
    torch.testing.assert_close(grown, x * math.e, rtol=1e-6, atol=1e-6)


def test_rk45_goes_on_alone_for_each_item():
    def slope(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(40 * x)

    x = torch.tensor([[0.02], [0.5], [3.0]], dtype=torch.float64)
    together = rk45(slope, x, 0.0, 1.0)
    for row in range(3):
        torch.testing.assert_close(rk45(slope, x[row : row + 1], 0.0, 1.0)[0], together[row], rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="did not reach"):
        rk45(slope, x, 0.0, 1.0, most=3)
    with pytest.raises(RuntimeError, match="did not reach"):
        rk45(lambda x, t: x * math.nan, x, 0.0, 1.0, most=50)


def test_adaptive_pairs_are_those_of_many_small_steps():
    for schedule in (FlowMatching(), Cosine()):
        ring = GaussianMixtureDenoiser.ring(schedule).double()
        noise = normal(20, 2)
        many = endpoints(ring, noise, how=PairSampling("heun", 2000))
        adaptive = endpoints(ring, noise, how=PairSampling("rk45", eps=1e-6, tolerance=1e-7))
        assert (adaptive - many).norm(dim=1).median() < 1e-3  # points on a ridge between modes may part
        assert isinstance(as_flow(ring).schedule, FlowMatching)


def test_a_published_velocity_runs_in_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    _, flow = toy()
    noise = normal(2, 1, 4, 4, dtype=torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            tau = 1 - timestep / 1000
            v = flow.velocity(x, 999 * tau.expand(len(x)), {})
            x = scheduler.step(-v, timestep, x).prev_sample
        torch.testing.assert_close(rectified_euler(flow, noise, 4, eps=0.0), x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(generate(flow, noise, steps=4), x, rtol=1e-4, atol=1e-5)


def test_a_bare_velocity_is_not_guided():
    _, flow = toy()
    assert flow.null({}) == {}
    with pytest.raises(ValueError, match="says nothing"):
        flow.null({"label": torch.zeros(2)})

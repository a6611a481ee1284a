import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.diffusion.denoiser import Transported
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.predictions import KINDS, Prediction, convert, from_data_and_noise, transport
from limbeck.diffusion.schedules import EDM, FlowMatching, TrigFlow, VPDiscrete
from tests.diffusion.cases import PRESERVING, SCHEDULES, normal, times_of, wave_denoiser

EXACT = {"rtol": 1e-8, "atol": 1e-8}


def noisy(name, count=7):
    schedule = SCHEDULES[name]
    t = times_of(schedule, count)
    x0, eps = normal(count, 2, 3), normal(count, 2, 3, seed=1)
    return schedule, t, x0, eps, schedule.add_noise(x0, eps, t)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_conversions_agree_with_the_truth(name, source, target):
    schedule, t, x0, eps, x_t = noisy(name)
    said = from_data_and_noise(x0, eps, source, t, schedule)
    wanted = from_data_and_noise(x0, eps, target, t, schedule)
    torch.testing.assert_close(convert(said, source, target, x_t, t, schedule), wanted, **EXACT)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(SCHEDULES)),
    source=st.sampled_from(KINDS),
    target=st.sampled_from(KINDS),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_any_prediction_survives_the_way_there_and_back(name, source, target, share, seed):
    """Also predictions that fit no data, at any time."""
    schedule = SCHEDULES[name]
    rows = times_of(schedule, 2, margin=0.01)
    t = torch.lerp(rows[:1], rows[1:], share)
    x_t, value = normal(1, 4, seed=seed), normal(1, 4, seed=seed + 1)
    there = convert(value, source, target, x_t, t, schedule)
    torch.testing.assert_close(convert(there, target, source, x_t, t, schedule), value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_x0_and_eps_make_up_x_t(name, kind):
    schedule, t, _, _, x_t = noisy(name)
    said = Prediction(normal(7, 2, 3, seed=5), kind, x_t, t, schedule)
    torch.testing.assert_close(schedule.add_noise(said.x0, said.eps, t), x_t, **EXACT)
    for other in KINDS:
        read = {"x0": said.x0, "eps": said.eps, "v": said.v, "velocity": said.velocity, "score": said.score}[other]
        assert read.equal(said.as_kind(other))


@pytest.mark.parametrize("name", PRESERVING)
def test_v_as_in_the_paper(name):
    """v = alpha eps - sigma x0; x0 = alpha x_t - sigma v; eps = alpha v + sigma x_t."""
    schedule, t, x0, eps, x_t = noisy(name)
    alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
    v = alpha * eps - sigma * x0
    said = Prediction(v, "v", x_t, t, schedule)
    torch.testing.assert_close(said.x0, alpha * x_t - sigma * v, **EXACT)
    torch.testing.assert_close(said.eps, alpha * v + sigma * x_t, **EXACT)


def test_velocities_as_in_the_papers():
    schedule, t, x0, eps, x_t = noisy("flow-matching")
    assert Prediction(x0, "x0", x_t, t, schedule).velocity.allclose(eps - x0)
    schedule, t, x0, eps, x_t = noisy("edm")
    assert Prediction(x0, "x0", x_t, t, schedule).velocity.allclose((x_t - x0) / t[:, None, None])
    schedule, t, x0, eps, x_t = noisy("trig-flow")
    cos, sin = t.cos()[:, None, None], t.sin()[:, None, None]
    velocity = cos * eps - sin * x0
    said = Prediction(velocity, "velocity", x_t, t, schedule)
    torch.testing.assert_close(said.x0, cos * x_t - sin * velocity, **EXACT)
    torch.testing.assert_close(said.eps, sin * x_t + cos * velocity, **EXACT)
    torch.testing.assert_close(said.v, velocity, **EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_general_inverse_of_the_velocity(name):
    """x0 = (x_t sigma'/sigma - u) / (alpha sigma'/sigma - alpha')."""
    schedule, t, _, _, x_t = noisy(name)
    u = normal(7, 2, 3, seed=9)
    ratio, alpha, alpha_rate = (
        value[:, None, None]
        for value in (schedule.sigma_rate(t) / schedule.sigma(t), schedule.alpha(t), schedule.alpha_rate(t))
    )
    expected = (x_t * ratio - u) / (alpha * ratio - alpha_rate)
    torch.testing.assert_close(convert(u, "velocity", "x0", x_t, t, schedule), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PRESERVING)
def test_transport_to_a_flow(name):
    """t_F = sigma / (alpha + sigma), x_F = x / (alpha + sigma), u = (alpha + sigma) v + (sigma - alpha) x."""
    schedule, t, _x0, _eps, x_t = noisy(name)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    total = (alpha + sigma)[:, None, None]
    x, moved = transport(x_t, t, schedule, FlowMatching())
    torch.testing.assert_close(moved, sigma / (alpha + sigma), **EXACT)
    torch.testing.assert_close(x, x_t / total, **EXACT)
    v = normal(7, 2, 3, seed=3)
    said = Prediction(v, "v", x_t, t, schedule)
    flow = Prediction(said.x0, "x0", x, moved, FlowMatching())
    torch.testing.assert_close(flow.velocity, total * v + (sigma - alpha)[:, None, None] * x_t, **EXACT)


@pytest.mark.parametrize("name", PRESERVING)
def test_transport_to_trig_flow(name):
    """t = atan2(sigma, alpha), x unchanged, F = v."""
    schedule, t, x0, _eps, x_t = noisy(name)
    x, moved = transport(x_t, t, schedule, TrigFlow())
    torch.testing.assert_close(moved, torch.atan2(schedule.sigma(t), schedule.alpha(t)), **EXACT)
    torch.testing.assert_close(x, x_t, **EXACT)
    v = normal(7, 2, 3, seed=3)
    x0 = convert(v, "v", "x0", x_t, t, schedule)
    torch.testing.assert_close(Prediction(x0, "x0", x, moved, TrigFlow()).velocity, v, **EXACT)


def test_transport_from_edm_to_trig_flow():
    """With data of deviation d: t = atan(sigma / d), x_trig = x_edm cos t; and back by tan and 1/cos."""
    schedule, sigma, _x0, _eps, x_edm = noisy("edm")
    deviation = 0.5
    x, t = transport(x_edm / deviation, sigma / deviation, schedule, TrigFlow())
    torch.testing.assert_close(t, torch.atan(sigma / deviation), **EXACT)
    torch.testing.assert_close(x * deviation, x_edm * t.cos()[:, None, None], **EXACT)
    back, level = transport(x, t, TrigFlow(), EDM())
    torch.testing.assert_close(level * deviation, sigma, **EXACT)
    torch.testing.assert_close(back * deviation, x_edm, **EXACT)


@pytest.mark.parametrize("source", SCHEDULES)
@pytest.mark.parametrize("target", SCHEDULES)
def test_transport_keeps_x0_and_eps(source, target):
    """x' = alpha' x0 + sigma' eps with the same data and noise, and the way back is the identity."""
    schedule, other = SCHEDULES[source], SCHEDULES[target]
    t = schedule.time_of(torch.tensor([-2.0, -0.5, 0.3, 1.5, 3.0], dtype=torch.float64))
    x0, eps = normal(5, 4), normal(5, 4, seed=1)
    x_t = schedule.add_noise(x0, eps, t)
    x, moved = transport(x_t, t, schedule, other)
    torch.testing.assert_close(x, other.add_noise(x0, eps, moved), **EXACT)
    back, home = transport(x, moved, other, schedule)
    torch.testing.assert_close(back, x_t, **EXACT)
    torch.testing.assert_close(home, t, **EXACT)


def test_transport_of_whole_times():
    schedule = VPDiscrete.named("scaled-linear")
    t = torch.tensor([10, 500, 999])
    x = normal(3, 2)
    moved_x, moved = transport(x, t, schedule, FlowMatching())
    assert moved.dtype == torch.float64
    assert moved_x.equal(transport(x, t.double(), schedule, FlowMatching())[0])
    assert transport(x.float(), t.float(), schedule, FlowMatching())[1].dtype == torch.float32


def test_transport_of_clean_items_and_of_noise():
    x = normal(2, 3)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    moved, t = transport(x, ends, FlowMatching(), VPDiscrete.named("scaled-linear"))
    assert t.tolist() == [-1.0, 999.0]
    assert moved.isfinite().all()
    moved, t = transport(x, ends, FlowMatching(), TrigFlow())
    torch.testing.assert_close(t, ends * math.pi / 2)
    torch.testing.assert_close(moved, x)


def test_a_flow_asked_in_trig_flow_is_sana_sprints_wrapper():
    """F(x, t) = [(1 - 2 t_F) x_F + (1 - 2 t_F + 2 t_F^2) v] / sqrt(t_F^2 + (1 - t_F)^2)."""
    flow = wave_denoiser(FlowMatching(), "velocity", period=1.0)
    wrapped = Transported(flow, TrigFlow())
    x, t = normal(5, 3), torch.linspace(0.0, math.pi / 2, 5, dtype=torch.float64)
    t_f = t.sin() / (t.sin() + t.cos())
    size = (t_f.square() + (1 - t_f).square()).sqrt()[:, None]
    x_f = x * size
    v = flow(x_f, t_f).value
    expected = ((1 - 2 * t_f)[:, None] * x_f + (1 - 2 * t_f + 2 * t_f.square())[:, None] * v) / size
    torch.testing.assert_close(wrapped(x, t).v, expected, **EXACT)
    torch.testing.assert_close(wrapped(x, t).velocity, expected, **EXACT)


@pytest.mark.parametrize("target", SCHEDULES)
def test_transported_mixtures_are_mixtures_in_the_other_schedule(target):
    source, schedule = VPDiscrete.named("scaled-linear"), SCHEDULES[target]
    labels = {"label": torch.tensor([0, 1, -1, 0])}
    one, other = (GaussianMixtureDenoiser.ring(s, classes=2).double() for s in (source, schedule))
    t = schedule.time_of(torch.tensor([-2.0, 0.3, 1.5, 3.0], dtype=torch.float64))
    x = schedule.add_noise(normal(4, 2), normal(4, 2, seed=1), t)
    asked = Transported(one, schedule)
    for kind in KINDS:
        expected = other(x, t, labels).as_kind(kind)
        torch.testing.assert_close(asked(x, t, labels).as_kind(kind), expected, rtol=1e-7, atol=1e-7)
    assert asked.null(labels)["label"].tolist() == [-1] * 4


def test_half_precision_is_raised():
    schedule, t, _x0, eps, x_t = noisy("scaled-linear")
    exact = convert(eps.half().float(), "eps", "x0", x_t.half().float(), t, schedule)
    for target in ("x0", "v", "velocity"):
        assert convert(eps.half(), "eps", target, x_t.half(), t, schedule).dtype == torch.float32
    torch.testing.assert_close(convert(eps.half(), "eps", "x0", x_t.half(), t, schedule), exact)


def test_the_value_as_it_was_made_is_not_touched():
    schedule, t, _, eps, x_t = noisy("cosine")
    said = Prediction(eps, "eps", x_t, t, schedule)
    assert said.as_kind("eps") is eps
    assert said.with_value(2 * eps).x0.equal(Prediction(2 * eps, "eps", x_t, t, schedule).x0)


def test_detached_predictions_have_no_graph():
    schedule, t, x0, _, x_t = noisy("cosine")
    said = Prediction(x0.requires_grad_(), "x0", x_t.requires_grad_(), t, schedule)
    assert said.eps.requires_grad
    cut = said.detach()
    assert not any(cut.as_kind(kind).requires_grad for kind in KINDS)
    assert cut.eps.equal(said.eps)


def test_zero_terminal_snr_is_read_through_v():
    """v at alpha = 0 gives x0 = -v and eps = x_t."""
    schedule = VPDiscrete([*VPDiscrete.named("scaled-linear").alphas_cumprod[:-1].tolist(), 0.0])
    t = torch.tensor([999.0], dtype=torch.float64)
    x_t, v = normal(1, 4), normal(1, 4, seed=1)
    said = Prediction(v, "v", x_t, t, schedule)
    torch.testing.assert_close(said.x0, -v, rtol=0, atol=1e-5)
    torch.testing.assert_close(said.eps, x_t, rtol=0, atol=1e-5)
    assert said.velocity.isfinite().all()


@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_the_ends_of_a_flow_are_finite(kind):
    """Flow and TrigFlow networks are asked at pure noise, where eps alone would say nothing."""
    for schedule in (FlowMatching(), TrigFlow()):
        t = torch.tensor([schedule.t_max], dtype=torch.float64)
        said = Prediction(normal(1, 3), kind, normal(1, 3, seed=1), t, schedule)
        assert said.x0.isfinite().all()
        assert said.eps.isfinite().all()
    start = torch.zeros(1, dtype=torch.float64)
    said = Prediction(normal(1, 3), "velocity", normal(1, 3, seed=1), start, FlowMatching())
    assert said.x0.equal(said.x_t)
    assert said.eps.equal(said.x_t + said.value)


def test_gradients_through_conversions():
    """d x0 / d eps = -sigma / alpha."""
    schedule, t, _, eps, x_t = noisy("cosine")
    eps.requires_grad_()
    (slope,) = torch.autograd.grad(Prediction(eps, "eps", x_t, t, schedule).x0.sum(), eps)
    torch.testing.assert_close(slope[:, 0, 0], -schedule.sigma(t) / schedule.alpha(t), **EXACT)

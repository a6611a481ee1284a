import itertools
import math

import pytest
import torch

from limbeck.diffusion import steps
from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, TrigFlow, VPDiscrete
from tests.diffusion.cases import PRESERVING, SCHEDULES, normal, times_of, wave_denoiser

EXACT = {"rtol": 1e-9, "atol": 1e-9}
ETAS = [0.0, 0.3, 1.0, 2.5]


def two_times(name, count=5):
    """Times t (count,) and s (count,), s below t by a different share each."""
    schedule = SCHEDULES[name]
    t = times_of(schedule, count, margin=0.1)
    return schedule, t, torch.lerp(t, t[0] / 2, torch.linspace(0.05, 0.9, count, dtype=torch.float64))


def constant(name, count=5):
    """A prediction of the true data at (x_t, t), the lower time s, and what x_t is made of."""
    schedule, t, s = two_times(name, count)
    x0, eps = normal(count, 3), normal(count, 3, seed=1)
    x_t = schedule.add_noise(x0, eps, t)
    return Prediction(x0, "x0", x_t, t, schedule), s, x0, eps


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_exact_for_constant_data_both_ways(name):
    prediction, s, x0, eps = constant(name)
    schedule = prediction.schedule
    x_s = steps.ddim_step(prediction, s)
    torch.testing.assert_close(x_s, schedule.add_noise(x0, eps, s), **EXACT)
    encoded = steps.ddim_step(Prediction(x0, "x0", x_s, s, schedule), prediction.t)
    torch.testing.assert_close(encoded, prediction.x_t, **EXACT)
    assert steps.ddim_step(prediction, prediction.t).allclose(prediction.x_t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_in_ratio_form(name):
    """x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0."""
    schedule, t, s = two_times(name)
    prediction = Prediction(normal(5, 3), "eps", normal(5, 3, seed=1), t, schedule)
    ratio = (schedule.sigma(s) / schedule.sigma(t))[:, None]
    gain = (schedule.alpha(s) - schedule.alpha(t) * schedule.sigma(s) / schedule.sigma(t))[:, None]
    expected = ratio * prediction.x_t + gain * prediction.x0
    torch.testing.assert_close(steps.ddim_step(prediction, s), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["edm", "flow-matching"])
def test_ddim_is_eulers_step_on_straight_paths(name):
    schedule, t, s = two_times(name)
    prediction = Prediction(normal(5, 3), "velocity", normal(5, 3, seed=1), t, schedule)
    torch.testing.assert_close(steps.ddim_step(prediction, s), steps.euler_step(prediction, s), **EXACT)


def test_ddim_in_trig_flow_is_a_rotation():
    """x_s = cos(t - s) x_t - sin(t - s) F."""
    schedule, t, s = two_times("trig-flow")
    prediction = Prediction(normal(5, 3), "v", normal(5, 3, seed=1), t, schedule)
    angle = (t - s)[:, None]
    expected = angle.cos() * prediction.x_t - angle.sin() * prediction.value
    torch.testing.assert_close(steps.ddim_step(prediction, s), expected, **EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_target_lands_on_x_s(name):
    schedule, t, s = two_times(name)
    x_t, x_s = normal(5, 3), normal(5, 3, seed=1)
    x0 = steps.ddim_target(x_t, t, x_s, s, schedule)
    landed = steps.ddim_step(Prediction(x0, "x0", x_t, t, schedule), s)
    torch.testing.assert_close(landed, x_s, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_target_of_equal_predictions_is_that_prediction(name):
    """Two DDIM steps with one x0 are a single step with it."""
    prediction, s, x0, _ = constant(name)
    schedule = prediction.schedule
    between = torch.lerp(prediction.t, s, 0.4)
    halfway = steps.ddim_step(prediction, between)
    x_s = steps.ddim_step(Prediction(x0, "x0", halfway, between, schedule), s)
    target = steps.ddim_target(prediction.x_t, prediction.t, x_s, s, schedule)
    torch.testing.assert_close(target, x0, rtol=1e-7, atol=1e-7)


def test_ddim_target_at_the_clean_end():
    schedule = VPDiscrete.named("scaled-linear")
    x_t, x_s = normal(2, 3), normal(2, 3, seed=1)
    clean = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    target = steps.ddim_target(x_t, torch.tensor([0.0, 500.0], dtype=torch.float64), x_s, clean, schedule)
    torch.testing.assert_close(target, x_s, **EXACT)


def test_ddim_target_for_close_times_in_float32():
    """Progressive distillation from 1024 steps: the divisor is a difference of nearly equal products."""
    schedule = Cosine()
    t = torch.tensor([0.9, 0.5, 0.1])
    s = t - 1 / 1024
    x0, eps = normal(3, 50, dtype=torch.float32), normal(3, 50, seed=1, dtype=torch.float32)
    x_t, x_s = schedule.add_noise(x0, eps, t), schedule.add_noise(x0, eps, s)
    target = steps.ddim_target(x_t, t, x_s, s, schedule)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, x0, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", ETAS)
def test_sde_step_preserves_the_marginals(name, eta):
    """With the true x0, x_s has mean alpha_s x0 and variance sigma_s^2 whatever eta: from its two coefficients."""
    prediction, s, x0, eps = constant(name)
    schedule, zero = prediction.schedule, torch.zeros(5, 3, dtype=torch.float64)
    x_s = steps.sde_step(prediction, s, eta, zero)
    fresh = steps.sde_step(prediction, s, eta, zero + 1) - x_s
    other = Prediction(x0, "x0", schedule.add_noise(x0, eps + 1, prediction.t), prediction.t, schedule)
    kept = steps.sde_step(other, s, eta, zero) - x_s
    mean = x_s - kept * eps
    torch.testing.assert_close(mean, schedule.alpha(s)[:, None] * x0, rtol=1e-7, atol=1e-7)
    power = kept.square() + fresh.square()
    torch.testing.assert_close(power, schedule.sigma(s).square()[:, None].expand(5, 3), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", PRESERVING)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_stochastic_ddim_preserves_the_marginals(name, eta):
    prediction, s, x0, eps = constant(name)
    schedule, zero = prediction.schedule, torch.zeros(5, 3, dtype=torch.float64)
    x_s = steps.stochastic_ddim_step(prediction, s, eta, zero)
    fresh = steps.stochastic_ddim_step(prediction, s, eta, zero + 1) - x_s
    kept = (x_s - schedule.alpha(s)[:, None] * x0) / eps
    power = kept.square() + fresh.square()
    torch.testing.assert_close(power, schedule.sigma(s).square()[:, None].expand(5, 3), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", PRESERVING)
def test_the_sde_with_eta_1_is_ancestral_sampling(name):
    schedule, t, s = two_times(name)
    prediction = Prediction(normal(5, 3), "eps", normal(5, 3, seed=1), t, schedule)
    noise = normal(5, 3, seed=2)
    expected = steps.stochastic_ddim_step(prediction, s, 1.0, noise)
    torch.testing.assert_close(steps.sde_step(prediction, s, 1.0, noise), expected, rtol=1e-7, atol=1e-7)


def test_ancestral_sampling_is_the_posterior_of_ddpm():
    """mean = sqrt(a_s) b x0 / (1 - a_t) + sqrt(a) (1 - a_s) x_t / (1 - a_t), variance b (1 - a_s) / (1 - a_t)."""
    schedule = VPDiscrete.named("linear")
    t, s = torch.tensor([999.0, 500.0, 1.0]).double(), torch.tensor([998.0, 480.0, 0.0]).double()
    prediction = Prediction(normal(3, 4), "x0", normal(3, 4, seed=1), t, schedule)
    noise = normal(3, 4, seed=2)
    a_t, a_s = schedule.alpha(t).square()[:, None], schedule.alpha(s).square()[:, None]
    a = a_t / a_s
    mean = a_s.sqrt() * (1 - a) / (1 - a_t) * prediction.x0 + a.sqrt() * (1 - a_s) / (1 - a_t) * prediction.x_t
    expected = mean + ((1 - a) * (1 - a_s) / (1 - a_t)).sqrt() * noise
    torch.testing.assert_close(steps.stochastic_ddim_step(prediction, s, 1.0, noise), expected, **EXACT)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [steps.sde_step, steps.stochastic_ddim_step])
def test_stochastic_steps_without_noise_are_ddim(name, step):
    schedule, t, s = two_times(name)
    prediction = Prediction(normal(5, 3), "eps", normal(5, 3, seed=1), t, schedule)
    torch.testing.assert_close(step(prediction, s, 0.0), steps.ddim_step(prediction, s), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", ETAS)
def test_steps_to_the_clean_end_give_x0(name, eta):
    schedule, t, _ = two_times(name)
    prediction = Prediction(normal(5, 3), "v", normal(5, 3, seed=1), t, schedule)
    clean = torch.tensor(schedule.clean, dtype=torch.float64)
    assert steps.sde_step(prediction, clean, eta).equal(prediction.x0)
    assert steps.stochastic_ddim_step(prediction, clean, min(eta, 1.0)).allclose(prediction.x0)
    assert steps.ddim_step(prediction, clean).equal(prediction.x0)
    assert steps.renoise(prediction.x0, clean, schedule).equal(prediction.x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_up_is_the_forward_process(name):
    """Variance sigma_s^2 - (alpha_s / alpha_k)^2 sigma_k^2 = sigma_s^2 (1 - exp(2 (lambda_s - lambda_k)))."""
    schedule, s, k = two_times(name)
    x0, eps, zero = normal(5, 3), normal(5, 3, seed=1), torch.zeros(5, 3, dtype=torch.float64)
    x_k = schedule.add_noise(x0, eps, k)
    mean = steps.noise_up(x_k, k, s, schedule, zero)
    fresh = steps.noise_up(x_k, k, s, schedule, zero + 1) - mean
    forgotten = -torch.expm1(2 * (schedule.log_snr(s) - schedule.log_snr(k)))
    expected = (schedule.sigma(s).square() * forgotten)[:, None].expand(5, 3)
    torch.testing.assert_close(fresh.square(), expected, rtol=1e-7, atol=1e-12)
    kept = (mean - schedule.alpha(s)[:, None] * x0) / eps
    power = kept.square() + fresh.square()
    torch.testing.assert_close(power, schedule.sigma(s).square()[:, None].expand(5, 3), rtol=1e-7, atol=1e-12)
    assert steps.noise_up(x_k, k, k, schedule).equal(x_k)


def test_strategic_sampling_between_ddim_and_renoising():
    schedule = VPDiscrete.named("scaled-linear")
    prediction = Prediction(normal(2, 3), "eps", normal(2, 3, seed=1), torch.tensor([999.0, 759.0]).double(), schedule)
    s, noise = torch.tensor([759.0, 499.0]).double(), normal(2, 3, seed=2)
    assert steps.strategic_step(prediction, s, 0.0, noise).equal(steps.ddim_step(prediction, s))
    start = torch.zeros(2, dtype=torch.float64)
    from_0 = steps.noise_up(steps.ddim_step(prediction, start), start, s, schedule, noise)
    torch.testing.assert_close(steps.strategic_step(prediction, s, 1.0, noise), from_0)
    lower = (0.7 * s).floor()
    expected = steps.noise_up(steps.ddim_step(prediction, lower), lower, s, schedule, noise)
    torch.testing.assert_close(steps.strategic_step(prediction, s, 0.3, noise), expected)
    flow = Prediction(normal(2, 3), "velocity", normal(2, 3, seed=1), torch.tensor([1.0, 0.8]).double(), FlowMatching())
    below = torch.tensor([0.8, 0.5]).double()
    renoised = steps.renoise(flow.x0, below, FlowMatching(), noise)
    torch.testing.assert_close(steps.strategic_step(flow, below, 1.0, noise), renoised)


def test_heun_is_exact_where_the_velocity_is_linear_in_time():
    schedule = FlowMatching()
    t, s = torch.tensor([0.9]).double(), torch.tensor([0.3]).double()
    x_t = normal(1, 3)
    slow, fast = (Prediction(2 * u.expand(1, 3), "velocity", x_t, u, schedule) for u in (t, s))
    expected = x_t + s**2 - t**2
    torch.testing.assert_close(steps.heun_step(slow, fast, s), expected)


def test_dpmpp_2m_extrapolates_in_lambda():
    """It is exact where x0 is linear in lambda, up to the integral's second order: against the formula, written out."""
    schedule = Cosine()
    r, t, s = (torch.tensor([value], dtype=torch.float64) for value in (0.9, 0.7, 0.4))
    before = Prediction(normal(1, 3), "x0", normal(1, 3, seed=1), r, schedule)
    now = Prediction(normal(1, 3, seed=2), "x0", normal(1, 3, seed=3), t, schedule)
    lam = [float(schedule.log_snr(time)) for time in (r, t, s)]
    h = lam[2] - lam[1]
    ratio = (lam[1] - lam[0]) / h
    extrapolated = now.x0 + (now.x0 - before.x0) / (2 * ratio)
    expected = schedule.sigma(s) / schedule.sigma(t) * now.x_t + schedule.alpha(s) * (1 - math.exp(-h)) * extrapolated
    torch.testing.assert_close(steps.dpmpp_2m_step(now, before, s), expected)
    torch.testing.assert_close(steps.dpmpp_2m_step(now, None, s), steps.ddim_step(now, s))


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_time_for_all_is_the_same_as_one_an_item(name):
    schedule = SCHEDULES[name]
    t, s = times_of(schedule, 4)[[3, 1]]
    prediction = Prediction(normal(3, 2), "v", normal(3, 2, seed=1), t.expand(3), schedule)
    noise = normal(3, 2, seed=2)
    for step in (
        lambda s: steps.ddim_step(prediction, s),
        lambda s: steps.euler_step(prediction, s),
        lambda s: steps.sde_step(prediction, s, 0.7, noise),
        lambda s: steps.stochastic_ddim_step(prediction, s, 0.7, noise),
        lambda s: steps.strategic_step(prediction, s, 0.5, noise),
        lambda s: steps.dpmpp_2m_step(prediction, None, s),
        lambda s: steps.renoise(prediction.x0, s, schedule, noise),
    ):
        torch.testing.assert_close(step(s), step(s.expand(3)))


def test_noise_comes_from_torchs_stream():
    schedule, t, s = two_times("cosine")
    prediction = Prediction(normal(5, 3), "eps", normal(5, 3, seed=1), t, schedule)
    for draw in (
        lambda noise: steps.sde_step(prediction, s, 1.0, noise),
        lambda noise: steps.stochastic_ddim_step(prediction, s, 1.0, noise),
        lambda noise: steps.strategic_step(prediction, s, 0.5, noise),
        lambda noise: steps.renoise(prediction.x0, s, schedule, noise),
        lambda noise: steps.noise_up(prediction.x0, s, t, schedule, noise),
    ):
        torch.manual_seed(3)
        noise = torch.randn_like(prediction.x_t)
        torch.manual_seed(3)
        assert draw(None).equal(draw(noise))


def test_sub_steps_without_noise_and_constant_data_are_one_step():
    """SCott's h sub-steps with eta = 0."""
    prediction, s, x0, _ = constant("scaled-linear")
    x, schedule = prediction.x_t, prediction.schedule
    places = [torch.lerp(prediction.t, s, share) for share in (0.0, 0.3, 0.8, 1.0)]
    for t, lower in itertools.pairwise(places):
        x = steps.sde_step(Prediction(x0, "x0", x, t, schedule), lower, 0.0)
    torch.testing.assert_close(x, steps.ddim_step(prediction, s), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", [VPDiscrete.named("scaled-linear"), EDM(), TrigFlow()])
def test_the_last_steps_keep_their_digits_in_float32(schedule):
    """From a little noise to none, float32 items end where float64 items do."""
    denoiser = GaussianMixtureDenoiser.ring(schedule)
    start = 20.0 if isinstance(schedule, VPDiscrete) else 0.02
    t, s = torch.tensor([start] * 4).double(), torch.tensor(start / 2).double()
    x = denoiser.draw(4) + start / 1000 * normal(4, 2, dtype=torch.float32)
    for step in (steps.ddim_step, steps.euler_step, lambda p, s: steps.sde_step(p, s, 1.0, torch.zeros_like(p.x_t))):
        exact = step(denoiser.double()(x.double(), t), s)
        torch.testing.assert_close(step(denoiser(x, t), s), exact.float(), rtol=0, atol=2e-6)


def test_half_precision_states_step_in_float32():
    schedule = VPDiscrete.named("scaled-linear")
    t, s = torch.tensor([500.0, 900.0]), torch.tensor([480.0, 880.0])
    x = normal(2, 8, dtype=torch.bfloat16)
    half = wave_denoiser(schedule)(x, t)
    exact = Prediction(half.value.double(), "eps", x.double(), t, schedule)
    for step in (steps.ddim_step, lambda p, s: steps.sde_step(p, s, 0.5, torch.zeros_like(p.x_t))):
        torch.testing.assert_close(step(half, s), step(exact, s).float(), rtol=1e-5, atol=1e-5)

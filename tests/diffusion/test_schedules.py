import copy
import itertools
import json
import math

import numpy
import pytest
import torch

from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, TrigFlow, VPContinuous, VPDiscrete, build_schedule
from tests.diffusion.cases import PRESERVING, SCHEDULES, normal, times_of

NAMES = list(SCHEDULES)


@pytest.mark.parametrize("name", NAMES)
def test_time_of_is_the_inverse_of_log_snr(name):
    schedule = SCHEDULES[name]
    t = times_of(schedule, 41)
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_falls_and_is_log_alpha_over_sigma(name):
    schedule = SCHEDULES[name]
    t = times_of(schedule, 41)
    log_snr = schedule.log_snr(t)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(log_snr, (schedule.alpha(t) / schedule.sigma(t)).log(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_derivatives(name):
    schedule = SCHEDULES[name]
    t = times_of(schedule, 23)
    if isinstance(schedule, VPDiscrete):
        t = t.floor() + 0.37  # the table's knots have two derivatives
    step = 1e-5 * t.clamp(min=1e-2)
    for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        slope = (value(t + step) - value(t - step)) / (2 * step)
        torch.testing.assert_close(rate(t), slope, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_autograd_agrees_with_the_rates(name):
    """Methods that differentiate in time, such as sCM, go through alpha and sigma themselves."""
    schedule = SCHEDULES[name]
    t = times_of(schedule, 9)
    t = (t.floor() + 0.37 if isinstance(schedule, VPDiscrete) else t).requires_grad_()
    for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        if not value(t).requires_grad:  # EDM's alpha is constant
            assert (rate(t) == 0).all()
            continue
        (slope,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope, rate(t.detach()), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_is_preserved(name):
    schedule = SCHEDULES[name]
    t = times_of(schedule, 41, margin=0.0)
    power = schedule.alpha(t).square() + schedule.sigma(t).square()
    torch.testing.assert_close(power, torch.ones_like(power), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_clean_end_has_no_noise(name):
    schedule = SCHEDULES[name]
    clean = torch.tensor([schedule.clean], dtype=torch.float64)
    assert schedule.alpha(clean) == 1
    assert schedule.sigma(clean) == 0
    assert schedule.log_snr(clean) == torch.inf
    assert schedule.time_of(torch.tensor([torch.inf], dtype=torch.float64)) == schedule.clean
    x0, eps = normal(1, 3), normal(1, 3, seed=1)
    assert schedule.add_noise(x0, eps, clean).equal(x0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_keep_the_precision_of_the_times(name, dtype):
    schedule = SCHEDULES[name]
    t = times_of(schedule).to(dtype)
    for quantity in (schedule.alpha, schedule.sigma, schedule.alpha_rate, schedule.sigma_rate, schedule.log_snr):
        exact = quantity(t.double())
        assert quantity(t).dtype == dtype
        torch.testing.assert_close(quantity(t).double(), exact, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_configs_survive_json(name):
    schedule = SCHEDULES[name]
    made = build_schedule(json.loads(json.dumps(schedule.config())))
    t = times_of(schedule, 11)
    assert made.alpha(t).equal(schedule.alpha(t))
    assert made.sigma(t).equal(schedule.sigma(t))
    assert (made.t_min, made.t_max, made.clean) == (schedule.t_min, schedule.t_max, schedule.clean)


def test_a_table_of_its_own_survives_json():
    schedule = VPDiscrete([0.99, 0.7, 0.31, 0.02])
    made = build_schedule(json.loads(json.dumps(schedule.config())))
    assert made.alphas_cumprod.equal(schedule.alphas_cumprod)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"name": "edm", "sigma": 3.0},
        {"name": "edm", "sigma_min": "low"},
        {"name": "edm", "sigma_min": -1.0},
        {"name": "edm", "sigma_min": 2.0, "sigma_max": 1.0},
        {"name": "vp-continuous", "beta_min": 3.0, "beta_max": 1.0},
        {"name": "vp-discrete"},
        {"name": "vp-discrete", "table": "linear"},
        {"name": "vp-discrete", "table": "parabolic", "steps": 1000},
        {"name": "vp-discrete", "alphas_cumprod": [0.5, 0.6]},
        {"name": "vp-discrete", "alphas_cumprod": [1.5, 0.6]},
        {"name": "sideways"},
    ],
)
def test_bad_configs_are_refused(config):
    with pytest.raises(ValueError, match=r".+"):
        build_schedule(config)


def test_the_tables_are_those_of_the_papers():
    """Recomputed with plain numpy."""
    betas = {
        "scaled-linear": numpy.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        "linear": numpy.linspace(1e-4, 0.02, 1000),
    }
    curve = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    betas["squared-cosine"] = numpy.minimum([1 - b / a for a, b in itertools.pairwise(curve)], 0.999)
    for name, expected in betas.items():
        table = VPDiscrete.named(name).alphas_cumprod
        numpy.testing.assert_allclose(table.numpy(), numpy.cumprod(1 - expected), rtol=1e-10)


def test_whole_times_read_the_table():
    schedule = VPDiscrete.named("scaled-linear")
    table = schedule.alphas_cumprod
    t = torch.arange(1000)
    for times in (t.double(), t):  # whole numbers, too, as schedulers give them
        torch.testing.assert_close(schedule.alpha(times).square(), table, rtol=1e-12, atol=0)
        torch.testing.assert_close(schedule.sigma(times).square(), 1 - table, rtol=1e-12, atol=0)
    half = schedule.log_snr(torch.tensor([10.5], dtype=torch.float64))
    torch.testing.assert_close(half, schedule.log_snr(t[10:12]).mean().reshape(1))


def test_add_noise_takes_whole_times():
    schedule = VPDiscrete.named("scaled-linear")
    x0, eps, t = normal(3, 2), normal(3, 2, seed=1), torch.tensor([0, 500, 999])
    assert schedule.add_noise(x0, eps, t).equal(schedule.add_noise(x0, eps, t.double()))


def test_small_noise_keeps_its_digits_in_float32():
    """1 - alpha^2 would have three digits at time 0."""
    schedule = VPDiscrete.named("linear")
    for t in (0.0, -0.5, 3.0):
        exact = schedule.sigma(torch.tensor([t], dtype=torch.float64))
        torch.testing.assert_close(schedule.sigma(torch.tensor([t])).double(), exact, rtol=1e-6, atol=0)


def test_the_last_step_of_a_table_joins_time_0_and_the_clean_end():
    schedule = VPDiscrete.named("scaled-linear")
    t = torch.linspace(-1, 0, 11, dtype=torch.float64)
    power = schedule.alpha(t).square()
    torch.testing.assert_close(power, torch.lerp(torch.ones(11).double(), schedule.alphas_cumprod[0], t + 1))
    inner = t[1:-1]
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(inner)), inner)
    step = 1e-6
    for value, rate in ((schedule.alpha, schedule.alpha_rate), (schedule.sigma, schedule.sigma_rate)):
        slope = (value(inner + step) - value(inner - step)) / (2 * step)
        torch.testing.assert_close(rate(inner), slope, rtol=1e-6, atol=1e-9)


def test_zero_terminal_snr():
    """The last entry is pure noise: everything stays finite, and v gives x0 and eps."""
    schedule = VPDiscrete([*VPDiscrete.named("scaled-linear").alphas_cumprod[:-1].tolist(), 0.0])
    t = torch.tensor([997.5, 998.0, 998.5, 999.0], dtype=torch.float64)
    for quantity in (schedule.alpha, schedule.sigma, schedule.alpha_rate, schedule.sigma_rate, schedule.log_snr):
        assert quantity(t).isfinite().all()
    assert schedule.alpha(t)[-1] < 1e-5
    torch.testing.assert_close(schedule.sigma(t)[-1], torch.ones(()).double())
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t)
    clean = VPDiscrete([1.0, 0.5, 0.1])
    assert clean.sigma(torch.zeros(1)) < 1e-6
    assert clean.log_snr(torch.zeros(1)).isfinite().all()


@pytest.mark.parametrize("schedule", [Cosine(), VPContinuous(), TrigFlow(), FlowMatching(), EDM()])
def test_no_signal_at_all(schedule):
    """Times of pure noise are the end of the schedule or beyond, never a nan."""
    assert schedule.time_of(torch.tensor([-torch.inf], dtype=torch.float64)) >= schedule.t_max


def test_cosine_is_clipped_at_a_log_snr_of_20():
    schedule = Cosine()
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(ends), torch.tensor([10.0, -10.0], dtype=torch.float64))


def test_vp_continuous_is_the_sde():
    """alpha = exp(-1/2 integral of beta), by quadrature."""
    schedule = VPContinuous()
    grid = torch.linspace(0, 0.7, 200001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + 19.9 * grid, grid)
    torch.testing.assert_close(schedule.alpha(grid[-1]), (-integral / 2).exp(), rtol=1e-9, atol=0)


def test_half_precision_data_is_noised_in_float32():
    schedule = VPDiscrete.named("scaled-linear")
    x0, eps = normal(2, 8, dtype=torch.bfloat16), normal(2, 8, seed=1, dtype=torch.bfloat16)
    t = torch.tensor([20.0, 700.0])
    noisy = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(noisy, schedule.add_noise(x0.double(), eps.double(), t).float())
    assert noisy.dtype == torch.float32


def test_noise_is_added_in_float64_at_float32_times():
    schedule = VPDiscrete.named("scaled-linear")
    x0, eps, t = normal(3, 2), normal(3, 2, seed=1), torch.tensor([0.25, 33.3, 998.7])
    assert schedule.add_noise(x0, eps, t).equal(schedule.add_noise(x0, eps, t.double()))


def test_copies_of_a_schedule_are_equal():
    schedule = VPDiscrete.named("scaled-linear")
    t = torch.tensor([3.0, 700.5])
    assert copy.deepcopy(schedule).alpha(t).equal(schedule.alpha(t))

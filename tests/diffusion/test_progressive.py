import math

import pytest
import torch

from limbeck.diffusion.mixture import GaussianMixtureDenoiser
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.progressive import (
    encoding_times,
    halvings,
    jumps,
    nested_times,
    phase_starts,
    two_step_target,
    weighted_error,
)
from limbeck.diffusion.schedules import EDM, Cosine, FlowMatching, TrigFlow, VPContinuous, VPDiscrete
from limbeck.diffusion.solvers import solve, stochastic_progressive
from limbeck.diffusion.steps import ddim_step, ddim_target

SCHEDULES = [Cosine(), EDM(), FlowMatching(), TrigFlow(), VPContinuous(), VPDiscrete.named("linear")]


def constant(x0, schedule):
    """A model that always predicts the same data."""
    return lambda x_t, t: Prediction(x0.to(x_t), "x0", x_t, t, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_every_second_time_of_a_grid_is_the_grid_of_half_the_steps(schedule, steps):
    fine, coarse = nested_times(schedule, 2 * steps), nested_times(schedule, steps)
    assert len(coarse) == steps + 1
    assert (fine.diff() < 0).all()
    torch.testing.assert_close(fine[::2], coarse, rtol=1e-12, atol=1e-12)


def test_grids_are_those_of_the_papers():
    assert nested_times(Cosine(), 4).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-4)
    rho = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    assert nested_times(EDM(), 4).tolist() == pytest.approx(rho, rel=1e-9)


def test_jumps_of_both_samplers():
    n = 4
    table = jumps(FlowMatching(), n)  # rows from i = N down to 1; t = i / N
    for row, i in zip(table.tolist(), range(n, 0, -1), strict=True):
        assert row == pytest.approx([i / n, (i - 0.5) / n, (i - 1) / n])
    table = jumps(FlowMatching(), n, "stochastic")
    for row, i in zip(table.tolist(), range(n, 1, -1), strict=False):
        assert row == pytest.approx([i / n, (i - 1) / n, (i - 2) / n])
    assert table[-1].tolist() == pytest.approx([1 / n, 0.5 / n, 0.0])
    assert torch.equal(jumps(FlowMatching(), 1, "stochastic"), jumps(FlowMatching(), 1))


def test_encoders_jump_upwards_from_just_above_the_data():
    n, schedule = 4, FlowMatching()
    start = 1 / (1 + math.exp(10))  # where the log-SNR is 20
    table = jumps(schedule, n, "encode")
    for row, i in zip(table.tolist(), range(n), strict=True):
        assert row == pytest.approx([i / n if i else start, (i + 0.5) / n, (i + 1) / n])
    assert torch.equal(encoding_times(schedule, n), torch.cat([table[:, 0], table[-1:, 2]]))
    assert encoding_times(EDM(), n)[0] == pytest.approx(0.002)
    assert encoding_times(VPDiscrete.named("linear"), n)[0] == 0  # networks know no earlier time


def test_a_discrete_schedule_has_only_so_many_steps():
    schedule = VPDiscrete.named("linear", 100)
    assert (jumps(schedule, 32).diff(dim=1) < 0).all()
    with pytest.raises(ValueError, match="too few times"):
        jumps(schedule, 64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", ["deterministic", "stochastic", "encode"])
def test_one_step_with_the_target_lands_where_two_of_the_teacher_do(schedule, kind):
    torch.manual_seed(0)
    mixture = GaussianMixtureDenoiser.ring(schedule).double()
    for t, between, s in jumps(schedule, 8, kind)[:, :, None].expand(8, 3, 5):
        x_t = schedule.add_noise(torch.randn(5, 2).double(), torch.randn(5, 2).double(), t)
        target = two_step_target(mixture, x_t, t, between, s)
        landing = ddim_step(Prediction(target, "x0", x_t, t, schedule), s)
        halfway = ddim_step(mixture(x_t, t), between)
        torch.testing.assert_close(landing, ddim_step(mixture(halfway, between), s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", ["deterministic", "stochastic", "encode"])
def test_the_target_of_a_constant_prediction_is_that_prediction(schedule, kind):
    x0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
    for t, between, s in jumps(schedule, 16, kind)[:, :, None].expand(16, 3, 6):
        x_t = schedule.add_noise(x0, torch.ones_like(x0), t)
        target = two_step_target(constant(x0 + 1, schedule), x_t, t, between, s)
        torch.testing.assert_close(target, x0 + 1, rtol=1e-6, atol=1e-6)


def test_float32_items_keep_their_digits_at_a_thousand_steps():
    torch.manual_seed(0)
    schedule = Cosine()
    mixture = GaussianMixtureDenoiser.ring(schedule)
    rows = jumps(schedule, 1024)
    t, between, s = rows.unbind(1)
    x_t = schedule.add_noise(torch.randn(1024, 2), torch.randn(1024, 2), t)
    single = two_step_target(mixture, x_t, t, between, s)
    assert single.dtype == torch.float32
    exact = two_step_target(mixture.double(), x_t.double(), t, between, s)
    assert (single.double() - exact).abs().max() < 1e-5
    halfway = ddim_step(mixture.float()(x_t, t), between)
    careless = ddim_target(x_t, t, ddim_step(mixture(halfway, between), s), s, schedule)
    assert (careless.double() - exact).abs().max() > 1e-5  # what float32 steps would make of it


def test_the_terminal_target_is_the_landing_over_alpha():
    schedule = Cosine()
    mixture = GaussianMixtureDenoiser.ring(schedule).double()
    t, between, s = jumps(schedule, 2)[-1:].expand(4, 3).unbind(1)
    x_t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    assert s.tolist() == [0.0] * 4
    landing = mixture(ddim_step(mixture(x_t, t), between), between).x0
    torch.testing.assert_close(two_step_target(mixture, x_t, t, between, s), landing)


def test_weights_by_hand():
    schedule = FlowMatching()
    t = torch.tensor([0.2, 0.5, 0.8]).double()
    prediction = Prediction(torch.zeros(3, 2), "x0", torch.ones(3, 2), t, schedule)
    target = torch.tensor([[1.0, 2.0]] * 3)
    snr = [(0.8 / 0.2) ** 2, 1.0, (0.2 / 0.8) ** 2]
    truncated = weighted_error(prediction, target, "truncated-snr")
    assert truncated.tolist() == pytest.approx([2.5 * max(value, 1) for value in snr], rel=1e-5)
    plus_one = weighted_error(prediction, target, "snr+1")
    assert plus_one.tolist() == pytest.approx([2.5 * (value + 1) for value in snr], rel=1e-5)


def test_snr_plus_one_is_the_error_in_v():
    torch.manual_seed(0)
    schedule, t = Cosine(), torch.linspace(0.05, 0.95, 6).double()
    x_t, value, target = torch.randn(3, 6, 2).double()
    prediction = Prediction(value, "v", x_t, t, schedule)
    in_v = (value - Prediction(target, "x0", x_t, t, schedule).v).square().mean(1)
    torch.testing.assert_close(weighted_error(prediction, target, "snr+1"), in_v)


def test_halvings():
    assert halvings(8, 1) == [8, 4, 2, 1]
    assert halvings(12, 3) == [12, 6, 3]
    assert halvings(4, 4) == [4]
    for start, end in ((12, 1), (4, 8), (8, 3)):
        with pytest.raises(ValueError, match="does not lead"):
            halvings(start, end)


def test_phases_share_the_training_steps():
    assert phase_starts([1.0, 1.0, 2.0], 100) == [0, 25, 50]
    assert phase_starts([1.0], 1) == [0]
    assert phase_starts([1.0, 1.0, 1.0], 3) == [0, 1, 2]
    with pytest.raises(ValueError, match="too few"):
        phase_starts([1.0, 1.0, 1.0], 2)


@pytest.mark.parametrize("schedule", [Cosine(), FlowMatching(), EDM(), VPDiscrete.named("linear")])
def test_the_stochastic_sampler_jumps_two_and_goes_back_one(schedule):
    asked = []
    data = torch.full((40000, 1), 0.7).double()

    def model(x_t, t):
        asked.append(float(t[0]))
        return constant(data, schedule)(x_t, t)

    times = nested_times(schedule, 4)
    torch.manual_seed(0)
    x = schedule.add_noise(data, torch.randn_like(data), times[:1].expand(len(data)))
    states = []
    for state, s in zip(stochastic_progressive(model, x, times), times[1:], strict=True):
        states.append(state)
        # the noise-up step restores the marginal: alpha x0 with deviation sigma
        assert state.mean() == pytest.approx(
            float(schedule.alpha(s)) * 0.7, abs=0.02 * max(1, float(schedule.sigma(s)))
        )
        assert state.std() == pytest.approx(float(schedule.sigma(s)), rel=0.02, abs=1e-9)
    assert asked == times[:-1].tolist()
    if not isinstance(schedule, EDM):
        torch.testing.assert_close(states[-1], data)
    assert solve(model, x, times, "stochastic_progressive").shape == x.shape


def test_the_stochastic_sampler_of_one_step_is_deterministic():
    schedule = Cosine()
    mixture = GaussianMixtureDenoiser.ring(schedule)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    times = nested_times(schedule, 1)
    assert torch.equal(solve(mixture, x, times, "stochastic_progressive"), solve(mixture, x, times, "ddim"))

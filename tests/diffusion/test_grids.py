import pytest
import torch

from limbeck.diffusion import grids
from limbeck.diffusion.noise_levels import draw_times, truncated_snr
from limbeck.diffusion.schedules import EDM, FlowMatching, TrigFlow, VPDiscrete
from tests.diffusion.cases import SCHEDULES, times_of


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_usual_times_fall_from_the_noise_to_the_clean_end(name, steps):
    schedule = SCHEDULES[name]
    for times in (grids.usual_times(schedule, steps), grids.uniform_times(schedule, steps)):
        assert times.shape == (steps + 1,)
        assert times.dtype == torch.float64
        assert (times.diff() < 0).all()
        assert float(times[0]) == pytest.approx(schedule.t_max, rel=1e-12)
        assert times[-1] == schedule.clean


TABLE = VPDiscrete([0.9, 0.5, 0.3, 0.1])


def test_times_of_discrete_schedules_are_whole():
    schedule = VPDiscrete.named("scaled-linear")
    assert grids.uniform_times(schedule, 4).tolist() == [999, 749, 499, 249, -1]
    times = grids.uniform_times(schedule, 7)
    assert times.equal(times.round())
    assert grids.uniform_times(schedule, 1000).tolist() == list(range(999, -2, -1))
    assert grids.leading_times(schedule, 4).tolist() == [750, 500, 250, 0, -1]
    assert grids.leading_times(schedule, 4, offset=1).tolist() == [751, 501, 251, 1, -1]


@pytest.mark.parametrize("steps", [0, -1])
def test_numbers_of_steps_that_no_grid_has(steps):
    for times in (grids.uniform_times, grids.usual_times):
        for schedule in (TABLE, EDM()):
            with pytest.raises(ValueError, match="one step or more"):
                times(schedule, steps)
        assert len(times(TABLE, 4)) == 5
        with pytest.raises(ValueError, match="too few times"):
            times(TABLE, 5)


def test_edm_is_sampled_along_karras_times():
    """Evenly spaced noise levels would spend all but one step above 1."""
    times = grids.usual_times(EDM(0.01, 50.0), 6)
    assert times.equal(torch.cat([grids.karras_times(6, 0.01, 50.0), torch.zeros(1).double()]))


def test_karras_times_against_the_formula():
    n, low, high, rho = 11, 0.002, 80.0, 7
    expected = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    torch.testing.assert_close(grids.karras_times(n), torch.tensor(expected, dtype=torch.float64))
    rising = grids.karras_times(n, rising=True)
    assert rising.equal(grids.karras_times(n).flip(0))
    assert float(rising[0]) == pytest.approx(low)


def test_the_grid_of_latent_consistency():
    schedule = VPDiscrete.named("scaled-linear")
    assert grids.lcm_grid(schedule).tolist() == [20 * n + 19 for n in range(50)]
    assert grids.lcm_times(schedule, 4).tolist() == [999, 759, 499, 259, -1]
    assert grids.lcm_times(schedule, 50)[:-1].equal(grids.lcm_grid(schedule).flip(0))
    assert grids.lcm_grid(schedule, 10).tolist() == [100 * n + 99 for n in range(10)]


def test_the_grid_of_trig_flow_consistency():
    assert grids.scm_times(1).tolist() == [1.57080, 0.0]
    assert grids.scm_times(2).tolist() == [1.57080, 1.3, 0.0]
    torch.testing.assert_close(grids.scm_times(4), 1.57080 * torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())


def test_shifted_times():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    torch.testing.assert_close(grids.shifted(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]).double())
    assert grids.shifted(t, 1.0).equal(t)
    back = grids.shifted(grids.shifted(t, 3.0), 1 / 3)
    torch.testing.assert_close(back, t)
    # A shift by s multiplies sigma / alpha by s.
    schedule = FlowMatching()
    inner = t[1:3]
    moved = schedule.log_snr(grids.shifted(inner, 3.0))
    torch.testing.assert_close(moved, schedule.log_snr(inner) - torch.tensor(3.0).log().double())


EVEN = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("law", ["uniform", "lognormal", "logit-normal"])
def test_drawn_times_lie_within_the_schedule(name, law):
    """Also for the extreme draws, of either precision."""
    schedule = SCHEDULES[name]
    extreme = torch.tensor([0.0, 2**-149, 0.5, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    for draws in (EVEN, extreme, torch.tensor([0.0, 1 - 2**-24])):
        t = draw_times(law, draws, schedule)
        assert t.dtype == torch.float64
        assert t.min() >= schedule.t_min
        assert t.max() <= schedule.t_max
        assert (t.diff() >= 0).all()


def test_uniform_times_reach_every_entry_of_a_table():
    assert draw_times("uniform", EVEN, TABLE).long().bincount(minlength=4).tolist() == [5000] * 4


def test_laws_of_times():
    log_ratio = draw_times("lognormal", EVEN, EDM(), mean=-1.2, std=1.2).log()
    assert abs(float(log_ratio.mean()) + 1.2) < 1e-3
    assert abs(float(log_ratio.std()) - 1.2) < 2e-3
    # The law is of sigma / alpha in every schedule.
    trig = draw_times("lognormal", EVEN, TrigFlow(), mean=0.2, std=1.6).tan().log()
    assert abs(float(trig.mean()) - 0.2) < 1e-3
    assert abs(float(trig.std()) - 1.6) < 2e-3
    logit = draw_times("logit-normal", EVEN, FlowMatching(), mean=0.5, std=0.8).logit()
    assert abs(float(logit.mean()) - 0.5) < 1e-3
    assert abs(float(logit.std()) - 0.8) < 2e-3
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.9))
    got = draw_times("lognormal", torch.tensor([0.9]), EDM(), mean=0.0, std=1.0).log()
    torch.testing.assert_close(got[0].float(), quantile, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_truncated_snr(name):
    schedule = SCHEDULES[name]
    t = times_of(schedule)
    ratio = (schedule.alpha(t) / schedule.sigma(t)).square()
    torch.testing.assert_close(truncated_snr(t, schedule), ratio.clamp(min=1))
    assert truncated_snr(torch.tensor([schedule.clean]), schedule).isfinite().all()

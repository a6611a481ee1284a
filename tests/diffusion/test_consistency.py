import itertools
import math

import pytest
import torch

from limbeck.diffusion import consistency
from limbeck.diffusion.consistency import SegmentSchedule, pseudo_huber, segment_end, segment_starts, squared_distance
from limbeck.diffusion.denoiser import NetworkDenoiser, Process
from limbeck.diffusion.grids import karras_times
from limbeck.diffusion.parameterisations import Direct, Preconditioned, lcm_scalings
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import EDM, Cosine, TrigFlow, VPDiscrete
from tests.diffusion.cases import Wave, normal, times_of, wave_denoiser


def test_both_pseudo_hubers_against_a_loop():
    a, b = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    for row in range(3):
        gaps = [x - y for x, y in zip(a[row].flatten().tolist(), b[row].flatten().tolist(), strict=True)]
        c = 0.00054 * math.sqrt(8)
        vector = math.sqrt(sum(d * d for d in gaps) + c * c) - c
        elementwise = sum(math.sqrt(d * d + 0.001**2) - 0.001 for d in gaps) / 8
        assert abs(float(pseudo_huber(a, b)[row]) - vector) < 1e-12
        assert abs(float(pseudo_huber(a, b, reduction="elementwise")[row]) - elementwise) < 1e-12
        squares = sum(d * d for d in gaps) / 8
        assert abs(float(squared_distance(a, b)[row]) - squares) < 1e-12


@pytest.mark.parametrize("reduction", ["vector", "elementwise"])
def test_limits_of_the_pseudo_huber(reduction):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    far, near = torch.full_like(zero, 1e4), torch.full_like(zero, 1e-4)
    assert abs(float(pseudo_huber(far, zero, 0.3, reduction)) - (1e4 - 0.3)) < 1e-4
    assert abs(float(pseudo_huber(near, zero, 0.3, reduction)) / (1e-8 / 0.6) - 1) < 1e-6
    assert float(pseudo_huber(zero, zero, 0.3, reduction)) == 0


def test_small_distances_keep_their_digits_in_float32():
    """sqrt(d^2 + c^2) - c as it stands would be 0 here."""
    a, zero = torch.full((1, 4), 1e-6), torch.zeros(1, 4)
    torch.testing.assert_close(pseudo_huber(a, zero, 0.03), torch.tensor([4e-12 / 0.06]), rtol=1e-5, atol=0)
    half = pseudo_huber(a.bfloat16(), zero.bfloat16(), 0.03)
    assert half.dtype == torch.float32


def test_gradient_of_the_vector_pseudo_huber():
    """d / sqrt(|d|^2 + c^2), shorter than 1; 0, not nan, where both are equal."""
    a, b = normal(3, 5).requires_grad_(), normal(3, 5, seed=1)
    (slope,) = torch.autograd.grad(pseudo_huber(a, b, 0.3).sum(), a)
    gap = (a - b).detach()
    torch.testing.assert_close(slope, gap / (gap.square().sum(1, keepdim=True) + 0.09).sqrt())
    assert (slope.norm(dim=1) < 1).all()
    (slope,) = torch.autograd.grad(pseudo_huber(a, a.detach(), 0.3).sum(), a)
    assert (slope == 0).all()


def test_the_curriculum_of_ict():
    """Defaults: 11 points, doubling through 8 stages of equal length to 1281."""
    steps = 400_000
    assert consistency.doubling_scales(0, steps) == 11
    assert consistency.doubling_scales(steps - 1, steps) == 1281
    stages = [consistency.doubling_scales(k * steps // 8, steps) for k in range(8)]
    assert stages == [10 * 2**k + 1 for k in range(8)]
    counts = [consistency.doubling_scales(k, 97, first=10, last=160) for k in range(97)]
    assert counts == sorted(counts)
    assert set(counts) == {11, 21, 41, 81, 161}
    assert consistency.doubling_scales(3, 4, 10, 1280) <= 1281  # fewer steps than stages


def test_the_curriculum_of_cm():
    counts = [consistency.root_scales(k, 1000) for k in range(1001)]
    assert counts[0] == 2
    assert counts[-1] == 151
    assert counts == sorted(counts)


def test_interval_weights_are_a_lognormal():
    sigmas = karras_times(41, rising=True)
    weights = consistency.lognormal_interval_weights(sigmas)
    assert abs(float(weights.sum()) - 1) < 1e-12
    normal_law = torch.distributions.Normal(torch.tensor(-1.1).double(), torch.tensor(2.0).double())
    mass = normal_law.cdf(sigmas.log()).diff()
    torch.testing.assert_close(weights, mass / mass.sum(), rtol=1e-5, atol=1e-12)


def test_segments_by_the_table_of_the_papers():
    """M = 8 on 50 points begins at 0, 6, 12, 18, 25, 31, 37, 43."""
    assert segment_starts(50, 8).tolist() == [0, 6, 12, 18, 25, 31, 37, 43]
    starts = {m: [math.floor(k * 50 / m) for k in range(m)] for m in range(1, 51)}
    index = torch.arange(50)
    for m, expected in starts.items():
        assert segment_starts(50, m).tolist() == expected
        ends = [max(b for b in expected if b <= n) - 1 for n in range(50)]
        assert segment_end(index, 50, m).tolist() == ends


def test_one_segment_ends_below_the_grid_and_as_many_as_points_one_below():
    index = torch.tensor([0, 7, 49])
    assert segment_end(index, 50, 1).tolist() == [-1, -1, -1]
    assert segment_end(index, 50, 50).tolist() == [-1, 6, 48]


def test_the_schedule_of_segments():
    schedule = SegmentSchedule([(8, 10), (4, 5), (2, 1)])
    assert [schedule.segments(step) for step in (0, 9, 10, 14, 15, 16, 1000)] == [8, 8, 4, 4, 2, 2, 2]
    for phases in ([], [(0, 5)], [(4, 0)]):
        with pytest.raises(ValueError, match="phases"):
            SegmentSchedule(phases)


def test_boundary_scalings_of_consistency_models():
    """The identity at the smallest noise; EDM's own scalings have none."""
    schedule = EDM(0.01, 50.0)
    x, sigma = normal(3, 4), torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    model = NetworkDenoiser(Wave(), Process(schedule, Preconditioned(0.5, boundary=True)))
    assert model(x, sigma).x0[0].equal(x[0])
    plain = NetworkDenoiser(Wave(), Process(schedule, Preconditioned(0.5)))
    assert not plain(x, sigma).x0[0].equal(x[0])
    c_skip, c_out = Preconditioned(0.5, boundary=True).scalings(sigma, schedule)
    torch.testing.assert_close(c_skip, 0.25 / ((sigma - 0.01) ** 2 + 0.25))
    torch.testing.assert_close(c_out, 0.5 * (sigma - 0.01) / (sigma**2 + 0.25).sqrt())


def test_what_a_preconditioned_network_is_told():
    network = Wave()
    sigma = torch.tensor([0.002, 1.0, 80.0]).double()
    for noise, told in (("quarter-log", sigma.log() / 4), ("250-log", 250 * sigma.log())):
        NetworkDenoiser(network, Process(EDM(), Preconditioned(0.5, noise=noise)))(normal(3, 4), sigma)
        torch.testing.assert_close(network.asked[-1], told)


def test_edms_denoiser_is_the_optimum_for_a_gaussian_network():
    """c_skip x is the posterior mean where data are Gaussian of deviation sigma_data: F = 0 is right there."""
    sigma, data = torch.tensor([0.1, 2.0]).double(), 0.5
    c_skip, c_out = Preconditioned(data).scalings(sigma, EDM())
    torch.testing.assert_close(c_skip, data**2 / (sigma**2 + data**2))
    # c_out^2 is the variance left in x0 given x_t, in EDM's derivation.
    torch.testing.assert_close(c_out**2, sigma**2 * data**2 / (sigma**2 + data**2))


def test_point_mass_data_make_the_loss_zero():
    """f*(x, s) = mu + (s_min / s) (x - mu) is consistent along x0 + s n with x0 = mu."""
    schedule, mu, n = EDM(), normal(1, 3), normal(1, 3, seed=1)
    grid = karras_times(11, rising=True)

    def function(x, s):
        return mu + schedule.t_min / s * (x - mu)

    for low, high in itertools.pairwise(grid):
        gap = pseudo_huber(function(mu + high * n, high), function(mu + low * n, low))
        assert float(gap) < 1e-12


def test_scalings_of_latent_consistency():
    """c_skip = d^2 / ((10 t)^2 + d^2), c_out = 10 t / sqrt((10 t)^2 + d^2): the identity at 0, x0 from 20 on."""
    t = torch.tensor([0.0, 1.0, 20.0, 999.0])
    c_skip, c_out = lcm_scalings(t)
    for time, skip, out in zip(t.tolist(), c_skip.tolist(), c_out.tolist(), strict=True):
        assert abs(skip - 0.25 / ((10 * time) ** 2 + 0.25)) < 1e-12
        assert abs(out - 10 * time / math.sqrt((10 * time) ** 2 + 0.25)) < 1e-12
    assert c_skip[2] < 1e-5
    assert c_out[2] > 1 - 1e-5
    assert lcm_scalings(torch.tensor([0, 999]))[0].tolist() == [1.0, c_skip[3]]
    said = wave_denoiser(VPDiscrete.named("scaled-linear"))(normal(4, 3), t)
    mixed = consistency.lcm_function(said)
    assert mixed[0].equal(said.x_t[0])
    torch.testing.assert_close(mixed[1], c_skip[1] * said.x_t[1] + c_out[1] * said.x0[1])
    torch.testing.assert_close(mixed[3], said.x0[3], rtol=1e-6, atol=1e-6)


def test_trig_flow_is_a_consistency_function_by_itself():
    """f = cos t x - sin t F is the identity at 0; F = -tan(t / 2) x is exact for standard normal data."""
    schedule, x = TrigFlow(), normal(3, 4)
    t = torch.tensor([0.0, 0.7, 1.5]).double()
    assert Prediction(normal(3, 4, seed=1), "v", x, t, schedule).x0[0].equal(x[0])
    exact = Prediction(-(t / 2).tan()[:, None] * x, "v", x, t, schedule)
    torch.testing.assert_close(exact.x0, x)


def test_boundaries_in_a_cosine_process():
    """Direct predictions need no boundary at the clean end: x0 is x_t / alpha there."""
    schedule = Cosine()
    t = torch.full((2,), schedule.t_min).double()
    said = NetworkDenoiser(Wave(), Process(schedule, Direct("v")))(normal(2, 3), t)
    torch.testing.assert_close(said.x0, said.x_t, rtol=0, atol=1e-3)
    assert times_of(schedule)[0] > schedule.t_min

import math

import torch

from limbeck.rendering.volume import box_interval, composite, resample, stratified, uniform_edges
from tests.rendering.shapes import assert_gradients_match


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_and_what_is_left_add_up_to_one():
    weights, left = composite(5 * draw(7, 20))
    torch.testing.assert_close(weights.sum(-1) + left, torch.ones(7, dtype=torch.float64))
    assert (weights >= 0).all()


def test_against_a_loop():
    optical = 3 * draw(2, 6)
    weights, left = composite(optical)
    for ray, row in enumerate(optical.tolist()):
        through = 1.0
        for sample, value in enumerate(row):
            assert abs(float(weights[ray, sample]) - through * (1 - math.exp(-value))) < 1e-12
            through *= math.exp(-value)
        assert abs(float(left[ray]) - through) < 1e-12


def test_a_homogeneous_ball_dims_light_by_its_chord():
    radius, sigma = 0.8, 1.7
    height = torch.linspace(0, 0.79, 9, dtype=torch.float64)
    half = (radius**2 - height**2).sqrt()
    edges = uniform_edges(2 - half, 2 + half, 13)
    _, left = composite(sigma * edges.diff())
    torch.testing.assert_close(left, torch.exp(-sigma * 2 * half))


def test_the_mean_depth_of_a_homogeneous_slab():
    """For density s from 0 to infinity the mean depth is 1/s."""
    sigma = 4.0
    edges = uniform_edges(torch.zeros(1, dtype=torch.float64), torch.full((1,), 10.0, dtype=torch.float64), 20000)
    weights, _ = composite(sigma * edges.diff())
    assert abs(float((weights * stratified(edges, False)).sum()) - 1 / sigma) < 1e-6


def test_opaque_and_empty_samples_are_exact():
    weights, left = composite(torch.tensor([[0.0, math.inf, 3.0]]))
    assert weights.tolist() == [[0.0, 1.0, 0.0]]
    assert left.tolist() == [0.0]


def test_gradients():
    optical, values = (3 * draw(4, 8)).requires_grad_(), draw(4, 8, seed=1)

    def loss():
        weights, left = composite(optical)
        return (weights * values).sum() + left.square().sum()

    assert_gradients_match(loss, [optical])
    torch.autograd.gradcheck(composite, optical)


def test_intervals_of_a_cube():
    origins = torch.tensor([[3.0, 0, 0], [3.0, 0, 0], [0, 0, 0], [3.0, 2, 0], [0.5, 1.0, 0]])
    directions = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [-1.0, 0, 0], [1.0, 0, 0]])
    near, far = box_interval(origins, directions, 1.0, near=0.1)
    torch.testing.assert_close(near[[0, 2]], torch.tensor([2.0, 0.1]))
    torch.testing.assert_close(far[[0, 2]], torch.tensor([4.0, 1.0]))
    assert torch.equal(near[[1, 3]], far[[1, 3]])  # behind, and beside the cube
    assert (far - near).isfinite().all()


def test_stratified_samples_stay_in_their_steps_and_follow_the_generator():
    edges = uniform_edges(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 7.0]), 16)
    middle = stratified(edges, False)
    torch.testing.assert_close(middle[0, 0], torch.tensor(1 + 1 / 16))
    draws = [stratified(edges, True, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert ((draws[0] >= edges[:, :-1]) & (draws[0] <= edges[:, 1:])).all()


def test_resampled_steps_hold_equal_weight():
    edges = uniform_edges(torch.zeros(3), torch.ones(3), 10)
    weights = draw(3, 10).float()
    finer = resample(edges, weights, 40, floor=0.0)
    assert finer.shape == (3, 41)
    torch.testing.assert_close(finer[:, [0, -1]], edges[:, [0, -1]])
    assert (finer.diff() >= 0).all()
    cumulative = torch.cat((torch.zeros(3, 1), weights.cumsum(-1)), -1) / weights.sum(-1, keepdim=True)
    for row in range(3):
        for number, place in enumerate(finer[row].tolist()):
            step = min(int(place * 10), 9)
            mass = cumulative[row, step] + (place * 10 - step) * (cumulative[row, step + 1] - cumulative[row, step])
            assert abs(float(mass) - number / 40) < 1e-5


def test_an_empty_ray_is_resampled_evenly():
    edges = uniform_edges(torch.zeros(1), torch.ones(1), 4)
    torch.testing.assert_close(resample(edges, torch.zeros(1, 4), 8), uniform_edges(torch.zeros(1), torch.ones(1), 8))

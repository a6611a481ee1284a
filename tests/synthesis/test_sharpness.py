"""GSAM: the steps of the published code, its limits, and what the second pass leaves alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from limbeck.synthesis.sharpness import GSAM, across, ascent, gsam_gradient, still_statistics
from tests.oracles.oracle import load

TENSORS = load("ftd")[0].tensors
SETTINGS = load("ftd")[0].hyperparameters
CASES = ["adaptive", "plain", "sam_only", "alpha1"]


def recorded(case):
    """The oracle's perceptron, which it was recorded from, with its data."""
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for number, weight in enumerate(network.parameters()):
            weight.copy_(TENSORS[f"{case}.p{number}.init"])
    images, labels = TENSORS[f"{case}.X"], TENSORS[f"{case}.Y"]
    return network, lambda: functional.cross_entropy(network(images), labels)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_of_the_published_code(case):
    network, loss = recorded(case)
    sgd = torch.optim.SGD(network.parameters(), lr=SETTINGS["lr"])
    descent = GSAM(network, sgd, **SETTINGS[case])
    handed = []
    sgd.register_step_pre_hook(lambda *_: handed.append([p.grad.clone() for p in network.parameters()]))
    for step in range(3):
        close(descent.step(loss), TENSORS[f"{case}.loss{step}"])
        for number, weight in enumerate(network.parameters()):
            close(weight.detach(), TENSORS[f"{case}.p{number}.step{step}"])
            close(handed[step][number], TENSORS[f"{case}.p{number}.finalgrad{step}"])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def some(seed, count=2):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draws, dtype=torch.float64) for size in [(4, 3), (4,)][:count]]


def test_the_ascent_against_a_loop():
    weights, gradients, rho = some(0), some(1), 0.3
    flat_w, flat_g = (torch.cat([t.flatten() for t in group]).tolist() for group in (weights, gradients))
    plain = math.sqrt(sum(g * g for g in flat_g))
    scaled = math.sqrt(sum((abs(w) * g) ** 2 for w, g in zip(flat_w, flat_g, strict=True)))
    for adaptive in (False, True):
        found = torch.cat([t.flatten() for t in ascent(weights, gradients, rho, adaptive)]).tolist()
        for w, g, e in zip(flat_w, flat_g, found, strict=True):
            assert e == pytest.approx(rho * w * w * g / scaled if adaptive else rho * g / plain, rel=1e-9)


@pytest.mark.parametrize("factor", [0.01, 7.0])
def test_the_adaptive_ascent_follows_a_rescaling_of_the_weights(factor):
    """Of k w with g / k the loss is the same function of e / k: so is the adaptive step, and the plain one is not."""
    weights, gradients = some(2), some(3)
    bigger, smaller = [factor * w for w in weights], [g / factor for g in gradients]
    for one, other in zip(ascent(weights, gradients, 0.2, True), ascent(bigger, smaller, 0.2, True), strict=True):
        torch.testing.assert_close(other, factor * one, rtol=1e-9, atol=0)
    plain = zip(ascent(weights, gradients, 0.2), ascent(bigger, smaller, 0.2), strict=True)
    assert not any(torch.allclose(other, factor * one) for one, other in plain)


def test_the_rest_stands_at_right_angles_and_adds_up():
    here, above = some(4), some(5)
    rest = across(here, above)
    product = sum(float((r * a).sum()) for r, a in zip(rest, above, strict=True))
    assert abs(product) < 1e-10
    along = [h - r for h, r in zip(here, rest, strict=True)]
    ratios = torch.cat([(p / a).flatten() for p, a in zip(along, above, strict=True)])
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))  # one multiple of the gradient above, everywhere


def test_equal_gradients_leave_no_rest():
    here = some(6)
    assert max(float(part.abs().max()) for part in across(here, here)) < 1e-10


def test_alpha_0_is_sam():
    here, above = some(7), some(8)
    assert all(torch.equal(a, g) for a, g in zip(above, gsam_gradient(here, above, 0.0), strict=True))


def test_a_vanishing_gradient_gives_no_nan():
    zeros = [torch.zeros(3), torch.zeros(2)]
    for adaptive in (False, True):
        assert all(torch.equal(e, z) for e, z in zip(ascent(zeros, zeros, 0.1, adaptive), zeros, strict=True))
    assert all(part.isfinite().all() for part in gsam_gradient(zeros, zeros, 0.4))


def steps(rho, alpha=0.4, adaptive=False):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    images, labels = torch.randn(10, 6).double(), torch.arange(10) % 4
    descent = GSAM(network, torch.optim.SGD(network.parameters(), lr=0.1), rho, alpha, adaptive)
    for _ in range(3):
        descent.step(lambda: functional.cross_entropy(network(images), labels))
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def test_rho_to_0_is_plain_sgd():
    plain = steps(0.0)
    assert (steps(0.5) - plain).norm() > 1e-3
    far, near = ((steps(rho) - plain).norm() for rho in (1e-3, 1e-4))
    assert near < 1e-4
    assert far / near == pytest.approx(10, rel=0.05)  # it is reached linearly


def test_rho_0_takes_one_pass():
    network, calls = nn.Linear(2, 2), []
    descent = GSAM(network, torch.optim.SGD(network.parameters(), lr=0.1), 0.0)
    descent.step(lambda: calls.append(1) or network(torch.ones(1, 2)).sum())
    assert len(calls) == 1


def test_the_second_pass_does_not_move_running_statistics():
    torch.manual_seed(0)
    images, labels = torch.randn(16, 4), torch.arange(16) % 3

    def network_after(rho):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        descent = GSAM(network, torch.optim.SGD(network.parameters(), lr=0.1), rho, adaptive=False)
        descent.step(lambda: functional.cross_entropy(network(images), labels))
        return network

    flat, plain = network_after(0.5), network_after(0.0)
    assert torch.equal(flat[1].running_mean, plain[1].running_mean)
    assert torch.equal(flat[1].running_var, plain[1].running_var)
    assert int(flat[1].num_batches_tracked) == 1
    assert flat[1].track_running_stats
    assert not torch.equal(flat[0].weight, plain[0].weight)


def test_batches_are_normalised_by_themselves_meanwhile():
    norm, images = nn.BatchNorm1d(3), torch.randn(8, 3)
    before = norm(images)
    with still_statistics(norm):
        assert torch.equal(norm(images), before)

"""Experts: their snapshots, and the module that holds them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from limbeck.synthesis.experts import Trajectories, flatten, train_expert, unflatten

IMAGES = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(epoch):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch))
    return [(IMAGES[rows], LABELS[rows]) for rows in order.split(8)]


def stacked(snapshots):
    return {name: torch.stack([weights[name] for weights in snapshots]) for name in snapshots[0]}


def test_snapshots_are_those_of_plain_sgd_the_start_among_them():
    found = list(train_expert(network(), batches, 2, 0.1))
    assert len(found) == 3
    weights = {name: w.detach().clone() for name, w in network().named_parameters()}
    for epoch in range(3):
        for name, weight in weights.items():
            torch.testing.assert_close(found[epoch][name], weight)
        for images, labels in batches(epoch) if epoch < 2 else ():
            first, second = (weights[f"{n}.weight"].requires_grad_() for n in (0, 2)), [0, 2]
            a, c = first
            b, d = (weights[f"{n}.bias"].requires_grad_() for n in second)
            loss = functional.cross_entropy((images @ a.T + b).tanh() @ c.T + d, labels)
            slopes = torch.autograd.grad(loss, (a, b, c, d))
            names = ("0.weight", "0.bias", "2.weight", "2.bias")
            moved = zip(names, (a, b, c, d), slopes, strict=True)
            weights = {name: (w - 0.1 * slope).detach() for name, w, slope in moved}


def test_snapshots_are_copies():
    net = network()
    way = train_expert(net, batches, 1, 0.1)
    first = next(way)
    kept = {name: weight.clone() for name, weight in first.items()}
    next(way)
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    assert not torch.equal(net[0].weight, kept["0.weight"])


def test_flat_experts_take_another_way():
    plain = list(train_expert(network(), batches, 2, 0.1))
    flat = list(train_expert(network(), batches, 2, 0.1, rho=0.2, adaptive=False))
    none = list(train_expert(network(), batches, 2, 0.1, rho=0.0, alpha=3.0))
    assert torch.equal(flat[0]["0.weight"], plain[0]["0.weight"])
    assert not torch.allclose(flat[2]["0.weight"], plain[2]["0.weight"], atol=1e-4)
    assert torch.equal(none[2]["0.weight"], plain[2]["0.weight"])


def test_what_is_filled_in_comes_out_again():
    held = Trajectories(network(), count=3, epochs=2)
    assert (held.count, held.epochs) == (3, 2)
    snapshots = list(train_expert(network(), batches, 2, 0.1))
    held.fill(1, stacked(snapshots))
    for epoch in range(3):
        found = held.at(1, epoch)
        assert list(found) == [name for name, _ in held.network.named_parameters()]
        assert all(torch.equal(found[name], snapshots[epoch][name]) for name in found)
    assert not any(weight.any() for weight in held.at(0, 1).values())
    held.at(1, 0)["0.weight"].zero_()
    assert torch.equal(held.at(1, 0)["0.weight"], snapshots[0]["0.weight"])


def test_flattening_is_undone():
    weights = dict(network().named_parameters())
    row = flatten(weights)
    assert row.shape == (6 * 5 + 5 + 5 * 3 + 3,)
    assert all(torch.equal(weights[name], value) for name, value in unflatten(row, weights).items())


def test_snapshots_stay_where_they_are_and_come_in_the_precision_asked_for():
    held = Trajectories(network(), count=1, epochs=1)
    held.snapshots.fill_(0.25)
    held.to(torch.float64)
    assert held.network[0].weight.dtype == torch.float64
    assert held.snapshots.dtype == torch.float32
    assert held.at(0, 0, like=torch.zeros((), dtype=torch.float64))["0.bias"].dtype == torch.float64
    assert "snapshots" in held.state_dict()
    assert torch.equal(copy.deepcopy(held).snapshots, held.snapshots)


def test_as_a_module_it_is_its_network():
    held = Trajectories(network(), count=1, epochs=1)
    assert torch.equal(held(IMAGES), network()(IMAGES))


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_momentum_and_decay_reach_the_optimizer(rho):
    plain = list(train_expert(network(), batches, 1, 0.1, rho=rho))[1]
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}):
        other = list(train_expert(network(), batches, 1, 0.1, rho=rho, **options))[1]
        assert not torch.allclose(other["0.weight"], plain["0.weight"], atol=1e-5)

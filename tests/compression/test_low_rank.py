"""Factors of low rank: the best ones, and layers made of them."""

import math

import pytest
import torch
from torch import nn

from limbeck.compression.low_rank import LowRankConv2d, LowRankLinear, factorise, rank_for_energy


def test_the_error_is_what_is_dropped_of_the_singular_values():
    weight = torch.randn(9, 6, dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, 7):
        up, down = factorise(weight, rank)
        assert up.shape == (9, rank)
        assert down.shape == (rank, 6)
        lost = float((weight - up @ down).square().sum())
        assert lost == pytest.approx(float(values[rank:].square().sum()), abs=1e-9)


def test_under_a_moment_no_other_factors_do_better_on_the_inputs():
    torch.manual_seed(0)
    x = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) ** 3
    weight = torch.randn(5, 6, dtype=torch.float64)
    outputs = x @ weight.T

    def lost(up, down):
        return float((outputs - x @ (up @ down).T).square().sum())

    found = factorise(weight, 2, moment=x.T @ x / 400)
    # The best approximation of the outputs by any matrix of the rank bounds it from below, and is reached.
    assert lost(*found) == pytest.approx(float(torch.linalg.svdvals(outputs)[2:].square().sum()), rel=1e-6)
    assert lost(*found) < 0.9 * lost(*factorise(weight, 2))
    plain, unit = factorise(weight, 3), factorise(weight, 3, moment=torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(plain.up @ plain.down, unit.up @ unit.down)


def test_directions_without_inputs_cost_nothing():
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 2] = 0
    x[:, 3] = 2 * x[:, 1]
    weight = torch.randn(5, 6, dtype=torch.float64)
    up, down = factorise(weight, 4, moment=x.T @ x)
    torch.testing.assert_close(x @ (up @ down).T, x @ weight.T)


def test_the_rank_for_a_share_of_the_energy():
    values = torch.tensor([3.0, 2.0, 1.0])
    assert [rank_for_energy(values, share) for share in (0.5, 9 / 14, 0.7, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    weight = torch.diag(values)
    assert factorise(weight, energy=0.9).up.shape == (3, 2)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="share"):
            rank_for_energy(values, wrong)
    for how in ({}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(ValueError, match="either"):
            factorise(weight, **how)
    with pytest.raises(ValueError, match="between 1 and 3"):
        factorise(weight, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_back(bias):
    layer, x = nn.Linear(8, 6, bias=bias), torch.randn(3, 4, 8)
    full = LowRankLinear.of(layer, 6)
    torch.testing.assert_close(full(x), layer(x), rtol=1e-4, atol=1e-5)
    thin = LowRankLinear.of(layer, 2)
    assert thin.rank == 2
    assert sum(p.numel() for p in thin.parameters()) == 2 * (8 + 6) + 6 * bias
    merged = thin.merge()
    torch.testing.assert_close(merged(x), thin(x), rtol=1e-4, atol=1e-5)
    assert (merged.bias is None) != bias
    assert int(torch.linalg.matrix_rank(merged.weight, rtol=1e-4)) == 2


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_a_convolution_and_back(padding_mode):
    layer = nn.Conv2d(3, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), padding_mode=padding_mode)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(LowRankConv2d.of(layer, 8)(x), layer(x), rtol=1e-4, atol=1e-5)
    thin = LowRankConv2d.of(layer, 3)
    assert thin.rank == 3
    torch.testing.assert_close(thin.merge()(x), thin(x), rtol=1e-4, atol=1e-5)
    gap = (thin.merge().weight - layer.weight).detach().flatten(1).square().sum()
    assert math.isclose(
        float(gap), float(torch.linalg.svdvals(layer.weight.detach().flatten(1))[3:].square().sum()), rel_tol=1e-3
    )
    with pytest.raises(ValueError, match="grouped"):
        LowRankConv2d.of(nn.Conv2d(4, 4, 3, groups=2), 2)

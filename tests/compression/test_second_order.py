"""The second-order solver against brute force and least squares."""

import itertools

import pytest
import torch

from limbeck.compression.masks import Pattern, keep_largest, keep_pattern
from limbeck.compression.matrices import reconstruction_error
from limbeck.compression.saliency import saliency
from limbeck.compression.second_order import inverse_factor, solve
from limbeck.compression.symmetric import SymmetricGrid


def correlated(samples: int = 200, inputs: int = 12, seed: int = 0) -> torch.Tensor:
    """Inputs that say much about each other."""
    draws = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, inputs, generator=draws) @ torch.randn(inputs, inputs, generator=draws)
    return mixed + torch.randn(samples, 1, generator=draws) * 3


def error(before: torch.Tensor, after: torch.Tensor, x: torch.Tensor) -> float:
    return float(reconstruction_error(before[None], after[None], (x.T @ x)[None]))


def least_squares(weight: torch.Tensor, keep: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The best matrix with given zeros, each output by itself: H_SS w_S = (H w)_S."""
    best = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = keep[row].nonzero().flatten()
        if len(kept):
            best[row, kept] = torch.linalg.solve(products[kept][:, kept], (products @ weight[row])[kept])
    return best


def test_the_factor_is_that_of_the_inverse():
    x = correlated().double()
    products = x.T @ x
    upper = inverse_factor(products, 0.01)
    matrix = products + 0.01 * products.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(matrix))
    assert torch.equal(upper, upper.triu())
    for j in (0, 5, 11):  # what is left when the columns before j are settled
        inverse = torch.linalg.inv(matrix[j:, j:])
        torch.testing.assert_close(upper[j, j:] / upper[j, j], inverse[0] / inverse[0, 0])
        torch.testing.assert_close(upper[j, j] ** 2, inverse[0, 0])


@pytest.mark.parametrize("pruned", [1, 3, 7])
def test_the_step_is_optimal_brain_surgeons(pruned):
    """Zeros in the first columns: all others are free to make up for them, and do so as well as can be."""
    x, weight = correlated().double(), torch.randn(4, 12, dtype=torch.float64)
    products = x.T @ x
    keep = (torch.arange(12) >= pruned).expand(4, 12)
    found = solve(weight, products, keep=keep, damping=1e-9)
    torch.testing.assert_close(found.weight, least_squares(weight, keep, products), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.keep, keep)


def test_one_weight_goes_where_brute_force_says():
    """Of the first run the weight whose removal costs least, compensation included."""
    for seed in range(5):
        draws = torch.Generator().manual_seed(seed)
        x = correlated(60, 3, seed).double()
        weight = torch.randn(1, 3, dtype=torch.float64, generator=draws)
        products = x.T @ x
        costs = []
        for gone in range(3):
            keep = (torch.arange(3) != gone)[None]
            costs.append(error(weight, least_squares(weight, keep, products), x))
        scores = saliency("obs", weight[None], products[None], damping=1e-9)[0, 0]
        assert int(scores.argmin()) == min(range(3), key=costs.__getitem__)
        torch.testing.assert_close(  # and the score is that cost
            scores / float(weight[0] @ products @ weight[0]),
            torch.tensor(costs, dtype=torch.float64),
            rtol=1e-3,
            atol=1e-6,
        )


def test_no_choice_with_full_freedom_beats_brute_force_and_the_solver_comes_near():
    ratios = []
    for seed in range(5):
        draws = torch.Generator().manual_seed(seed)
        x, weight = correlated(80, 6, seed).double(), torch.randn(1, 6, dtype=torch.float64, generator=draws)
        products = x.T @ x
        best = min(
            error(weight, least_squares(weight, torch.tensor([[i in kept for i in range(6)]]), products), x)
            for kept in itertools.combinations(range(6), 3)
        )
        found = solve(weight, products, sparsity=0.5, damping=1e-6)
        assert int((found.weight == 0).sum()) == 3
        ratios.append(error(weight, found.weight, x) / best)
    assert min(ratios) >= 1 - 1e-6
    assert sorted(ratios)[2] < 4


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
@pytest.mark.parametrize(
    ("few_directions", "sparsity"), [(False, 0.25), (False, 0.5), (False, 0.75), (True, 0.25), (True, 0.5)]
)
def test_it_does_better_than_magnitude_and_no_better_than_least_squares(few_directions, sparsity, pattern):
    for seed in range(4):
        draws = torch.Generator().manual_seed(seed)
        x, weight = correlated(300, 32, seed), torch.randn(16, 32, generator=draws)
        if few_directions:
            x = x[:, :8] @ torch.randn(8, 32, generator=draws) + torch.randn(300, 32, generator=draws)
        products, magnitudes = x.T @ x, weight.abs()[None]
        solved = solve(weight, products, sparsity=sparsity, pattern=pattern, block=16)
        keep = keep_largest(magnitudes, sparsity) if pattern is None else keep_pattern(magnitudes, pattern)
        assert int((~solved.keep).sum()) == int((~keep).sum())
        assert not solved.weight[~solved.keep].any()
        reached, plain = error(weight, solved.weight, x), error(weight, weight * keep[0], x)
        assert error(weight, least_squares(weight, solved.keep, products), x) <= reached < plain
        assert reached < 0.5 * plain or not few_directions
        if pattern:
            assert ((solved.weight.view(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize("block", [3, 8, 100])
def test_diagonal_products_give_magnitudes_in_units_of_the_inputs(block):
    """Inputs that say nothing of each other: nothing can be made up for."""
    weight, sizes = torch.randn(6, 24), torch.rand(24) + 0.1
    found = solve(weight, sizes.diag(), sparsity=0.5, block=24 if block == 100 else block)
    kept = found.weight != 0
    torch.testing.assert_close(found.weight[kept], weight[kept])
    damped = sizes + 0.01 * sizes.mean()
    for start in range(0, 24, 24 if block == 100 else block):
        part = slice(start, min(start + block, 24))
        expected = keep_largest((weight[:, part].abs() * damped[part].sqrt())[None], 0.5)[0]
        assert torch.equal(kept[:, part], expected)


def test_nothing_to_prune_changes_nothing():
    x, weight = correlated(), torch.randn(5, 12)
    assert torch.equal(solve(weight, x.T @ x).weight, weight)
    assert not solve(weight, x.T @ x, sparsity=1.0).weight.any()
    half = solve(weight.bfloat16(), x.T @ x, sparsity=0.5).weight
    assert half.dtype is torch.bfloat16


def test_zeros_per_row_add_up_and_blocks_share_the_whole():
    x, weight = correlated(200, 30), torch.randn(7, 30)
    for block in (4, 7, 64):
        rows = solve(weight, x.T @ x, sparsity=0.4, by_row=True, block=block).weight
        assert ((rows == 0).sum(1) == 12).all()
        assert int((solve(weight, x.T @ x, sparsity=0.37, block=block).weight == 0).sum()) == round(0.37 * 210)


def test_inputs_that_were_never_seen_are_pruned_and_do_no_harm():
    x, weight = correlated(), torch.randn(5, 12)
    x[:, 3] = 0
    found = solve(weight, x.T @ x, sparsity=0.25)
    assert not found.weight[:, 3].any()
    assert found.weight.isfinite().all()
    assert error(weight, found.weight, x) < 0.2
    with pytest.raises(ValueError, match="no inverse"):
        inverse_factor(torch.full((4, 4), torch.nan))


def test_zeros_that_are_there_stay_and_count():
    x, weight = correlated(), torch.randn(8, 12)
    keep = torch.rand(8, 12) > 0.3
    weight = weight * keep
    found = solve(weight, x.T @ x, sparsity=0.5, keep=keep)
    assert not found.weight[~keep].any()
    assert int((found.weight == 0).sum()) == 48


@pytest.mark.parametrize(("bits", "group"), [(4, None), (8, None), (4, 4), (2, 3)])
def test_rounding_keeps_zeros_and_lies_on_its_grid(bits, group):
    errors = torch.zeros(2)
    for seed in range(5):
        torch.manual_seed(seed)
        x, keep = correlated(seed=seed), torch.rand(8, 12) > 0.5
        weight = torch.randn(8, 12) * keep
        rounding = SymmetricGrid.of(weight, bits, group)
        found = solve(weight, x.T @ x, keep=keep, rounding=rounding).weight
        most, size = 2 ** (bits - 1) - 1, group or 12
        assert not found[~keep].any()
        for row in range(8):
            for start in range(0, 12, size):
                step = float(weight[row, start : start + size].abs().max()) / most or 1.0
                places = [value / step for value in found[row, start : start + size].tolist()]
                assert all(abs(place - round(place)) < 1e-4 and abs(round(place)) <= most for place in places)
        nearest = torch.stack([rounding(weight[:, j], j) for j in range(12)], 1)
        assert not nearest[~keep].any()
        errors += torch.tensor([error(weight, found, x), error(weight, nearest, x)])
    assert errors[0] < errors[1] or bits == 2  # three values leave little to choose from


def test_weights_on_the_grid_stay_as_they_are():
    x, weight = correlated(), torch.randint(-7, 8, (5, 12)) / 7 * 3
    weight[:, 0] = 3
    assert torch.equal(solve(weight, x.T @ x, rounding=SymmetricGrid.of(weight, 4)).weight, weight)
    with pytest.raises(ValueError, match="at least 2 bits"):
        SymmetricGrid.of(weight, 1)

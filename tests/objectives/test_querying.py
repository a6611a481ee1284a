import math

import numpy
import pytest
import torch
from scipy.optimize import linprog

from limbeck.objectives.querying import dep_round, inclusion_probabilities, rad_distribution, worst_case_value


def instance(seed: int, items: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(items, generator=draws, dtype=torch.float64) for _ in range(2))


def solved(gains: torch.Tensor, losses: torch.Tensor, wrong: int) -> float:
    """The value of the game as a linear program: max p·g - m t - sum u, with u_i >= p_i (g_i + l_i) - t."""
    g, stake, n = gains.numpy(), (gains + losses).numpy(), len(gains)
    cost = numpy.concatenate([-g, [wrong], numpy.ones(n)])
    bound = numpy.hstack([numpy.diag(stake), -numpy.ones((n, 1)), -numpy.eye(n)])
    total = numpy.concatenate([numpy.ones(n), numpy.zeros(n + 1)])[None]
    done = linprog(cost, bound, numpy.zeros(n), total, [1.0], [(0, None)] * n + [(None, None)] + [(0, None)] * n)
    return -done.fun


@pytest.mark.parametrize("items", [1, 2, 5, 8])
def test_the_closed_form_solves_the_linear_program(items):
    for seed in range(12):
        gains, losses = instance(seed, items)
        for wrong in range(items):
            for cost in (torch.zeros_like(losses), 0.2 * losses, 5 * losses):
                found = rad_distribution(gains, wrong, cost)
                assert found.value == pytest.approx(solved(gains, cost, wrong), abs=1e-9)
                assert found.value == pytest.approx(worst_case_value(found.probabilities, gains, wrong, cost), abs=1e-9)
                assert float(found.probabilities.sum()) == pytest.approx(1)
                assert int((found.probabilities > 0).sum()) == found.support


def test_no_other_distribution_is_better():
    gains, losses = instance(3, 6)
    for wrong, cost in ((1, None), (2, 0.3 * losses)):
        best = rad_distribution(gains, wrong, cost).value
        others = torch.distributions.Dirichlet(torch.full((6,), 0.7, dtype=torch.float64)).sample((10_000,))
        stake = others * (gains if cost is None else gains + cost)
        values = (others * gains).sum(1) - stake.topk(wrong, dim=1).values.sum(1)
        assert float(values.max()) <= best + 1e-12
        assert float(values.max()) > 0.5 * best  # the comparison is not with hopeless ones


def test_a_faultless_teacher_is_asked_about_the_largest_gain():
    gains, _ = instance(1)
    found = rad_distribution(gains, 0)
    assert found.support == 1
    assert found.probabilities[gains.argmax()] == 1
    assert found.value == pytest.approx(float(gains.max()))


@pytest.mark.parametrize("wrong", [0, 1, 3, 6])
def test_equal_gains_are_asked_about_equally(wrong):
    found = rad_distribution(torch.full((7,), 0.4), wrong)
    torch.testing.assert_close(found.probabilities, torch.full((7,), 1 / 7, dtype=torch.float64))
    assert found.support == 7
    assert found.value == pytest.approx(0.4 * (7 - wrong) / 7)


def test_on_the_support_the_surer_items_are_asked_about_more():
    gains = torch.tensor([0.9, 0.8, 0.7, 0.01])
    found = rad_distribution(gains, 1)
    assert found.support == 3
    assert found.probabilities[3] == 0
    torch.testing.assert_close((found.probabilities * gains)[:3], torch.full((3,), found.value / 2).double())


def test_the_scale_of_gains_scales_the_value_alone():
    gains, losses = instance(5)
    one, other = rad_distribution(gains, 2, losses), rad_distribution(8 * gains, 2, 8 * losses)
    torch.testing.assert_close(one.probabilities, other.probabilities)
    assert other.value == pytest.approx(8 * one.value)


def test_no_losses_is_losses_of_zero():
    gains, _ = instance(6)
    assert rad_distribution(gains, 2).value == rad_distribution(gains, 2, torch.zeros(7)).value


def test_gains_of_zero_stay_out_and_do_not_overflow():
    gains = torch.cat([torch.zeros(50_000), torch.tensor([1e-6, 0.5, 0.6])])
    found = rad_distribution(gains, 1)
    assert found.support == 2
    assert found.probabilities[:-2].sum() == 0
    assert math.isfinite(found.value)


@pytest.mark.parametrize("wrong", [4, 9])
def test_if_every_answer_may_be_wrong_all_items_are_alike_or_the_cheapest_are_asked(wrong):
    gains = torch.tensor([0.1, 0.5, 0.9, 0.3])
    found = rad_distribution(gains, wrong)
    torch.testing.assert_close(found.probabilities, torch.full((4,), 0.25, dtype=torch.float64))
    assert found.value == pytest.approx(0)
    costly = rad_distribution(gains, wrong, torch.tensor([3.0, 2.0, 1.0, 1.0]))
    assert costly.probabilities.tolist() == [0, 0, 0.5, 0.5]
    assert costly.value == pytest.approx(-1)


def test_equal_gains_are_ordered_by_the_seed():
    gains, firsts = torch.cat([torch.full((6,), 0.5), torch.full((1,), 0.4)]), set()
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        found = rad_distribution(gains, 0, torch.linspace(0, 0, 7), generator=draws)
        again = rad_distribution(gains, 0, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found.probabilities, again.probabilities)
        picked = dep_round(inclusion_probabilities(found.probabilities, 2), draws)
        firsts.add(int(picked.int().argmax()))
        assert not picked[6]
    assert len(firsts) > 2


def test_a_budget_enlarges_the_support():
    gains, _ = instance(2)
    found = rad_distribution(gains, 0, at_least=4)
    assert found.support == 4
    assert set(found.probabilities.nonzero().flatten().tolist()) == set(gains.topk(4).indices.tolist())
    assert found.value == pytest.approx(worst_case_value(found.probabilities, gains, 0))
    torch.testing.assert_close(inclusion_probabilities(found.probabilities, 4), (found.probabilities > 0).double())


@pytest.mark.parametrize("arguments", [([], 0), ([0.5], -1), ([-0.1], 0), ([0.5], 0, [-1.0])])
def test_senseless_games_are_refused(arguments):
    gains, wrong, *losses = arguments
    with pytest.raises(ValueError, match="at least"):
        rad_distribution(torch.tensor(gains), wrong, *map(torch.tensor, losses))


def test_chances_are_capped_and_the_rest_is_shared():
    p = torch.tensor([0.7, 0.2, 0.08, 0.02, 0.0])
    chances = inclusion_probabilities(p, 3)
    # 3·0.7 > 1, then 2·0.2/0.3 > 1, then one for the last two by 4:1
    torch.testing.assert_close(chances, torch.tensor([1, 1, 0.8, 0.2, 0], dtype=torch.float64))
    torch.testing.assert_close(inclusion_probabilities(p, 1), p.double())
    assert inclusion_probabilities(p, 0).sum() == 0
    with pytest.raises(ValueError, match="4 items can be drawn, not 5"):
        inclusion_probabilities(p, 5)


def test_dependent_rounding_has_the_size_and_the_chances_asked_for():
    chances = torch.tensor([0.1, 0.9, 0.5, 0.5, 1.0, 0.0, 0.35, 0.65], dtype=torch.float64)
    draws, times = torch.Generator().manual_seed(0), 4000
    counts = torch.zeros(8)
    for _ in range(times):
        picked = dep_round(chances, draws)
        assert int(picked.sum()) == 4
        counts += picked
    spread = (chances * (1 - chances) / times).sqrt()
    assert bool(((counts / times - chances).abs() <= 4.5 * spread).all())


def test_a_single_chance_is_drawn_by_itself():
    draws = torch.Generator().manual_seed(0)
    share = sum(int(dep_round(torch.tensor([0.3, 1.0]), draws).sum()) - 1 for _ in range(2000)) / 2000
    assert abs(share - 0.3) < 0.05
    with pytest.raises(ValueError, match="cap them"):
        dep_round(torch.tensor([1.2]))


def test_many_chances_add_up():
    draws = torch.Generator().manual_seed(1)
    p = torch.rand(20_000, generator=draws, dtype=torch.float64)
    assert int(dep_round(inclusion_probabilities(p / p.sum(), 777), draws).sum()) == 777

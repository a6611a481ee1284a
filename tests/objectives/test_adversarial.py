"""Losses of games: values at known logits, gradients, and the second derivative of R1."""

import math

import pytest
import torch

from limbeck.objectives.adversarial import (
    approximate_r1,
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    logistic_generator,
    r1_penalty,
    reverse_gradient,
)

REAL, FAKE = torch.tensor([[2.0, 0.5], [-1.0, 0.0]]), torch.tensor([-3.0, 0.0, 0.5])


def softplus(value):
    return math.log1p(math.exp(value))


def test_values_at_known_logits():
    assert hinge_discriminator(REAL, FAKE) == pytest.approx((0 + 0.5 + 2 + 1) / 4 + (0 + 1 + 1.5) / 3)
    assert hinge_generator(FAKE) == pytest.approx(2.5 / 3)
    real, fake = REAL.flatten().tolist(), FAKE.tolist()
    expected = sum(softplus(-one) for one in real) / 4 + sum(softplus(one) for one in fake) / 3
    assert logistic_discriminator(REAL, FAKE) == pytest.approx(expected)
    assert logistic_generator(FAKE) == pytest.approx(sum(softplus(-one) for one in fake) / 3)


def test_a_critic_that_says_nothing_and_one_that_is_sure():
    nothing, sure = torch.zeros(3), torch.full((3,), 100.0)
    assert hinge_discriminator(nothing, nothing) == 2
    assert hinge_discriminator(sure, -sure) == 0
    assert logistic_discriminator(nothing, nothing) == pytest.approx(2 * math.log(2))
    assert logistic_discriminator(sure, -sure) < 1e-6


def test_the_logistic_generator_does_not_saturate_where_the_critic_is_right():
    fake = torch.tensor([-20.0], requires_grad=True)
    (own,) = torch.autograd.grad(logistic_generator(fake), fake)
    (reversed_critic,) = torch.autograd.grad(-torch.nn.functional.softplus(fake).mean(), fake)
    assert own == pytest.approx(-1.0, rel=1e-6)
    assert abs(float(reversed_critic)) < 1e-6


def test_half_precision_is_computed_in_float32():
    for loss in (hinge_generator, logistic_generator):
        assert loss(FAKE.bfloat16()).dtype == torch.float32


def test_r1_of_a_quadratic_critic_and_its_gradient():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(scale * x.square().sum(1, keepdim=True), x)  # the gradient is 2 scale x
    squares = x.detach().square().sum(1).mean()
    torch.testing.assert_close(penalty, (4 * 0.7**2 * squares).float())
    (slope,) = torch.autograd.grad(penalty, scale)
    torch.testing.assert_close(slope, 8 * 0.7 * squares)


def test_r1_sums_over_inputs_and_means_over_items():
    first, second = torch.randn(4, 2, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    logits = 3 * first.sum(1) + 2 * second.sum((1, 2))
    assert r1_penalty(logits, first, second) == pytest.approx(9 * 2 + 4 * 6)
    with pytest.raises(ValueError, match="real items"):
        r1_penalty(logits)


def test_approximate_r1_tends_to_r1():
    weight, sigma = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.1
    x = torch.randn(40_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = float(weight.square().sum())
    found = float(approximate_r1(x @ weight, (x + sigma * noise) @ weight)) / sigma**2
    assert found == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0, -1.0])
def test_the_gradient_is_turned_round_and_the_value_kept(weight):
    x = torch.randn(3, 4, requires_grad=True)
    turned = reverse_gradient(x, weight)
    assert torch.equal(turned, x)
    (found,) = torch.autograd.grad(turned.pow(3).sum(), x)
    torch.testing.assert_close(found, -weight * 3 * x.detach().square())

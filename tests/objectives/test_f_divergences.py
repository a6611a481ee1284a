import math

import pytest
import torch

from limbeck.objectives.f_divergences import F_DIVERGENCES, f_divergence, generalised_jsd, kl_divergence, log_mixture

# Every row, the parameterised ones at several parameters.
ROWS = [(name, {}) for name in F_DIVERGENCES] + [
    ("symmetric-kl", {"weight": 0.0}),
    ("symmetric-kl", {"weight": 0.3}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("skew-kl", {"alpha": 0.0}),
    ("skew-kl", {"alpha": 0.7}),
    ("skew-reverse-kl", {"alpha": 0.0}),
    ("skew-reverse-kl", {"alpha": 0.7}),
]
RATIOS = torch.tensor([0.1, 0.4, 0.9, 1.3, 4.0, 20.0], dtype=torch.float64)

# The table of f-distill, row by row.
WEIGHTS = {
    "reverse-kl": lambda r: torch.ones_like(r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "jensen-shannon": lambda r: r / (1 + r),
    "squared-hellinger": lambda r: r.sqrt() / 4,
    "forward-kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman-chi2": lambda r: 2 / r,
    "pearson-chi2": lambda r: 2 * r**2,
    "jsd": lambda r: 0.5 * r / (1 + r),
}


def log_probs(seed, *shape, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=dtype)).log_softmax(-1)


def derivative(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at).sum(), at)[0]


@pytest.mark.parametrize(("name", "parameters"), ROWS)
def test_stable_form_is_the_generator_summed(name, parameters):
    row, log_q, log_p = f_divergence(name, **parameters), log_probs(0, 5, 9), log_probs(1, 5, 9)
    expected = (log_q.exp() * row.f((log_p - log_q).exp())).sum(-1)
    torch.testing.assert_close(row.from_log_probs(log_q, log_p), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "parameters"), ROWS)
def test_derivatives(name, parameters):
    row = f_divergence(name, **parameters)
    assert abs(row.f(torch.ones((), dtype=torch.float64))) < 1e-12
    torch.testing.assert_close(row.df(RATIOS), derivative(row.f, RATIOS))
    if row.smooth:
        torch.testing.assert_close(row.d2f(RATIOS), derivative(lambda r: row.df(r) + 0 * r, RATIOS))


@pytest.mark.parametrize(("name", "parameters"), ROWS)
def test_zero_at_equality_and_positive_elsewhere(name, parameters):
    row = f_divergence(name, **parameters)
    log_q, log_p = log_probs(0, 6, 9, dtype=torch.float32), log_probs(1, 6, 9, dtype=torch.float32)
    assert (row.from_log_probs(log_q, log_p) > 0).all()
    assert row.from_log_probs(log_q, log_q.clone()).abs().max() < 1e-6


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_the_published_table(name):
    row = f_divergence(name)
    torch.testing.assert_close(row.weight(RATIOS), WEIGHTS[name](RATIOS))
    second = derivative(lambda r: derivative_graph(row.f, r), RATIOS)
    torch.testing.assert_close(row.weight(RATIOS), second * RATIOS**2)


def derivative_graph(function, at):
    return torch.autograd.grad(function(at).sum(), at, create_graph=True)[0]


def test_weights_add_up():
    weight = {name: f_divergence(name).weight(RATIOS) for name in WEIGHTS}
    torch.testing.assert_close(weight["jensen-shannon"], 1 - weight["softened-reverse-kl"])
    torch.testing.assert_close(weight["jeffreys"], weight["reverse-kl"] + weight["forward-kl"])


def test_total_variation_has_no_weight():
    with pytest.raises(ValueError, match="no weight"):
        f_divergence("total-variation").weight(RATIOS)


@pytest.mark.parametrize("name", sorted(F_DIVERGENCES))
def test_gradient_is_the_generators(name):
    """d/dz = q (g - sum q g) with g = f(r) - r f'(r), for every f-divergence."""
    row, log_p = f_divergence(name), log_probs(1, 4, 7)
    logits = log_probs(0, 4, 7).requires_grad_()
    row.from_log_probs(logits.log_softmax(-1), log_p).sum().backward()
    q = logits.detach().softmax(-1)
    r = log_p.exp() / q
    g = row.f(r) - r * row.df(r)
    torch.testing.assert_close(logits.grad, q * (g - (q * g).sum(-1, keepdim=True)), rtol=1e-8, atol=1e-10)


def test_jsd_limits_are_the_two_kls():
    log_q, log_p = log_probs(0, 5, 9), log_probs(1, 5, 9)
    small = 1e-6
    forward = generalised_jsd(small).from_log_probs(log_q, log_p) / small
    reverse = generalised_jsd(1 - small).from_log_probs(log_q, log_p) / small
    torch.testing.assert_close(forward, kl_divergence(log_p, log_q), rtol=1e-3, atol=0)
    torch.testing.assert_close(reverse, kl_divergence(log_q, log_p), rtol=1e-3, atol=0)
    # The jump that the convention makes at the very ends.
    assert torch.equal(generalised_jsd(0.0).from_log_probs(log_q, log_p), kl_divergence(log_p, log_q))
    assert torch.equal(generalised_jsd(1.0).from_log_probs(log_q, log_p), kl_divergence(log_q, log_p))


def test_skew_limits():
    log_q, log_p = log_probs(0, 5, 9), log_probs(1, 5, 9)
    for name, plain in (("skew-kl", "forward-kl"), ("skew-reverse-kl", "reverse-kl")):
        expected = f_divergence(plain).from_log_probs(log_q, log_p)
        torch.testing.assert_close(f_divergence(name, alpha=0.0).from_log_probs(log_q, log_p), expected)
        log_q.requires_grad_()
        nothing = f_divergence(name, alpha=1.0).from_log_probs(log_q, log_p)
        assert nothing.abs().max() < 1e-12
        assert torch.autograd.grad(nothing.sum(), log_q)[0].abs().max() < 1e-12


def test_bounds():
    log_q, log_p = log_probs(0, 50, 9, scale=4.0), log_probs(1, 50, 9, scale=4.0)
    tv, hellinger, kl = (
        f_divergence(name).from_log_probs(log_q, log_p)
        for name in ("total-variation", "squared-hellinger", "forward-kl")
    )
    assert (tv <= 1).all()
    assert (tv <= (kl / 2).sqrt()).all(), "Pinsker"
    assert (hellinger <= tv).all()
    assert (tv <= (2 * hellinger).sqrt()).all()
    assert (f_divergence("jsd").from_log_probs(log_q, log_p) <= math.log(2)).all()


@pytest.mark.parametrize("name", sorted(F_DIVERGENCES))
def test_absent_entries_give_finite_values_and_gradients(name):
    """-inf for the student, for the teacher, for both; the last changes nothing at all."""
    logits = torch.tensor([[0.3, -1.0, 0.7, -math.inf, 0.2, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[0.1, 0.4, -math.inf, 0.9, 0.5, -math.inf]])
    row = f_divergence(name)
    value = row.from_log_probs(logits.log_softmax(-1), teacher.log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()
    shorter = row.from_log_probs(logits.detach()[:, :5].log_softmax(-1), teacher[:, :5].log_softmax(-1))
    torch.testing.assert_close(value.detach(), shorter)


def test_exact_where_the_limit_is_finite():
    """Disjoint supports: total variation and Hellinger are 1, Jensen-Shannon is log 2."""
    log_q, log_p = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    for name, expected in (("total-variation", 1.0), ("squared-hellinger", 1.0), ("jsd", math.log(2))):
        assert f_divergence(name).from_log_probs(log_q, log_p) == pytest.approx(expected)


def test_mixture_keeps_improbable_tokens():
    log_a, log_b = torch.tensor([-300.0, 0.0]), torch.tensor([-300.0, 0.0])
    torch.testing.assert_close(log_mixture(log_a, log_b, 0.3), log_a)


@pytest.mark.parametrize("name", sorted(name for name in F_DIVERGENCES if "chi2" not in name))
def test_peaked_distributions_stay_finite(name):
    """The chi-squares are left out: their true value exceeds float32 here."""
    logits = torch.tensor([[80.0, 0.0, -80.0]], requires_grad=True)
    value = f_divergence(name).from_log_probs(logits.log_softmax(-1), logits.detach().flip(-1).log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [("kl", {}, "known"), ("jsd", {"beta": 1.5}, "beta"), ("skew-kl", {"alpha": -0.1}, "alpha")],
)
def test_refusals(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        f_divergence(name, **parameters)

import math

import pytest
import torch

from limbeck.objectives.divergences import divergence
from limbeck.objectives.sequence import (
    advantages,
    importance_weights,
    mixed_log_probs,
    ppo_surrogate,
    reverse_kl_k3,
    single_step,
    token_log_probs,
    token_rewards,
    whiten,
)

MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
REWARDS = torch.tensor([[1.0, -2.0, 0.5, 9.0], [3.0, 9.0, 9.0, 9.0]])


def slow_advantages(rewards, mask, gamma, normalise, first):
    result = []
    for row, valid in zip(rewards.tolist(), mask.tolist(), strict=True):
        length = len(row)
        result.append([])
        for t in range(length):
            ahead = [i for i in range(t + first, length) if valid[i]]
            total = sum(gamma ** (i - t - first) * row[i] for i in ahead)
            result[-1].append(total / max(len(ahead), 1) if normalise else total)
    return torch.tensor(result)


@pytest.mark.parametrize("gamma", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("include_current", [True, False])
def test_advantages_against_a_loop(gamma, normalise, include_current):
    got = advantages(REWARDS, MASK, gamma=gamma, normalise_length=normalise, include_current=include_current)
    torch.testing.assert_close(got, slow_advantages(REWARDS, MASK, gamma, normalise, 0 if include_current else 1))


def test_trl_differs_by_the_absolute_discount():
    plain = advantages(REWARDS, MASK, gamma=0.9, normalise_length=False)
    absolute = advantages(REWARDS, MASK, gamma=0.9, normalise_length=False, compat="trl")
    torch.testing.assert_close(absolute, plain * 0.9 ** torch.arange(4))


def test_whitening():
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, False]] * 3)
    white = whiten(values, mask)
    assert white[mask].mean().abs() < 1e-6
    assert white[mask].var() == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()
    official = whiten(values)
    assert official.mean().abs() < 1e-6
    assert official.var() == pytest.approx(1, abs=1e-5)
    assert (whiten(values[:1, :1]) == 0).all()


def test_rewards():
    teacher, student = torch.tensor([-1.0, -300.0]), torch.tensor([-2.0, -1.0], requires_grad=True)
    rewards = token_rewards(teacher, student, scale=0.5, limit=100.0)
    assert rewards.tolist() == [2.0, -100.0]
    assert not rewards.requires_grad


def test_k3_is_positive_and_unbiased():
    q, p = (torch.randn(6, generator=torch.Generator().manual_seed(seed)).log_softmax(-1) for seed in (0, 1))
    values = reverse_kl_k3(p - q)
    assert (values >= 0).all()
    # The mean under q, enumerated, is KL(q || p).
    torch.testing.assert_close((q.exp() * values).sum(), (q.exp() * (q - p)).sum())


def policy(table, first, second):
    """log q of a two-token sentence: the second token's row depends on the first."""
    return torch.stack([table[0].log_softmax(-1)[first], table[1 + first].log_softmax(-1)[second]])


def test_policy_gradient_equals_the_enumerated_gradient():
    """Item 13 over all four sentences of two tokens: E[-sum_t A_t grad log q] is the gradient of sequence-level KL."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    kl, surrogate = 0.0, 0.0
    for first in (0, 1):
        for second in (0, 1):
            log_q, log_p = policy(student, first, second), policy(teacher, first, second)
            probability = log_q.sum().exp()
            kl = kl + probability * (log_q - log_p).sum()
            rewards = token_rewards(log_p, log_q)[None]
            mask = torch.ones(1, 2, dtype=torch.bool)
            advantage = advantages(rewards, mask, gamma=1.0, normalise_length=False)
            surrogate = surrogate + probability.detach() * ppo_surrogate(log_q, log_q.detach(), advantage[0]).sum()
    (expected,) = torch.autograd.grad(kl, student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(surrogate, student)[0], expected, rtol=1e-9, atol=1e-12)


def test_single_step_and_the_rest_make_the_whole_gradient():
    """With the exact single-step term the return starts at the next token: the same gradient once more."""
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    kl, surrogate = 0.0, 0.0
    for first in (0, 1):
        for second in (0, 1):
            log_q, log_p = policy(student, first, second), policy(teacher, first, second)
            probability = log_q.sum().exp()
            kl = kl + probability * (log_q - log_p).sum()
            mask = torch.ones(1, 2, dtype=torch.bool)
            later = advantages(
                token_rewards(log_p, log_q)[None], mask, gamma=1.0, normalise_length=False, include_current=False
            )
            rows = [0, 1 + first]
            local = ppo_surrogate(log_q, log_q.detach(), later[0]) + single_step(student[rows], teacher[rows])
            surrogate = surrogate + probability.detach() * local.sum()
    (expected,) = torch.autograd.grad(kl, student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(surrogate, student)[0], expected, rtol=1e-9, atol=1e-12)


def test_surrogate_clips():
    old = torch.zeros(4)
    log_probs = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = ppo_surrogate(log_probs, old, advantage)
    expected = [-1.2, math.exp(0.5), -math.exp(-0.5), 0.8]
    assert loss.tolist() == pytest.approx(expected)
    loss.sum().backward()
    assert (log_probs.grad != 0).tolist() == [False, True, True, False]


def test_importance_weights_undo_the_mixed_sampler():
    student, teacher = (torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    log_q, sampler = student.log_softmax(-1), mixed_log_probs(student, teacher, 0.2)
    torch.testing.assert_close(sampler.exp(), 0.2 * teacher.softmax(-1) + 0.8 * student.softmax(-1))
    weights = importance_weights(log_q, sampler)
    assert (weights <= 1 / 0.8 + 1e-6).all()
    torch.testing.assert_close(sampler.exp() * weights, log_q.exp())
    values = ppo_surrogate(log_q, log_q, torch.ones(6), weights, clip_range=0.9)
    torch.testing.assert_close(values, -weights)
    with pytest.raises(ValueError, match="alpha"):
        mixed_log_probs(student, teacher, 1.2)


def test_token_log_probs():
    logits = torch.randn(2, 3, 5)
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = torch.distributions.Categorical(logits=logits / 2).log_prob(tokens)
    torch.testing.assert_close(token_log_probs(logits, tokens, 2.0), expected)


def test_single_step_is_reverse_kl():
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(single_step(student, teacher), divergence("reverse-kl")(student, teacher))

import math

import pytest
import torch

from limbeck.objectives.divergences import (
    DIVERGENCES,
    adaptive_kl,
    decoupled_kl,
    divergence,
    entropy,
    log_probabilities,
    log_sum_exp,
    sorted_wasserstein,
    token_cross_entropy,
)
from limbeck.objectives.vocabulary import match_vocabulary

SHAPE = (2, 3, 8)


def logits(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*(shape or SHAPE), generator=generator, dtype=torch.float64).to(dtype)


def gradient(loss, student):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student).sum(), student)[0]


def closed_forms(log_q, log_p):
    """The gradients of the spec's items 1 to 6 with respect to the student's logits."""
    q, p = log_q.exp(), log_p.exp()

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1, keepdim=True)

    def mean(values):
        return (q * values).sum(-1, keepdim=True)

    def jsd(beta):
        log_m = (beta * p + (1 - beta) * q).log()
        return (1 - beta) * q * (log_q - log_m - kl(log_q, log_m))

    def skew(alpha):
        m = alpha * p + (1 - alpha) * q
        return (1 - alpha) * q * (-p / m + mean(p / m))

    reverse = q * (log_q - log_p - kl(log_q, log_p))
    sign = (q - p).sign()
    return {
        ("forward-kl",): q - p,
        ("reverse-kl",): reverse,
        ("jsd", "beta", 0.1): jsd(0.1),
        ("jsd", "beta", 0.5): jsd(0.5),
        ("skew-kl", "alpha", 0.1): skew(0.1),
        ("symmetric-kl", "weight", 0.9): 0.1 * (q - p) + 0.9 * reverse,
        ("total-variation",): 0.5 * q * (sign - mean(sign)),
    }


def test_closed_form_gradients():
    student, teacher = logits(0), logits(1)
    for (name, *parameter), expected in closed_forms(student.log_softmax(-1), teacher.log_softmax(-1)).items():
        loss = divergence(name, **dict([parameter] if parameter else []))
        torch.testing.assert_close(gradient(lambda z, loss=loss: loss(z, teacher), student), expected, msg=name)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_every_name(name):
    """Per item, zero at equality, float32 inside, blind to a shift of the logits, no gradient to the teacher."""
    loss, student, teacher = divergence(name), logits(0), logits(1).requires_grad_()
    value = loss(student, teacher)
    assert value.shape == SHAPE[:-1]
    assert (value > 0).all()
    assert not value.requires_grad
    assert loss(student, student.clone()).abs().max() < 1e-12
    torch.testing.assert_close(loss(student + 3, teacher - 5), value)
    half = loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(student.bfloat16().float(), teacher.bfloat16().float()))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_temperature(name):
    student, teacher = logits(0), logits(1)
    plain = divergence(name)(student / 2, teacher / 2)
    torch.testing.assert_close(divergence(name)(student, teacher, 2.0), plain)
    torch.testing.assert_close(divergence(name, square_temperature=True)(student, teacher, 2.0), 4 * plain)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_padded_vocabulary(name, longer):
    """Padding with -inf is what a missing entry means: the same as that entry's logit going to -infinity."""
    student, teacher = logits(0), logits(1)
    short = {"student": (student, teacher[..., :6]), "teacher": (student[..., :6], teacher)}[longer]
    filled = [torch.nn.functional.pad(side, (0, 8 - side.shape[-1]), value=-math.inf) for side in short]
    value = divergence(name)(*short)
    assert value.isfinite().all()
    torch.testing.assert_close(value, divergence(name)(*filled))
    both = [torch.nn.functional.pad(side, (0, 3), value=-math.inf) for side in (student, teacher)]
    torch.testing.assert_close(divergence(name)(*both), divergence(name)(student, teacher))
    grad = gradient(lambda z: divergence(name)(z, both[1]), both[0])
    assert grad.isfinite().all()
    assert (grad[..., 8:] == 0).all()


def test_match_vocabulary():
    student, teacher = logits(0, 2, 5), logits(1, 2, 7)
    padded, same = match_vocabulary(student, teacher)
    assert same is teacher
    assert torch.isneginf(padded[:, 5:]).all()
    assert torch.equal(padded.softmax(-1)[:, :5], student.softmax(-1))
    assert [side.shape[-1] for side in match_vocabulary(student, teacher, "truncate")] == [5, 5]
    assert (match_vocabulary(student, teacher, "zero")[0][:, 5:] == 0).all()
    assert match_vocabulary(teacher, student)[1].shape == (2, 7)


def test_cross_entropy_form_is_kl_plus_entropy():
    student, teacher = logits(0), logits(1)
    kl = divergence("forward-kl")
    torch.testing.assert_close(
        token_cross_entropy(student, teacher, 2.0), kl(student, teacher, 2.0) + entropy(teacher, 2.0)
    )
    torch.testing.assert_close(
        gradient(lambda z: token_cross_entropy(z, teacher), student), gradient(lambda z: kl(z, teacher), student)
    )
    assert entropy(torch.tensor([0.0, 0.0, -math.inf])) == pytest.approx(math.log(2))


def test_jeffreys_is_symmetric():
    student, teacher = logits(0), logits(1)
    for name in ("jeffreys", "jensen-shannon", "jsd", "total-variation", "squared-hellinger"):
        torch.testing.assert_close(divergence(name)(student, teacher), divergence(name)(teacher, student))


def slow_adaptive_kl(q, p, mu):
    order = sorted(range(len(p)), key=lambda v: -p[v])
    head, mass = set(), 0.0
    for v in order:
        head.add(v)
        mass += p[v]
        if mass >= mu:
            break
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    share = sum(gaps[v] for v in head) / sum(gaps)
    forward = sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    reverse = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    return share * forward + (1 - share) * reverse


@pytest.mark.parametrize("mu", [0.3, 0.5, 0.95])
def test_adaptive_kl_against_a_loop(mu):
    log_q, log_p = logits(0).log_softmax(-1), logits(1).log_softmax(-1)
    rows = zip(log_q.flatten(0, 1).exp().tolist(), log_p.flatten(0, 1).exp().tolist(), strict=True)
    expected = [slow_adaptive_kl(q, p, mu) for q, p in rows]
    torch.testing.assert_close(adaptive_kl(log_q, log_p, mu).flatten().tolist(), expected)


def test_adaptive_kl_weights_carry_no_gradient():
    student, log_p = logits(0), logits(1).log_softmax(-1)
    total, forward, reverse = (divergence(name)(student, log_p) for name in ("adaptive-kl", "forward-kl", "reverse-kl"))
    share = ((total - reverse) / (forward - reverse)).unsqueeze(-1)
    expected = share * gradient(lambda z: divergence("forward-kl")(z, log_p), student)
    expected = expected + (1 - share) * gradient(lambda z: divergence("reverse-kl")(z, log_p), student)
    torch.testing.assert_close(gradient(lambda z: divergence("adaptive-kl")(z, log_p), student), expected)


def test_decoupled_kl_recombines_to_kl():
    """KL = target part + (1 - p_target) rest part."""
    student, teacher = logits(0), logits(1)
    target = torch.tensor([[0, 3, 7], [1, 1, 4]])
    parts = [decoupled_kl(student, teacher, target, alpha=a, beta=b) for a, b in ((1.0, 0.0), (0.0, 1.0))]
    rest = 1 - teacher.softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(parts[0] + rest * parts[1], divergence("forward-kl")(student, teacher))
    assert decoupled_kl(student, student, target).abs().max() < 1e-12


def test_sorted_wasserstein():
    q, p = logits(0, 5, 8).softmax(-1), logits(1, 5, 6).softmax(-1)
    permuted = sorted_wasserstein(q[:, torch.randperm(8)], p[:, torch.randperm(6)])
    torch.testing.assert_close(permuted, sorted_wasserstein(q, p))
    plain = (q - torch.nn.functional.pad(p, (0, 2))).abs().sum(-1)
    assert (sorted_wasserstein(q, p) <= plain + 1e-12).all()


def test_log_sum_exp_of_nothing():
    values = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf]], requires_grad=True)
    result = log_sum_exp(values)
    assert result.tolist() == [-math.inf, 0.0]
    result.exp().sum().backward()
    assert values.grad.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_log_probabilities_keep_float64():
    assert log_probabilities(logits(0)).dtype == torch.float64
    assert log_probabilities(logits(0).half()).dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match="adaptive-kl"):
        divergence("wasserstein")
    with pytest.raises(ValueError, match="does not take"):
        divergence("jsd", alpha=0.1)
    with pytest.raises(ValueError, match="temperature"):
        divergence("jsd")(logits(0), logits(1), 0.0)

import math

import pytest
import torch
from tests.oracles.oracle import load

from limbeck.objectives.divergences import divergence
from limbeck.objectives.f_divergences import F_DIVERGENCES
from limbeck.objectives.tokens import select_tokens
from limbeck.objectives.topk import (
    bucket_log_probabilities,
    sample_support,
    sampled_cross_entropy,
    spread_uniformly,
    support_divergence,
    topk_divergence,
)

CASE = load("topk-teacher-distillkit")[0]
NAMES = {"kl": "forward-kl", "js": "jsd", "tvd": "total-variation"}
LOSSES = sorted(name for name in CASE.tensors if name.startswith("loss.") and name != "loss.dense_kl")


def logits(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top(teacher, k):
    log_probs, ids = teacher.log_softmax(-1).topk(k, dim=-1)
    return ids, log_probs


@pytest.mark.parametrize("key", LOSSES)
def test_distillkit(key):
    _, name, tail, temperature = key.split(".", 3)
    student = CASE.tensors["student_logits"].clone().requires_grad_()
    chosen = select_tokens(CASE.tensors["mask"], student, CASE.tensors["topk_ids"], CASE.tensors["topk_logprobs"])
    loss_of = topk_divergence(NAMES[name], tail={"symmetric_uniform": "bucket", "zero": "zero"}[tail])
    loss = loss_of(*chosen, float(temperature.removeprefix("T"))).sum()
    loss.backward()
    CASE.check(key, loss)
    CASE.check(key.replace("loss", "grad_student"), student.grad, of_largest=True)


def test_distillkit_dense():
    mask, student, teacher = (CASE.tensors[name] for name in ("mask", "student_logits", "teacher_logits"))
    CASE.check("loss.dense_kl", divergence("forward-kl")(*select_tokens(mask, student, teacher)).sum())
    tested = {*LOSSES, *(name.replace("loss", "grad_student") for name in LOSSES), "loss.dense_kl", "teacher_logits"}
    assert set(CASE.outputs) <= tested


@pytest.mark.parametrize("name", sorted(F_DIVERGENCES))
def test_bucket_is_a_lower_bound_and_exact_at_the_full_vocabulary(name):
    student, teacher = logits(0, 6, 10), logits(1, 6, 10)
    full = divergence(name)(student, teacher)
    smaller = torch.zeros(6, dtype=torch.float64)
    for k in range(1, 10):
        bounded = topk_divergence(name)(student, *top(teacher, k))
        assert (bounded <= full + 1e-9).all()
        assert (bounded >= smaller - 1e-9).all(), "splitting a class never lowers a divergence"
        smaller = bounded
    torch.testing.assert_close(topk_divergence(name)(student, *top(teacher, 10)), full, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "zero", "uniform"])
def test_full_vocabulary_gradient_at_temperature(tail):
    student, teacher = logits(0, 6, 10).requires_grad_(), logits(1, 6, 10)
    (grad,) = torch.autograd.grad(topk_divergence("jsd", tail)(student, *top(teacher, 10), 2.0).sum(), student)
    (expected,) = torch.autograd.grad(divergence("jsd")(student, teacher, 2.0).sum(), student)
    # bucket: at T = 2 the least tail of 1e-8 counts as 1e-4.
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4)


def test_zero_tail_adds_the_students_mass_outside_in_closed_form():
    student, (ids, log_probs) = logits(0, 6, 10), top(logits(1, 6, 10), 4)
    teacher = log_probs.log_softmax(-1)
    outside = 1 - student.softmax(-1).gather(-1, ids).sum(-1)
    inside = {
        name: support_divergence(name, student, ids, teacher) for name in ("forward-kl", "total-variation", "jsd")
    }
    beta = 0.5
    for name, rest in (("forward-kl", 0.0), ("total-variation", 0.5), ("jsd", -(1 - beta) * math.log(1 - beta))):
        got = topk_divergence(name, "zero")(student, ids, log_probs)
        torch.testing.assert_close(got, inside[name] + rest * outside)


@pytest.mark.parametrize("name", ["reverse-kl", "jeffreys", "softened-reverse-kl", "neyman-chi2", "symmetric-kl"])
def test_zero_tail_refuses_what_it_makes_infinite(name):
    with pytest.raises(ValueError, match="bucket"):
        topk_divergence(name, "zero")


def test_uniform_tail():
    ids, log_probs = top(logits(1, 6, 10), 4)
    dense = spread_uniformly(ids, log_probs, 10)
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(dense.gather(-1, ids), log_probs)
    student = logits(0, 6, 10)
    torch.testing.assert_close(
        topk_divergence("jsd", "uniform")(student, ids, log_probs, 2.0), divergence("jsd")(student, dense, 2.0)
    )
    with pytest.raises(ValueError, match="do not fit"):
        spread_uniformly(ids, log_probs, 3)


def test_support_terms_sum_to_the_whole():
    student, teacher = logits(0, 6, 10), logits(1, 6, 10)
    log_p = teacher.log_softmax(-1)
    halves = [torch.arange(start, start + 5).expand(6, 5) for start in (0, 5)]
    parts = [support_divergence("jsd", student, ids, log_p.gather(-1, ids)) for ids in halves]
    torch.testing.assert_close(parts[0] + parts[1], divergence("jsd")(student, teacher))


def test_a_small_tail_keeps_its_digits():
    student = torch.tensor([[30.0, 0.0, 0.0]])
    log_q = bucket_log_probabilities(student, torch.tensor([[0]]))
    assert log_q[0, 1].item() == pytest.approx(math.log(2) - 30, abs=1e-5)


def test_ids_beyond_the_students_vocabulary():
    student, teacher = logits(0, 3, 8).requires_grad_(), logits(1, 3, 10)
    ids, log_probs = torch.tensor([[9, 0, 7]] * 3), teacher.log_softmax(-1)[:, [9, 0, 7]]
    padded = torch.nn.functional.pad(student, (0, 2), value=-math.inf)
    got, expected = (topk_divergence("jsd")(side, ids, log_probs) for side in (student, padded))
    torch.testing.assert_close(got, expected)
    for value in (got, expected):
        assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def test_compact_ids():
    student, (ids, log_probs) = logits(0, 3, 8), top(logits(1, 3, 8), 4)
    for tail in ("bucket", "zero", "uniform"):
        loss = topk_divergence("jsd", tail)
        assert torch.equal(loss(student, ids.int(), log_probs), loss(student, ids, log_probs))


def test_sampler_masked_student():
    student = torch.tensor([[0.3, 0.1, -math.inf, -math.inf]], requires_grad=True)
    topk_divergence("jsd")(student, torch.tensor([[0, 1]]), torch.tensor([[-0.5, -1.5]])).sum().backward()
    assert student.grad.isfinite().all()


def test_sampled_support_is_unbiased():
    student, teacher = logits(0, 1, 6).float().requires_grad_(), logits(1, 1, 6).float()
    ids = sample_support(teacher, 40_000, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(sampled_cross_entropy(student, ids).sum(), student)
    torch.testing.assert_close(grad, student.softmax(-1) - teacher.softmax(-1), rtol=0, atol=0.01)

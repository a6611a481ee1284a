import pytest
import torch
from torch.nn import functional as F

from limbeck.metrics.memory import PeakMemory
from limbeck.objectives.divergences import DIVERGENCES, LogitDivergence, divergence
from limbeck.objectives.fused_head import (
    DenseTeacher,
    HiddenTeacher,
    TopKTeacher,
    chunk_rows,
    fused_head_divergence,
    fused_head_losses,
)
from limbeck.objectives.topk import topk_divergence


class Problem:
    def __init__(self, seed=0, items=(3, 7), width=6, vocab=23, teacher_vocab=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.hidden = draw(*items, width).requires_grad_()
        self.weight = draw(vocab, width).requires_grad_()
        self.bias = draw(vocab).requires_grad_()
        self.teacher = HiddenTeacher(draw(*items, 5), draw(teacher_vocab or vocab, 5), draw(teacher_vocab or vocab))
        self.mask = torch.rand(*items, generator=generator) > 0.4
        self.labels = torch.randint(vocab, items, generator=generator)

    @property
    def logits(self):
        return F.linear(self.hidden, self.weight, self.bias)

    @property
    def teacher_logits(self):
        return F.linear(self.teacher.hidden, self.teacher.weight, self.teacher.bias)

    def naive(self, loss, temperature=1.0, soft=1.0, hard=0.0):
        values = soft * loss(self.logits, self.teacher_logits, temperature)
        if hard:
            flat = F.cross_entropy(self.logits.float().flatten(0, -2), self.labels.flatten(), reduction="none")
            values = values + hard * flat.view_as(values)
        return values[self.mask].sum() / max(int(self.mask.sum()), 1)

    def fused(self, loss, **options):
        return fused_head_divergence(
            self.hidden, self.weight, self.teacher, loss, bias=self.bias, mask=self.mask, **options
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))


def assert_equal(problem, fused, naive, rtol=1e-5):
    torch.testing.assert_close(fused, naive, rtol=rtol, atol=1e-7)
    for got, expected in zip(problem.gradients(fused), problem.gradients(naive), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= rtol * expected.norm() + 1e-9


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_every_divergence(name):
    problem, loss = Problem(), divergence(name)
    assert_equal(problem, problem.fused(loss, chunk_size=4, temperature=1.5), problem.naive(loss, 1.5))


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)
    batch, length, width, vocab, chunk = (int(torch.randint(1, 12, (), generator=generator)) + 1 for _ in range(5))
    problem, loss = Problem(seed, (batch, length), width, vocab), divergence("jsd", beta=0.3)
    fused = problem.fused(loss, chunk_size=chunk, labels=problem.labels, hard_weight=0.4, soft_weight=0.7)
    assert_equal(problem, fused, problem.naive(loss, soft=0.7, hard=0.4))


@pytest.mark.parametrize(("soft", "hard"), [(0.7, 0.4), (1.0, 0.0), (0.0, 2.0), (0.0, 0.0)])
def test_the_parts_come_with_the_total(soft, hard):
    problem, loss = Problem(), divergence("jsd")
    losses = fused_head_losses(
        problem.hidden,
        problem.weight,
        problem.teacher,
        loss,
        bias=problem.bias,
        mask=problem.mask,
        labels=problem.labels,
        soft_weight=soft,
        hard_weight=hard,
        chunk_size=3,
    )
    assert_equal(problem, losses.total, problem.naive(loss, soft=soft, hard=hard) + 0 * problem.logits.sum())
    nothing = torch.zeros(())
    torch.testing.assert_close(losses.divergence, problem.naive(loss).detach() if soft else nothing)
    torch.testing.assert_close(losses.cross_entropy, problem.naive(loss, soft=0, hard=1).detach() if hard else nothing)
    assert losses.total.requires_grad
    assert not losses.divergence.requires_grad
    assert not losses.cross_entropy.requires_grad


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 1000])
def test_chunk_size_changes_nothing(chunk_size):
    problem, loss = Problem(), divergence("reverse-kl")
    assert_equal(problem, problem.fused(loss, chunk_size=chunk_size), problem.naive(loss))


@pytest.mark.parametrize("vocabs", [(20, 23), (23, 20)])
def test_padded_vocabulary(vocabs):
    problem, loss = Problem(vocab=vocabs[0], teacher_vocab=vocabs[1]), divergence("jsd")
    assert_equal(problem, problem.fused(loss, chunk_size=3), problem.naive(loss))


def test_all_masked():
    problem = Problem()
    problem.mask = torch.zeros_like(problem.mask)
    loss = problem.fused(divergence("jsd"))
    assert loss == 0
    assert all((grad == 0).all() for grad in problem.gradients(loss))


def test_masked_rows_are_never_computed():
    problem = Problem()
    expected = problem.fused(divergence("jsd")).item()
    with torch.no_grad():
        problem.hidden[~problem.mask] = torch.nan
        problem.teacher.hidden[~problem.mask] = torch.nan
    loss = problem.fused(divergence("jsd"))
    assert loss.item() == expected
    grad = problem.gradients(loss)[0]
    assert grad.isfinite().all()
    assert (grad[~problem.mask] == 0).all()


def test_labels_make_the_mask():
    problem = Problem()
    labels = torch.where(problem.mask, problem.labels, -100)
    loss = fused_head_divergence(
        problem.hidden, problem.weight, problem.teacher, divergence("jsd"), bias=problem.bias, labels=labels
    )
    assert_equal(problem, loss, problem.naive(divergence("jsd")))


def test_other_teachers():
    problem, loss = Problem(), divergence("jsd")
    expected = problem.naive(loss)
    problem.teacher, hidden = DenseTeacher(problem.teacher_logits), problem.teacher
    torch.testing.assert_close(problem.fused(loss, chunk_size=4), expected)
    padded = F.pad(hidden_logits(hidden), (0, 0, 0, 1))
    problem.teacher = DenseTeacher(padded[:, :-1])
    torch.testing.assert_close(problem.fused(loss, chunk_size=4), expected)
    log_probs, ids = hidden_logits(hidden).log_softmax(-1).topk(5, dim=-1)
    problem.teacher = TopKTeacher(ids, log_probs)
    sparse = topk_divergence("reverse-kl", "bucket")
    naive = sparse(problem.logits, ids, log_probs, 2.0)[problem.mask].mean()
    assert_equal(problem, problem.fused(sparse, chunk_size=4, temperature=2.0), naive)


def hidden_logits(teacher):
    return F.linear(teacher.hidden, teacher.weight, teacher.bias)


def test_accumulation_over_micro_batches():
    problem, loss = Problem(), divergence("jsd")
    count = int(problem.mask.sum())
    whole = problem.gradients(problem.fused(loss))
    problem_mask, parts = problem.mask.clone(), []
    for index in range(len(problem_mask)):
        problem.mask = torch.zeros_like(problem_mask)
        problem.mask[index] = problem_mask[index]
        parts.append(problem.gradients(problem.fused(loss, num_items=torch.tensor(count))))
    for expected, *got in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(got), expected)


def test_bfloat16():
    problem, loss = Problem(width=32, dtype=torch.bfloat16), divergence("jsd")
    fused, naive = problem.fused(loss, chunk_size=4), problem.naive(loss)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, naive, rtol=1e-5, atol=0)
    for got, expected in zip(problem.gradients(fused), problem.gradients(naive), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - expected).float().norm() < 0.01 * expected.float().norm()


def test_autocast():
    problem, loss = Problem(width=32), divergence("jsd")
    with torch.autocast("cpu", torch.bfloat16):
        fused, naive = problem.fused(loss, chunk_size=4), problem.naive(loss)
    torch.testing.assert_close(fused, naive, rtol=1e-5, atol=0)
    for got, expected in zip(problem.gradients(fused), problem.gradients(naive), strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.01 * expected.norm()


def test_float64_stays():
    problem, loss = Problem(dtype=torch.float64), divergence("jsd")
    assert problem.fused(loss).dtype == torch.float64
    assert_equal(problem, problem.fused(loss, chunk_size=2), problem.naive(loss), rtol=1e-12)


def test_upstream_gradient_scales():
    problem, loss = Problem(), divergence("jsd")
    assert_equal(problem, 3 * problem.fused(loss), 3 * problem.naive(loss))


def test_frozen_head_has_no_buffer():
    problem = Problem(items=(40,), width=64, vocab=1000)
    problem.weight.requires_grad_(False)
    problem.bias.requires_grad_(False)
    with PeakMemory() as memory:
        problem.fused(divergence("jsd"), chunk_size=1).backward()
    assert memory.peak_bytes < problem.weight.numel() * 4
    assert problem.hidden.grad is not None
    assert problem.weight.grad is None


def test_no_gradients_in_evaluation():
    problem = Problem()
    with torch.no_grad():
        assert not problem.fused(divergence("jsd")).requires_grad
    with torch.no_grad(), PeakMemory() as memory:
        problem.fused(divergence("jsd"), chunk_size=1)
    assert memory.peak_bytes < problem.weight.numel() * 4 * 5


def test_no_second_derivative():
    problem = Problem()
    loss = problem.fused(divergence("jsd"))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, problem.hidden, create_graph=True)


def test_second_backward_fails_loudly():
    problem = Problem()
    loss = problem.fused(divergence("jsd"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_peak_memory_is_at_most_three_logit_tensors():
    problem = Problem(items=(512,), width=128, vocab=32000)
    problem.mask = torch.arange(512) % 2 == 0
    with PeakMemory() as memory:
        problem.fused(divergence("jsd")).backward()
    assert memory.peak_bytes <= 3 * 512 * 32000 * 4


def test_chunk_rows():
    cpu = torch.device("cpu")
    assert chunk_rows(10, 100, cpu) == 10
    assert chunk_rows(256, 32000, cpu) == 64
    assert chunk_rows(1000, 10**8, cpu) == 1
    assert chunk_rows(0, 32000, cpu) == 1


def test_refusals():
    problem = Problem()
    with pytest.raises(ValueError, match="labels"):
        problem.fused(divergence("jsd"), hard_weight=0.5)
    with pytest.raises(ValueError, match="chunk_size"):
        problem.fused(divergence("jsd"), chunk_size=0)


def test_a_custom_divergence():
    problem = Problem()
    squared = LogitDivergence(lambda log_q, log_p: (log_q.exp() - log_p.exp()).square().sum(-1))
    assert_equal(problem, problem.fused(squared, chunk_size=2), problem.naive(squared))

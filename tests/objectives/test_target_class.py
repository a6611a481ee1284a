import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from limbeck.objectives.logits import kd
from limbeck.objectives.target_class import dkd, nkd

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-4}
LABELS = torch.tensor([0, 6, 3, 3, 1, 5])


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [(3 * torch.randn(6, 7, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def gradient(loss, leaf, *rest, **options):
    leaf = leaf.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **options), leaf)[0]


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def without(row, label):
    return [value for c, value in enumerate(row) if c != label]


def slow_dkd(student, teacher, labels, temperature, alpha, beta):
    target, non_target = 0.0, 0.0
    for row_s, row_t, y in zip(student, teacher, labels, strict=True):
        p_s, p_t = softmax(row_s, temperature)[y], softmax(row_t, temperature)[y]
        target += p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s))
        others = softmax(without(row_s, y), temperature), softmax(without(row_t, y), temperature)
        non_target += sum(q_t * math.log(q_t / q_s) for q_s, q_t in zip(*others, strict=True))
    return temperature**2 * (alpha * target + beta * non_target) / len(student)


def slow_nkd(student, teacher, labels, temperature, gamma):
    total = 0.0
    for row_s, row_t, y in zip(student, teacher, labels, strict=True):
        total -= softmax(row_t, 1)[y] * math.log(softmax(row_s, 1)[y])
        others = softmax(without(row_s, y), temperature), softmax(without(row_t, y), temperature)
        total -= gamma * temperature**2 * sum(q_t * math.log(q_s) for q_s, q_t in zip(*others, strict=True))
    return total / len(student)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 1.0), (4.0, 1.0, 8.0), (2.0, 0.5, 0.0)])
def test_dkd_against_loops(temperature, alpha, beta, dtype):
    student, teacher = draw(dtype)
    loss = dkd(student, teacher, LABELS, temperature=temperature, target_weight=alpha, non_target_weight=beta)
    expected = slow_dkd(student.tolist(), teacher.tolist(), LABELS.tolist(), temperature, alpha, beta)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("temperature", "gamma"), [(1.0, 1.5), (3.0, 0.5)])
def test_nkd_against_loops(temperature, gamma, dtype):
    student, teacher = draw(dtype)
    loss = nkd(student, teacher, LABELS, temperature=temperature, non_target_weight=gamma)
    expected = slow_nkd(student.tolist(), teacher.tolist(), LABELS.tolist(), temperature, gamma)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_target_part_plus_the_weighted_non_target_part(temperature):
    student, teacher = draw()
    for b in range(len(student)):
        one = slice(b, b + 1)
        given = student[one], teacher[one], LABELS[one]
        target = dkd(*given, temperature=temperature, target_weight=1.0, non_target_weight=0.0)
        non_target = dkd(*given, temperature=temperature, target_weight=0.0, non_target_weight=1.0)
        rest = 1 - F.softmax(teacher[b] / temperature, 0)[LABELS[b]]
        torch.testing.assert_close(target + rest * non_target, kd(*given[:2], temperature=temperature))


def test_dkd_is_zero_where_both_agree():
    student, _ = draw()
    assert dkd(student, student.clone(), LABELS).item() == 0
    assert gradient(dkd, student, student.clone(), LABELS).abs().max() < 1e-12


def test_nkd_at_equality_keeps_a_value_but_no_gradient_between_the_other_classes():
    student, _ = draw()
    assert nkd(student, student.clone(), LABELS) > 0.1
    both = gradient(nkd, student, student.clone(), LABELS, non_target_weight=1.5)
    target_only = gradient(nkd, student, student.clone(), LABELS, non_target_weight=0.0)
    torch.testing.assert_close(both, target_only)
    assert target_only.abs().max() > 1e-3


def test_nkd_leaves_the_temperature_out_of_the_target_part():
    student, teacher = draw()
    at_1, at_5 = (nkd(student, teacher, LABELS, temperature=t, non_target_weight=0.0) for t in (1.0, 5.0))
    assert torch.equal(at_1, at_5)


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_shifting_the_rows_changes_nothing(loss):
    student, teacher = draw()
    shift = torch.linspace(-5, 5, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(student + shift, teacher - shift, LABELS), loss(student, teacher, LABELS))


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (logits.requires_grad_() for logits in draw())
    loss(student, teacher, LABELS).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_soft_and_short_labels(loss):
    student, teacher = draw()
    mixed = 0.7 * F.one_hot(LABELS, 7) + 0.3 * F.one_hot(LABELS.flip(0), 7)
    expected = loss(student, teacher, LABELS)
    assert torch.equal(loss(student, teacher, mixed), expected)
    assert torch.equal(loss(student, teacher, LABELS.int()), expected)
    assert not torch.isclose(loss(student, teacher, LABELS.flip(0)), expected)


@pytest.mark.parametrize("loss", [dkd, nkd])
def test_a_certain_teacher_and_a_wrong_student_give_finite_numbers(loss):
    student, teacher = torch.tensor([[-200.0, 200.0, 0.0]]), torch.tensor([[300.0, 0.0, -300.0]])
    labels = torch.tensor([0])
    assert torch.isfinite(loss(student, teacher, labels, temperature=1.0))
    assert torch.isfinite(gradient(loss, student, teacher, labels, temperature=1.0)).all()
    # The student has to learn that class 0 is likely: descending must raise its logit.
    assert gradient(loss, student, teacher, labels, temperature=1.0)[0, 0] < 0


@pytest.fixture
def unhooked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("loss", [dkd, nkd])
def test_impossible_arguments_are_refused(loss):
    with pytest.raises(ValueError, match="same classes"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="temperature"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), temperature=-1.0)
    with pytest.raises(ValueError, match="2 classes"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 0]))

"""OFA's objective: the original code's values, and what the formula says."""

import math

import jaxtyping
import pytest
import torch
from tests.oracles.oracle import load

from limbeck.objectives.logits import soft_cross_entropy
from limbeck.objectives.target_enhanced import target_enhanced

LOSSES = [case for case in load("ofa-kd") if case.name.startswith("ofa_loss")]
LABELS = torch.tensor([0, 6, 3, 3])


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [(3 * torch.randn(4, 7, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def gradient(student, *rest, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(target_enhanced(student, *rest, **options), student)[0]


def test_there_are_four_losses_in_the_oracle():
    assert len(LOSSES) == 4


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_value_and_gradient_are_those_of_the_original(case):
    settings = {"power": case.hyperparameters["eps"], "temperature": case.hyperparameters["temperature"]}
    student, teacher, labels = case.inputs["zs"], case.inputs["zt"], case.inputs["y"]
    case.check("loss", target_enhanced(student, teacher, labels, **settings))
    case.check("grad_zs", gradient(student, teacher, labels, **settings), of_largest=True)


@pytest.mark.parametrize(("power", "temperature"), [(1.0, 1.0), (1.5, 1.0), (0.7, 4.0), (3.0, 2.0)])
def test_against_a_loop(power, temperature):
    student, teacher = draw()
    total = 0.0
    for row_s, row_t, label in zip(student.tolist(), teacher.tolist(), LABELS.tolist(), strict=True):
        norm_s, norm_t = (sum(math.exp(z / temperature) for z in row) for row in (row_s, row_t))
        for c, (ours, theirs) in enumerate(zip(row_s, row_t, strict=True)):
            p, hot = math.exp(theirs / temperature) / norm_t, float(c == label)
            total -= ((p + hot) ** power - hot) * (ours / temperature - math.log(norm_s))
    value = target_enhanced(student, teacher, LABELS, power=power, temperature=temperature)
    assert float(value) == pytest.approx(total / 4, rel=1e-10)


def test_at_power_one_it_is_the_soft_cross_entropy_without_the_square_of_the_temperature():
    student, teacher = draw()
    for temperature in (1.0, 4.0):
        plain = soft_cross_entropy(student, teacher, temperature=temperature) / temperature**2
        torch.testing.assert_close(target_enhanced(student, teacher, LABELS, power=1.0, temperature=temperature), plain)


def test_a_sure_teacher_gives_the_label_a_weight_of_two_to_the_power_less_one():
    student, _ = draw()
    sure = torch.full((4, 7), -1000.0, dtype=torch.float64).scatter(1, LABELS[:, None], 1000.0)
    hard = torch.nn.functional.cross_entropy(student, LABELS)
    for power in (1.0, 1.5, 2.0):
        value = target_enhanced(student, sure, LABELS, power=power)
        torch.testing.assert_close(value, (2**power - 1) * hard)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_the_total_weight_times_the_student_less_the_weights(temperature):
    student, teacher = draw()
    hot = torch.nn.functional.one_hot(LABELS, 7)
    weights = ((teacher / temperature).softmax(1) + hot) ** 1.5 - hot
    expected = weights.sum(1, keepdim=True) * (student / temperature).softmax(1) - weights
    found = gradient(student, teacher, LABELS, power=1.5, temperature=temperature)
    torch.testing.assert_close(found, expected / 4 / temperature)


def test_above_one_the_label_gains_and_the_others_lose():
    _, teacher = draw()
    hot = torch.nn.functional.one_hot(LABELS, 7).bool()
    flat = torch.zeros_like(teacher)  # of a flat student the gradient is (total - 7 w) / 7 / 4
    one, other = (gradient(flat, teacher, LABELS, power=power) for power in (1.0, 1.5))
    plain, leaning = ((value.sum(1, keepdim=True) - value) for value in (one, other))
    assert (leaning[hot] > plain[hot]).all()


def test_soft_labels_count_by_their_largest_entry_and_the_teacher_gets_no_gradient():
    student, teacher = draw()
    soft = 0.6 * torch.nn.functional.one_hot(LABELS, 7).double() + 0.4 * torch.eye(7, dtype=torch.float64)[[1, 2, 4, 5]]
    teacher.requires_grad_()
    value = target_enhanced(student.requires_grad_(), teacher, soft)
    torch.testing.assert_close(value, target_enhanced(student, teacher, LABELS))
    value.backward()
    assert teacher.grad is None


def test_large_logits_and_half_precision_stay_finite():
    student, teacher = draw(torch.bfloat16)
    value = target_enhanced(400 * student, 400 * teacher, LABELS)
    assert value.isfinite()
    assert value.dtype == torch.float32


@pytest.mark.parametrize(("options", "says"), [({"power": 0.0}, "power"), ({"temperature": 0.0}, "temperature")])
def test_impossible_settings_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        target_enhanced(*draw(), LABELS, **options)


def test_other_classes_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # to see the error that production raises
    student, teacher = draw()
    with pytest.raises(ValueError, match="same classes"):
        target_enhanced(student[:, :5], teacher, LABELS)

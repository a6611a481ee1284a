import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from limbeck.objectives.channels import ickd, nst

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-4}


def draw(student, teacher, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (student, teacher)]


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_nst(student, teacher):
    def kernel(first, second):
        values = [
            dot(unit(a), unit(b)) ** 2
            for maps_a, maps_b in zip(first.flatten(2).tolist(), second.flatten(2).tolist(), strict=True)
            for a in maps_a
            for b in maps_b
        ]
        return sum(values) / len(values)

    return kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher)


def slow_ickd(student, teacher):
    total = 0.0
    for maps_s, maps_t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        for a, b in zip(maps_s, maps_t, strict=True):
            row_s, row_t = unit([dot(a, other) for other in maps_s]), unit([dot(b, other) for other in maps_t])
            total += sum((x - y) ** 2 for x, y in zip(row_s, row_t, strict=True))
    return total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nst_against_loops(dtype):
    student, teacher = draw((2, 3, 4, 4), (2, 5, 4, 4), dtype)
    assert nst(student, teacher).item() == pytest.approx(slow_nst(student, teacher), rel=TOLERANCE[dtype])


@pytest.mark.parametrize(("student", "teacher"), [((2, 3, 8, 8), (2, 5, 4, 4)), ((2, 3, 4, 4), (2, 5, 8, 8))])
def test_nst_pools_the_larger_map(student, teacher):
    a, b = draw(student, teacher)
    small_a, small_b = (F.avg_pool2d(x, x.shape[2] // 4) if x.shape[2] > 4 else x for x in (a, b))
    assert nst(a, b).item() == pytest.approx(slow_nst(small_a, small_b), rel=1e-9)


def test_nst_sees_the_set_of_channel_maps():
    student, teacher = draw((2, 4, 4, 4), (2, 4, 4, 4))
    assert nst(student, student.flip(1)).item() == pytest.approx(0, abs=1e-12)  # order
    assert nst(student, student.repeat(1, 3, 1, 1)).item() == pytest.approx(0, abs=1e-12)  # number
    assert nst(student, -3 * student).item() == pytest.approx(0, abs=1e-12)  # scale and sign
    assert nst(student, teacher) > 0.01


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_ickd_against_loops(size, dtype):
    student, teacher = draw((2, 3, *size), (2, 3, 4, 4), dtype)
    assert ickd(student, teacher).item() == pytest.approx(slow_ickd(student, teacher), rel=TOLERANCE[dtype])


def test_ickd_ignores_scale_and_where_things_happen():
    student, teacher = draw((2, 3, 16), (2, 3, 16))
    order = torch.randperm(16)
    torch.testing.assert_close(ickd(2 * student[..., order], teacher), ickd(student, teacher))
    assert ickd(student, student[..., order]).item() == pytest.approx(0, abs=1e-12)
    assert not torch.isclose(ickd(student.flip(1), teacher), ickd(student, teacher))


@pytest.mark.parametrize("loss", [nst, ickd])
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (maps.requires_grad_() for maps in draw((2, 3, 4, 4), (2, 3, 4, 4)))
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [nst, ickd])
def test_dead_channels_are_finite(loss):
    student, teacher = draw((2, 3, 4, 4), (2, 3, 4, 4))
    student[:, 1] = 0
    (gradient,) = torch.autograd.grad(loss(student.requires_grad_(), teacher), student)
    assert torch.isfinite(gradient).all()


@pytest.fixture
def unhooked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unhooked")
def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="projection"):
        ickd(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))
    for loss in (nst, ickd):
        with pytest.raises(ValueError, match="one batch"):
            loss(torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 4, 4))

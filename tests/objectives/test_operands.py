import jaxtyping
import pytest
import torch

from limbeck.objectives.logits import kd
from limbeck.objectives.operands import (
    check_same_batch,
    check_same_shape,
    check_temperature,
    full_precision,
    pool_to_smaller,
    promote,
)
from limbeck.objectives.relations import similarity_preserving


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int8, torch.int8),
    ],
)
def test_promote(given, expected):
    assert promote(torch.ones(2, dtype=given)).dtype == expected


def test_promote_leaves_other_things_alone():
    assert promote("numel") == "numel"
    assert promote(2.0) == 2.0


def test_full_precision_switches_autocast_off():
    a = torch.randn(8, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a.T).dtype == torch.bfloat16
        assert full_precision(torch.matmul)(a, a.T).dtype == torch.float32


def test_an_objective_is_the_same_under_autocast():
    student, teacher = torch.randn(6, 40), torch.randn(6, 30)
    expected = similarity_preserving(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity_preserving(student, teacher), expected)


def test_full_precision_promotes_keywords_and_keeps_the_name():
    def objective(student, *, teacher):
        return student.dtype, teacher.dtype

    wrapped = full_precision(objective)
    half = torch.ones(1, dtype=torch.float16)
    assert wrapped(half, teacher=half) == (torch.float32, torch.float32)
    assert wrapped.__name__ == "objective"


def test_the_gradient_returns_in_the_precision_of_the_argument():
    student = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    kd(student, torch.randn(3, 4)).backward()
    assert student.grad.dtype == torch.bfloat16
    assert student.grad.abs().sum() > 0


def test_objectives_run_without_data():
    student = torch.empty(6, 4, device="meta", requires_grad=True)
    kd(student, torch.empty(6, 4, device="meta")).backward()
    assert student.grad.shape == (6, 4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_impossible_temperatures(temperature):
    with pytest.raises(ValueError, match="above 0"):
        check_temperature(temperature)


def test_impossible_shapes_say_what_to_do():
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher \(2, 4\).*project it"):
        check_same_shape(torch.ones(2, 3), torch.ones(2, 4), "project it")
    with pytest.raises(ValueError, match="3 samples, teacher 2"):
        check_same_batch(torch.ones(3, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="at least 4"):
        check_same_batch(torch.ones(3, 1), torch.ones(3, 1), at_least=4)
    check_same_batch(torch.ones(4, 1), torch.ones(4, 2), at_least=4)


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [((8, 8), (4, 4), (4, 4)), ((4, 4), (8, 8), (4, 4)), ((8, 2), (4, 6), (4, 2)), ((5, 5), (5, 5), (5, 5))],
)
def test_pooling_takes_the_smaller_side(student, teacher, size):
    a, b = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
    pooled_a, pooled_b = pool_to_smaller(a, b)
    assert pooled_a.shape == (2, 3, *size)
    assert pooled_b.shape == (2, 5, *size)
    if student == size:
        assert pooled_a is a
    elif all(big % small == 0 for big, small in zip(student, size, strict=True)):
        blocks = a.unflatten(3, (size[1], -1)).unflatten(2, (size[0], -1))
        torch.testing.assert_close(pooled_a, blocks.mean(dim=(3, 5)))


def test_the_shapes_of_annotations_are_the_shapes_of_the_tensors():
    """Runs only where the suite's type hook is on: the annotation refuses what the check would refuse."""
    if not hasattr(pool_to_smaller, "__wrapped__"):
        pytest.skip("the jaxtyping import hook is off")
    with pytest.raises(jaxtyping.TypeCheckError):
        pool_to_smaller(torch.ones(2, 3, 4), torch.ones(2, 3, 4))

"""Matching of mixing matrices and of what is mixed, against MOHAWK's own code and against plain loops."""

import jaxtyping
import pytest
import torch
from tests.oracles.oracle import load

from limbeck.mixers.state_space import mixing_matrix
from limbeck.objectives.mixing import matrix_distance, output_distance

[ORACLE] = load("mohawk")


def test_matrices_and_their_distance_are_those_of_the_original_code():
    names = ("A_raw", "B", "C", "D")
    raw, b, c, d = (ORACLE.tensors[name].clone().requires_grad_() for name in names)
    matrix = mixing_matrix(-torch.nn.functional.softplus(raw), b, c, d)
    ORACLE.check("mixer", matrix, atol=1e-6)
    loss = matrix_distance(matrix, ORACLE.tensors["attn"])
    ORACLE.check("stage1_loss", loss)
    loss.backward()
    for name, tensor in zip(("A", "B", "C", "D"), (raw, b, c, d), strict=True):
        ORACLE.check(f"grad_{name}", tensor.grad, of_largest=True)


def test_the_distance_of_outputs_is_that_of_the_original_code():
    student = ORACLE.tensors["h_student"].clone().requires_grad_()
    loss = output_distance(student, ORACLE.tensors["h_teacher"])
    ORACLE.check("stage2_loss", loss)
    loss.backward()
    ORACLE.check("grad_h", student.grad, of_largest=True)


def test_equal_operands_cost_nothing_and_have_a_finite_gradient():
    matrix = torch.rand(2, 3, 4, 4, requires_grad=True)
    outputs = torch.rand(2, 4, 6, requires_grad=True)
    total = matrix_distance(matrix, matrix.detach()) + output_distance(outputs, outputs.detach())
    total.backward()
    assert total == 0
    assert not matrix.grad.any()
    assert not outputs.grad.any()


def test_against_plain_loops():
    draws = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(2, 2, 2, 5, 5, generator=draws)
    mask = torch.tensor([[False, True, True, True, True], [True, True, True, False, False]])
    norms = []
    for item in range(2):
        kept = mask[item].nonzero().flatten().tolist()
        for head in range(2):
            gaps = [float(ours[item, head, i, j] - theirs[item, head, i, j]) ** 2 for i in kept for j in kept]
            norms.append(sum(gaps) ** 0.5)
    assert float(matrix_distance(ours, theirs, mask)) == pytest.approx(sum(norms) / 4, rel=1e-5)
    student, teacher = ours[:, 0], theirs[:, 0]
    lengths = [float((student[i, t] - teacher[i, t]).square().sum()) ** 0.5 for i, t in mask.nonzero().tolist()]
    assert float(output_distance(student, teacher, mask)) == pytest.approx(sum(lengths) / 7, rel=1e-5)


def test_padding_has_no_influence_and_no_gradient():
    draws = torch.Generator().manual_seed(0)
    ours = torch.rand(1, 2, 5, 5, generator=draws, requires_grad=True)
    theirs = torch.rand(1, 2, 5, 5, generator=draws)
    mask = torch.tensor([[False, False, True, True, True]])
    matrix_distance(ours, theirs, mask).backward()
    assert not ours.grad[:, :, :2].any()
    assert not ours.grad[..., :2].any()
    assert ours.grad[:, :, 2:, 2:].all()
    alone = matrix_distance(ours[:, :, 2:, 2:], theirs[:, :, 2:, 2:])
    assert torch.equal(matrix_distance(ours, theirs, mask), alone)


def test_no_tokens_give_zero():
    outputs = torch.rand(2, 3, 4, requires_grad=True)
    loss = output_distance(outputs, torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not outputs.grad.any()


def test_half_precision_is_compared_in_single():
    ours, theirs = torch.rand(2, 1, 2, 32, 32).bfloat16()
    assert matrix_distance(ours, theirs).dtype == torch.float32
    assert torch.equal(matrix_distance(ours, theirs), matrix_distance(ours.float(), theirs.float()))


def test_other_shapes_are_refused():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):  # the second where annotations are checked
        matrix_distance(torch.rand(1, 2, 3, 3), torch.rand(1, 4, 3, 3))

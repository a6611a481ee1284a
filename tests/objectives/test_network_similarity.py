"""Class-channel maps, the semantic difference and RMI: oracles, autograd, plain loops, invariances."""

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from tests.oracles.oracle import load

from limbeck.objectives.channels import ickd
from limbeck.objectives.network_similarity import class_channel_map, rmi, semantic_difference
from limbeck.objectives.relations import similarity_preserving

CASES = {case.name: case for case in load("diswot")}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tensors(case):
    return CASES[case].inputs


def test_relation_oracle():
    given = tensors("relation")
    CASES["relation"].check("value", similarity_preserving(given["fs"], given["ft"]).reshape(1))


def test_semantic_oracle():
    given = tensors("semantic_fc_grad")
    CASES["semantic_fc_grad"].check("value", semantic_difference(given["gs"], given["gt"]))


def test_rmi_oracle():
    given = tensors("rmi")
    student, teacher = ([given[f"{side}{n}"] for n in range(3)] for side in "ab")
    CASES["rmi"].check("loss", rmi(student, teacher))


def toy(weights, side, image):
    """The oracle's network: logits, the map before pooling, the vector in front of the classifier."""
    layer = {name.removeprefix(f"{side}_"): value for name, value in weights.items() if name.startswith(f"{side}_")}
    one = F.conv2d(image, layer["c1_weight"], layer["c1_bias"], padding=1).relu()
    maps = F.conv2d(one, layer["c2_weight"], layer["c2_bias"], stride=2, padding=1).relu()
    vector = maps.mean((2, 3))
    return F.linear(vector, layer["fc_weight"], layer["fc_bias"]), maps, vector


def test_pipeline_oracle():
    """Both terms from one batch, and the gradients of both classifiers, which the original takes by a backward pass."""
    case, given = CASES["pipeline"], tensors("pipeline")
    seen = {side: toy(given, side, given["img"]) for side in "st"}
    maps = {side: class_channel_map(seen[side][0], seen[side][2], given["y"]) for side in "st"}
    for side in "st":
        case.check(f"{side}_fc_grad", maps[side])
        case.check(f"{side}_fc_grad", maps[side], of_largest=True)
    case.check("semantic", semantic_difference(maps["s"], maps["t"]))
    case.check("relation", similarity_preserving(seen["s"][1], seen["t"][1]).reshape(1))


def test_the_map_is_the_gradient_of_the_classifier():
    head, inputs = torch.nn.Linear(5, 4).double(), torch.randn(6, 5, dtype=torch.double)
    label = torch.tensor([0, 3, -100, 1, 1, -100])
    F.cross_entropy(head(inputs), label).backward()
    torch.testing.assert_close(class_channel_map(head(inputs), inputs, label), head.weight.grad)


def test_the_map_can_be_differentiated():
    inputs = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    weight, label = torch.randn(3, 5, dtype=torch.double), torch.tensor([0, 2, -100, 1])
    assert torch.autograd.gradcheck(lambda x: class_channel_map(x @ weight.T, x, label), inputs)


def test_without_labels_the_map_is_zero():
    assert class_channel_map(torch.randn(3, 4), torch.randn(3, 5), torch.full((3,), -100)).abs().max() == 0


@pytest.mark.parametrize("zero", [False, True])
def test_the_difference_without_gram_matrices_is_ickd(zero):
    """Value and gradient of the closed form against Gram matrices written out, with rows and entries of zeros too."""
    student, teacher = torch.randn(4, 6, dtype=torch.double), torch.randn(4, 6, dtype=torch.double)
    if zero:
        student[1], student[2, 3], teacher[3] = 0, 0, 0
    student.requires_grad_()
    explicit = ickd(student[:, :, None], teacher[:, :, None])
    value = semantic_difference(student, teacher)
    torch.testing.assert_close(value, explicit)
    ours, theirs = (torch.autograd.grad(loss, student)[0] for loss in (value, explicit))
    rows = [0, 3] if zero else slice(None)  # at zero itself the direction is not differentiable
    torch.testing.assert_close(ours[rows], theirs[rows])
    assert theirs[0].abs().max() > 0


@pytest.mark.parametrize("axis", ["channel", "class"])
def test_the_difference_against_a_loop(axis):
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)

    def gram(vectors):
        rows = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in vectors] for one in vectors]
        return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]

    def grams(values):
        if axis == "class":
            return [gram(values.tolist())]
        return [gram([[value] for value in row]) for row in values.tolist()]

    pairs = [
        (a, b)
        for one, other in zip(grams(student), grams(teacher), strict=True)
        for row, row_other in zip(one, other, strict=True)
        for a, b in zip(row, row_other, strict=True)
    ]
    total = sum((a - b) ** 2 for a, b in pairs) / (3 if axis == "class" else 12)
    torch.testing.assert_close(semantic_difference(student, teacher, axis=axis), torch.tensor(total))


@pytest.mark.parametrize("axis", ["channel", "class"])
def test_the_scale_of_a_map_does_not_matter(axis):
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    expected = semantic_difference(student, teacher, axis=axis)
    for factor in (1e-9, 1e-3, 1e6):
        torch.testing.assert_close(semantic_difference(student * factor, teacher, axis=axis), expected)
        torch.testing.assert_close(semantic_difference(student, teacher * factor, axis=axis), expected)
    assert expected > 0.1
    assert semantic_difference(student * 2, student, axis=axis) < 1e-6


def test_classes_need_no_equal_channels_and_channels_do():
    student, teacher = torch.randn(5, 7), torch.randn(5, 3)
    assert semantic_difference(student, teacher, axis="class") > 0


def test_a_rotation_of_the_channels_leaves_the_classes_alone():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    value = semantic_difference(student, teacher, axis="class")
    torch.testing.assert_close(semantic_difference(student @ rotation, teacher, axis="class"), value)
    assert (semantic_difference(student @ rotation, teacher) - semantic_difference(student, teacher)).abs() > 0.01


def test_no_gradient_flows_into_the_teacher():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = semantic_difference(student, teacher) + semantic_difference(student, teacher, axis="class")
    (loss + rmi([student], [teacher])).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_rmi_is_zero_for_rotations_and_counts_the_stages():
    first, second = torch.randn(8, 3, 2, 2), torch.randn(8, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    assert rmi([first, second], [2 * first + 1, second @ rotation]).abs() < 1e-5
    orthogonal = torch.eye(8)[:, :2], torch.eye(8)[:, 2:4]
    lone = rmi([orthogonal[0]], [orthogonal[1]])
    assert 0.5 < lone <= 1
    with pytest.raises(ValueError, match="stages"):
        rmi([first], [first, second])
    with pytest.raises(ValueError, match="stages"):
        rmi([], [])


def test_half_precision_is_promoted():
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    half = semantic_difference(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, semantic_difference(student.bfloat16().float(), teacher.bfloat16().float()))


@pytest.fixture
def _unchecked(monkeypatch):
    """Without the type hook, to see the errors that production raises."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("_unchecked")
def test_maps_that_cannot_be_compared_are_refused():
    student, teacher = torch.randn(5, 7), torch.randn(5, 3)
    with pytest.raises(ValueError, match="axis 'class'"):
        semantic_difference(student, teacher)
    with pytest.raises(ValueError, match="classes apart"):
        semantic_difference(student, teacher[:4], axis="class")
    with pytest.raises(ValueError, match="one batch"):
        class_channel_map(student, teacher[:4], torch.zeros(5, dtype=torch.long))

import pytest
import torch
from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.methods.classic.fitnet import regressor
from limbeck.objectives.features import hint
from tests.methods.classic.rig import (
    both,
    build,
    check_gradients,
    labels_loss,
    student_net,
    teacher_net,
    update_of,
    vit,
)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_is_the_weighted_sum_on_the_hint_stage(stage):
    method = build("fitnet", label_weight=0.3, weight=0.7, hint_layer=stage)
    features, ours, targets, _ = both(method)
    term = hint(method.connectors["0"](features[stage - 1]), targets[stage - 1])
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_defaults_are_those_of_the_paper():
    method = build("fitnet")
    assert (method.options.weight, method.options.hint_layer) == (100, 2)
    assert method.student_layers == method.teacher_layers == ["stages.1"]


def test_a_hint_stage_that_is_not_there_is_refused():
    with pytest.raises(IncompatibleError, match=r"3 stages, so none is number 4[\s\S]*hint_layer"):
        build("fitnet", hint_layer=4)


def test_several_hints_add_up():
    method = build("fitnet", student_layers=["stages.0", "stages.1"], teacher_layers=["stages.1", "stages.2"])
    features, _, targets, _ = both(method)
    first, second = method.connectors.values()
    term = hint(first(features[0]), targets[1]) + hint(second(features[1]), targets[2])
    torch.testing.assert_close(update_of(method).logs["objective"], term)


@pytest.mark.parametrize(
    ("size", "target", "kind", "kernel"),
    [
        (8, 8, nn.Conv2d, 1),
        (8, 4, nn.Conv2d, 3),
        (9, 3, nn.Conv2d, 5),
        (4, 8, nn.ConvTranspose2d, 4),
        (3, 9, nn.ConvTranspose2d, 5),
        (2, 8, nn.ConvTranspose2d, 8),
        (7, 4, nn.Conv2d, 4),
        (5, 1, nn.Conv2d, 9),
    ],
)
def test_regressors_bring_maps_of_any_size_together(size, target, kind, kernel):
    student, teacher = torch.rand(2, 3, size, size), torch.rand(2, 5, target, target)
    made = regressor(student, teacher)
    assert isinstance(made[0], kind)
    assert made[0].kernel_size == (kernel, kernel)
    assert made(student).shape == teacher.shape


@pytest.mark.parametrize(("size", "target"), [((4, 4), (6, 6)), ((8, 8), (4, 2))])
def test_sizes_that_no_convolution_brings_together_are_refused(size, target):
    with pytest.raises(IncompatibleError, match="like resolution"):
        regressor(torch.rand(2, 3, *size), torch.rand(2, 5, *target))


def test_the_regressor_ends_in_a_relu_where_the_teacher_does():
    assert isinstance(build("fitnet").connectors["0"][-1], nn.ReLU)
    before = {"student_layers": ["stages.1"], "teacher_layers": ["stages.1.norm"]}
    assert isinstance(build("fitnet", **before).connectors["0"][-1], nn.BatchNorm2d)


def test_equally_many_tokens_need_a_linear_map_alone():
    method = build("fitnet", student=vit(), teacher=vit(dim=12))
    assert isinstance(method.connectors["0"], nn.Linear)
    other = build("fitnet", student=vit(), teacher=vit(dim=12, distilled=True))  # 17 and 18 tokens: their grids meet
    assert isinstance(other.connectors["0"][0], nn.Conv2d)


def test_the_student_alone_is_taken_home():
    method = build("fitnet", student=(student := student_net()), teacher=teacher_net())
    assert method.result() is student
    assert not any("connector" in name for name in method.result().state_dict())

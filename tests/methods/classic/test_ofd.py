import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError
from limbeck.objectives.features import ofd_margin, partial_l2
from tests.methods.classic.rig import (
    batch,
    both,
    build,
    check_gradients,
    labels_loss,
    student_net,
    teacher_net,
    update_of,
)


def before_relu(net: nn.Module, image: Tensor) -> list[Tensor]:
    """Outputs of the batch norms of a `ConvNet` of one block a stage."""
    found = []
    for stage in net.stages:
        found.append(stage.norm(stage.conv(image)))
        image = F.relu(found[-1])
    return found


def test_the_loss_is_the_weighted_sum_with_half_the_weight_a_stage_further_up():
    method = build("ofd", label_weight=0.3, weight=0.7)
    teacher = method.teacher.model
    ours = both(method)[1]
    features, targets = before_relu(method.student, batch().image), before_relu(teacher, batch().image)
    term = 0.0
    for stage, factor in enumerate((1 / 4, 1 / 2, 1)):
        norm = teacher.stages[stage].norm
        connected = method.connectors[str(stage)](features[stage])
        term = term + factor * partial_l2(connected, targets[stage], ofd_margin(norm.weight, norm.bias))
    torch.testing.assert_close(update_of(method).loss, 0.3 * labels_loss(ours) + 0.7 * term)
    check_gradients(method)


def test_margins_are_the_means_of_the_teachers_negative_values():
    method = build("ofd")
    norm = method.teacher.model.stages[1].norm
    draws = torch.randn(200_000, 12, generator=torch.Generator().manual_seed(0)) * norm.weight + norm.bias
    sampled = (draws * (draws < 0)).sum(0) / (draws < 0).sum(0)
    often = (draws < 0).sum(0) > 5_000
    assert often.sum() > 6
    torch.testing.assert_close(method.margin_1[often], sampled[often], rtol=0.05, atol=0.01)


def test_margins_move_with_the_method_and_stay_out_of_its_state():
    method = build("ofd").double()
    assert method.margin_0.dtype == torch.float64
    assert not any("margin" in name for name in method.state_dict())


def test_default_taps_are_the_last_batch_norms_of_the_stages():
    method = build("ofd", student=student_net(blocks=2), teacher=teacher_net(blocks=2))
    assert method.teacher_layers == [f"stages.{stage}.norm" for stage in range(3)]
    assert method.student_layers == [f"stages.{stage}.norm" for stage in range(3)]
    assert build("ofd", student=student_net(norm="none")).student_layers == method.student_layers


def test_a_block_takes_its_margin_from_the_last_batch_norm_within():
    layers = {"student_layers": ["stages.1"], "teacher_layers": ["stages.1"]}
    method = build("ofd", teacher=teacher_net(blocks=2), **layers)
    norm = method.teacher.model.stages[1].norm
    torch.testing.assert_close(method.margin_0, ofd_margin(norm.weight, norm.bias))


def test_side_branches_of_residual_networks_are_passed_over():
    torch.manual_seed(0)
    resnet = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    method = build("ofd", teacher=resnet)
    assert all(path.rpartition(".")[2] in {"bn2", "bn3"} for path in method.teacher_layers)
    assert update_of(method).loss.isfinite()


def test_a_batch_norm_without_scale_is_a_standard_normal():
    teacher = teacher_net()
    teacher.stages[2].norm = nn.BatchNorm2d(24, affine=False)
    method = build("ofd", teacher=teacher)
    torch.testing.assert_close(method.margin_2, torch.full((24,), -((2 / torch.pi) ** 0.5)))


def test_a_teacher_without_batch_norm_is_refused():
    with pytest.raises(IncompatibleError, match=r"no batch norm[\s\S]*teacher_layers"):
        build("ofd", teacher=teacher_net(norm="group"))

from types import SimpleNamespace

import pytest
import timm
import torch
import transformers

from limbeck.core.errors import IncompatibleError
from limbeck.methods.classic.deit import heads_of
from limbeck.objectives.logits import deit_hard, deit_soft, kd
from tests.methods.classic.rig import batch, both, build, check_gradients, labels_loss, teacher_net, update_of, vit


def test_without_a_token_the_class_logits_take_both_parts():
    method = build("deit", token=False, alpha=0.3)
    _, ours, _, theirs = both(method)
    torch.testing.assert_close(update_of(method).loss, 0.7 * labels_loss(ours) + 0.3 * deit_hard(ours, theirs))
    check_gradients(method)


def test_soft_averages_over_batch_and_classes_unless_told_otherwise():
    for reduction, expected in {"numel": deit_soft, "batchmean": kd}.items():
        method = build("deit", token=False, variant="soft", temperature=2.0, reduction=reduction)
        _, ours, _, theirs = both(method)
        torch.testing.assert_close(update_of(method).logs["objective"], expected(ours, theirs, temperature=2.0))


@pytest.mark.parametrize("variant", ["hard", "soft"])
def test_the_distillation_token_learns_from_the_teacher(variant):
    method = build("deit", student=vit(distilled=True), variant=variant, alpha=0.3)
    ours, distilled = method.student(batch().image)
    theirs = teacher_net().eval()(batch().image)
    term = deit_hard(distilled, theirs) if variant == "hard" else deit_soft(distilled, theirs, temperature=3.0)
    torch.testing.assert_close(update_of(method).loss, 0.7 * labels_loss(ours) + 0.3 * term)
    check_gradients(method)


def test_alpha_decides_which_head_learns():
    for alpha, idle in {0.0: "distillation_head", 1.0: "head"}.items():
        method = build("deit", student=vit(distilled=True), alpha=alpha)
        update_of(method).loss.backward()
        busy = {"head", "distillation_head"} - {idle}
        assert method.student.get_submodule(idle).weight.grad.abs().sum() == 0
        assert method.student.get_submodule(busy.pop()).weight.grad.abs().sum() > 0


def test_timms_distilled_transformers_are_told_to_return_both_heads():
    torch.manual_seed(0)
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=12, depth=1
    )
    method = build("deit", student=student)
    update_of(method).loss.backward()
    assert student.head_dist.weight.grad.abs().sum() > 0


def test_transformers_deit_with_teacher_has_two_heads():
    config = transformers.DeiTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=10,
    )  # fmt: skip
    method = build("deit", student=transformers.DeiTForImageClassificationWithTeacher(config))
    output = method.student(batch().image)
    theirs = teacher_net().eval()(batch().image)
    expected = 0.5 * labels_loss(output.cls_logits) + 0.5 * deit_hard(output.distillation_logits, theirs)
    torch.testing.assert_close(update_of(method).loss, expected)


def test_a_student_without_the_token_is_refused_with_a_way_out():
    with pytest.raises(IncompatibleError, match=r"distillation logits[\s\S]*token: false"):
        update_of(build("deit"))
    with pytest.raises(IncompatibleError):
        heads_of((torch.zeros(2, 3), torch.zeros(2, 4, 5)))
    with pytest.raises(IncompatibleError):
        heads_of(SimpleNamespace(logits=torch.zeros(2, 3)))

"""SRe2L's recovery: the loss by hand, what receives gradients, groups, clamping and storage, refusals."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock
from limbeck.core.optim import learning_rate
from limbeck.core.specs import OptimizerSpec
from limbeck.core.teacher import Ensemble, LiveTeacher, Renormalise
from limbeck.models.vit import VisionTransformer
from tests.methods.datasets.recovering import CLASSES, LABELS, MEAN, PLAIN, SIDE, STD, info, net, noise, recovering

BATCH = Batch({"image": torch.zeros(3, 1, SIDE, SIDE), "index": torch.arange(3)})
GROUPS = (slice(0, None, 2), slice(1, None, 2))  # the first and the second image of each class


def by_hand(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, weight: float, first: float) -> torch.Tensor:
    """The loss of one group, with hooks and statistics written out."""
    norms, seen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)], []
    handles = [norm.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for norm in norms]
    loss = functional.cross_entropy(model.eval()(images), labels)
    for handle in handles:
        handle.remove()
    for number, (x, norm) in enumerate(zip(seen, norms, strict=True)):
        flat = x.transpose(0, 1).flatten(1)
        mean = flat.sum(1) / flat.shape[1]
        variance = ((flat - mean[:, None]) ** 2).sum(1) / flat.shape[1]
        gap = (mean - norm.running_mean).square().sum().sqrt() + (variance - norm.running_var).square().sum().sqrt()
        loss = loss + weight * (first if number == 0 else 1.0) * gap
    return loss


def test_the_loss_and_its_gradient_are_the_sum_over_groups():
    method = recovering("sre2l", statistics_weight=0.3, first_weight=7.0, **PLAIN)
    (update,) = method.step(BATCH)
    update.loss.backward()
    images = method.student.images.detach().clone().requires_grad_()
    expected = sum(by_hand(net(), images[rows], LABELS[rows], 0.3, 7.0) for rows in GROUPS)
    (gradient,) = torch.autograd.grad(expected, images)
    assert torch.allclose(update.loss, expected, rtol=1e-5)
    assert torch.allclose(method.student.images.grad, gradient, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    assert (update.player, update.weight) == ("student", 3)
    both = update.logs["cross_entropy"] + 0.3 * update.logs["statistics"]
    assert torch.allclose(2 * both, expected, rtol=1e-5)


def test_gradients_reach_the_images_alone_and_the_teacher_stays_as_it_was():
    method = recovering("sre2l")
    model = method.teacher.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (update,) = method.step(BATCH)
    update.loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(image.abs().max() > 0 for image in method.student.images.grad)


def test_images_that_look_usual_already_pay_for_their_classes_alone():
    model, student = net().eval(), noise()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def remember(module, args):
        module.running_mean.copy_(args[0].mean((0, 2, 3)))
        module.running_var.copy_(args[0].var((0, 2, 3), correction=0))

    handles = [norm.register_forward_pre_hook(remember) for norm in norms]
    labels = torch.arange(CLASSES)
    student = noise(labels)
    with torch.no_grad():
        model(student.images)
    for handle in handles:
        handle.remove()
    (update,) = recovering("sre2l", teacher=model, student=student, statistics_weight=1.0, **PLAIN).step(BATCH)
    assert update.logs["statistics"] < 1e-5
    expected = functional.cross_entropy(model(student.images), labels)
    assert torch.allclose(update.loss, expected, atol=1e-4)


def test_the_data_and_the_micro_batch_make_no_difference():
    method = recovering("sre2l")
    other = Batch({"image": torch.randn(5, 1, SIDE, SIDE), "index": torch.arange(5)})
    (one,), (two,) = method.step(BATCH), method.step(other)
    assert torch.equal(one.loss, two.loss)
    method.clock = Clock(step=1, steps=100, seed=12)
    (third,) = method.step(BATCH)
    assert not torch.equal(one.loss, third.loss)  # another step, another view


def test_all_images_of_a_group_share_a_view_and_groups_do_not():
    method, seen = recovering("sre2l", jitter=3, least_area=0.1), []
    flat = noise()
    with torch.no_grad():
        flat.images.copy_(flat.images[:1].expand_as(flat.images))  # one picture in all places
    method = recovering("sre2l", student=flat, jitter=3, least_area=0.1)
    method.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    list(method.step(BATCH))
    first, second = seen
    assert all(torch.equal(image, first[0]) for image in first)
    assert not torch.equal(first[0], second[0])


def test_classes_are_cut_into_groups():
    assert [len(rows) for rows in recovering("sre2l", group=3).groups] == [3, 1, 3, 1]
    assert [len(rows) for rows in recovering("sre2l").groups] == [4, 4]


def test_a_teacher_with_another_normalisation_sees_its_own():
    wanted = ([0.1], [0.2])
    plain, adapted = net(), LiveTeacher(net(), Renormalise((MEAN, STD), wanted))
    method = recovering("sre2l", teacher=adapted, statistics_weight=0.0, **PLAIN)
    (update,) = method.step(BATCH)
    images = ((noise().images.detach() * STD[0] + MEAN[0]) - 0.1) / 0.2
    expected = sum(functional.cross_entropy(plain.eval()(images[rows]), LABELS[rows]) for rows in GROUPS)
    assert torch.allclose(update.loss, expected, rtol=1e-4)


def test_images_are_clamped_to_what_a_picture_can_show():
    method = recovering("sre2l", step=5)
    with torch.no_grad():
        method.student.images.mul_(10)
    before = method.student.images.detach().clone()
    method.after_update("student", {})
    low, high = (0 - MEAN[0]) / STD[0], (1 - MEAN[0]) / STD[0]
    assert torch.allclose(method.student.images, before.clamp(low, high))
    assert float(method.student.images.detach().min()) == pytest.approx(low)


def test_the_last_iterate_lies_on_the_levels_that_are_stored():
    def levels(step: int) -> torch.Tensor:
        method = recovering("sre2l", step=step)
        method.after_update("student", {})
        return (method.student.images.detach() * STD[0] + MEAN[0]) * 255

    last, one_before = levels(99), levels(98)
    assert (last - last.round()).abs().max() < 1e-3
    assert (one_before - one_before.round()).abs().max() > 0.1
    assert (last - one_before).abs().max() < 0.501


def test_the_learning_rate_halves_half_way_and_ends_at_nothing():
    spec = OptimizerSpec(name="adam", lr=0.25, betas=(0.5, 0.9), schedule="cosine")
    assert learning_rate(spec, 0, 4000) == 0.25
    assert learning_rate(spec, 2000, 4000) == pytest.approx(0.125)
    assert learning_rate(spec, 3999, 4000) < 1e-6


def test_what_cannot_work_is_refused():
    with pytest.raises(IncompatibleError, match="no set of images"):
        recovering("sre2l", student=net())
    soft = noise()
    soft.set_labels(torch.full((len(LABELS), CLASSES), 1 / CLASSES))
    with pytest.raises(IncompatibleError, match="no set of images"):
        recovering("sre2l", student=soft)
    with pytest.raises(IncompatibleError, match="which values"):
        recovering("sre2l", data=info(normalisation=None))
    vit = VisionTransformer(image_size=8, patch_size=4, channels=1, classes=CLASSES, dim=8, depth=1, heads=2)
    with pytest.raises(IncompatibleError, match="no batch norm"):
        recovering("sre2l", teacher=vit)
    with pytest.raises(IncompatibleError, match="one live teacher"):
        recovering("sre2l", teacher=Ensemble([LiveTeacher(net()), LiveTeacher(net())]))
    with pytest.raises(IncompatibleError, match="one live teacher"):
        recovering("sre2l", teacher=SimpleNamespace(signal=None))


def test_a_timm_teacher_works():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=CLASSES, in_chans=1)
    (update,) = recovering("sre2l", teacher=model, jitter=2).step(BATCH)
    update.loss.backward()
    assert update.loss.isfinite()

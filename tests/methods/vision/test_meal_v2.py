"""MEAL V2: soft labels of several teachers, and the game with the discriminator, recomputed step by step."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import Ensemble, LiveTeacher, Renormalise
from limbeck.core.trainer import Trainer
from limbeck.data.mix import cutmix
from limbeck.methods.vision.meal_v2 import discrimination, discriminator
from limbeck.objectives.logits import soft_cross_entropy
from tests.methods.classic.rig import batch, build, labels_loss, student_net, teacher_net, vit


def teachers(count: int = 2, **options) -> Ensemble:
    """Teachers of different families, whose logits differ much in size."""
    nets = [teacher_net(), vit(), teacher_net(width=3)][:count]
    nets[0].head.weight.data *= 3
    return Ensemble([LiveTeacher(net) for net in nets], **options)


def logits_of_all(ensemble: Ensemble, image: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [teacher.model(image) for teacher in ensemble.teachers]


def updates(method, items=None):
    return list(method.step(items or batch()))


def student_gradient(method, items=None) -> torch.Tensor:
    loss = updates(method, items)[0].loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(method.student.parameters()))])


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_the_soft_label_is_the_mean_of_the_probabilities():
    method = build("meal-v2", teacher=teachers())
    label, mean = method.ask(batch())
    first, second = logits_of_all(method.teacher, batch().image)
    expected = (first.softmax(1) + second.softmax(1)) / 2
    torch.testing.assert_close(label.exp(), expected)
    torch.testing.assert_close(label.exp().sum(1), torch.ones(6))
    torch.testing.assert_close(mean, (first + second) / 2)
    assert (label.exp() - mean.softmax(1)).abs().max() > 0.05  # it is not the softmax of the mean


@pytest.mark.parametrize("sign", ["reversal", "cooperative"])
def test_both_losses_against_plain_python(sign):
    method = build("meal-v2", teacher=teachers(), adversarial=sign)
    both = [one.tolist() for one in logits_of_all(method.teacher, batch().image)]
    ours = method.student(batch().image)
    labels = [
        [(p + q) / 2 for p, q in zip(softmax(one), softmax(other), strict=True)]
        for one, other in zip(*both, strict=True)
    ]
    similarity = 0.0
    for row, label in zip(ours.tolist(), labels, strict=True):
        similarity -= sum(p * math.log(q) for p, q in zip(label, softmax(row), strict=True)) / 6
    means = [[(z + w) / 2 for z, w in zip(one, other, strict=True)] for one, other in zip(*both, strict=True)]
    with torch.no_grad():
        judged_ours = method.discriminator(ours).tolist()
        judged_theirs = method.discriminator(torch.tensor(means)).tolist()
    apart = sum(softplus(-a) + softplus(b) for a, b in judged_ours)
    apart = (apart + sum(softplus(a) + softplus(-b) for a, b in judged_theirs)) / 24
    student, judge = updates(method)
    assert float(student.logs["similarity"].detach()) == pytest.approx(similarity, rel=1e-4)
    assert float(student.logs["discrimination"].detach()) == pytest.approx(apart, rel=1e-4)
    assert float(judge.loss.detach()) == pytest.approx(apart, rel=1e-4)
    assert float(student.loss.detach()) == pytest.approx(similarity + apart, rel=1e-4)
    assert (student.player, judge.player) == ("student", "discriminator")
    assert student.weight == judge.weight == 6


def test_reversal_turns_the_discriminators_part_of_the_students_gradient_round():
    gradients = {
        kind: student_gradient(build("meal-v2", teacher=teachers(), adversarial=kind))
        for kind in ("none", "reversal", "cooperative")
    }
    towards = gradients["cooperative"] - gradients["none"]
    assert towards.abs().max() > 1e-4
    torch.testing.assert_close(gradients["reversal"] - gradients["none"], -towards, rtol=1e-3, atol=1e-6)


def test_the_weight_scales_the_students_part_alone():
    one, three = (build("meal-v2", teacher=teachers(), adversarial_weight=weight) for weight in (1.0, 3.0))
    plain = student_gradient(build("meal-v2", teacher=teachers(), adversarial="none"))
    torch.testing.assert_close(
        student_gradient(three) - plain, 3 * (student_gradient(one) - plain), rtol=1e-3, atol=1e-6
    )
    assert updates(one)[1].loss == updates(three)[1].loss


class Always:
    """A loader that gives one batch again and again."""

    def steps(self, start, stop):
        for _ in range(start, stop):
            yield [batch()]


@pytest.mark.parametrize("final_relu", [False, True])
def test_cooperative_is_the_published_code_one_optimizer_over_both(final_relu):
    ensemble, options = teachers(), {"adversarial": "cooperative", "final_relu": final_relu, "least_width": 4}
    method = build("meal-v2", student=student_net(norm="group"), teacher=ensemble, **options)
    student, judge = copy.deepcopy(method.student), copy.deepcopy(method.discriminator)
    spec = TrainSpec(steps=3, batch_size=6, optimizer=OptimizerSpec(name="sgd", lr=0.05, schedule="constant"))
    Trainer(method, Always(), spec, steps=3, items=6, seed=0).fit()

    optimizer = torch.optim.SGD([*student.parameters(), *judge.parameters()], lr=0.05, momentum=0.9)
    each = logits_of_all(ensemble, batch().image)
    label = sum(one.softmax(1) for one in each) / 2
    wanted = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6)
    for _ in range(3):
        ours = student(batch().image)
        similarity = -(label * ours.log_softmax(1)).sum(1).mean()
        judged = judge(torch.cat([ours, sum(each) / 2]))
        loss = similarity + functional.binary_cross_entropy_with_logits(judged, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for trained, expected in ((method.student, student), (method.discriminator, judge)):
        for one, other in zip(trained.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_each_player_moves_its_own_weights_alone():
    method = build("meal-v2", teacher=teachers())
    assert method.players() == {"student": method.student, "discriminator": method.discriminator}
    judge = updates(method)[1].loss
    assert (
        torch.autograd.grad(judge, list(method.student.parameters()), allow_unused=True, retain_graph=True)[0] is None
    )
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(judge, list(method.discriminator[-1].parameters())))


@pytest.mark.parametrize("options", [{"adversarial": "none"}, {"adversarial_weight": 0}])
def test_without_weight_there_is_no_discriminator(options):
    method = build("meal-v2", teacher=teachers(), **options)
    assert method.players() == {"student": method.student}
    (update,) = updates(method)
    torch.testing.assert_close(update.loss, update.logs["similarity"])


def test_one_teacher_is_the_soft_cross_entropy():
    method = build("meal-v2", adversarial="none")
    with torch.no_grad():
        theirs = method.teacher.model(batch().image)
    torch.testing.assert_close(updates(method)[0].loss, soft_cross_entropy(method.student(batch().image), theirs))


def test_a_student_like_its_only_teacher_has_nothing_to_learn():
    teacher = student_net(norm="group")
    method = build("meal-v2", student=copy.deepcopy(teacher), teacher=teacher, adversarial="none")
    assert student_gradient(method).abs().max() < 1e-6


def test_labels_are_not_used():
    method = build("meal-v2", teacher=teachers())
    with_labels = [update.loss for update in updates(method)]
    for items in (Batch({"image": batch().image}), batch().replace(label=torch.full((6,), -100))):
        assert [update.loss for update in updates(method, items)] == with_labels


def test_labels_can_be_added():
    method = build("meal-v2", adversarial="none", label_weight=0.4)
    (update,) = updates(method)
    expected = update.logs["similarity"] + 0.4 * labels_loss(method.student(batch().image))
    torch.testing.assert_close(update.loss, expected)


@pytest.mark.parametrize("where", ["option", "ensemble"])
def test_a_teacher_drawn_at_random_speaks_for_all(where):
    ensemble = teachers(3, reduce="random") if where == "ensemble" else teachers(3)
    method = build("meal-v2", teacher=ensemble, soft_labels="random" if where == "option" else "ensemble")
    answers = logits_of_all(ensemble, batch().image)
    torch.manual_seed(0)
    drawn = []
    for _ in range(20):
        label, mean = method.ask(batch())
        assert torch.equal(label, mean)
        drawn.append([torch.equal(label, one) for one in answers].index(True))
    assert set(drawn) == {0, 1, 2}
    torch.manual_seed(0)
    assert torch.equal(method.ask(batch())[0], answers[drawn[0]])


def test_weights_of_an_ensemble_count():
    method = build("meal-v2", teacher=teachers(reduce="weighted", weights=[3.0, 1.0]))
    first, second = logits_of_all(method.teacher, batch().image)
    label, mean = method.ask(batch())
    torch.testing.assert_close(label.exp(), 0.75 * first.softmax(1) + 0.25 * second.softmax(1))
    torch.testing.assert_close(mean, 0.75 * first + 0.25 * second)


@pytest.mark.parametrize(
    ("classes", "least", "widths"),
    [(1000, 2, [125, 15, 2]), (100, 2, [12, 2, 2]), (10, 2, [2, 2, 2]), (10, 8, [8, 8, 2])],
)
def test_widths_of_the_discriminator(classes, least, widths):
    made = discriminator(classes, least)
    assert [layer.out_features for layer in made if isinstance(layer, nn.Linear)] == widths
    assert made(torch.randn(3, classes)).shape == (3, 2)
    assert isinstance(made[-1], nn.Linear)
    assert isinstance(discriminator(classes, least, final_relu=True)[-1], nn.ReLU)


def test_a_last_relu_leaves_negative_outputs_without_gradient():
    judge, logits = discriminator(10, 4, final_relu=True), torch.randn(5, 10)
    nn.init.constant_(judge[-2].bias, -100.0)
    loss = discrimination(judge, logits, logits)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert all(not g.any() for g in torch.autograd.grad(loss, list(judge.parameters())))


def test_cutmix_lets_the_teachers_label_the_mixed_images():
    method = build("meal-v2", teacher=teachers(), cutmix=1.0, adversarial="none")
    torch.manual_seed(7)
    (update,) = updates(method, Batch({"image": batch().image}))
    torch.manual_seed(7)
    image = cutmix(batch(), 10).image
    assert not torch.equal(image, batch().image)
    label = torch.stack([one.softmax(1) for one in logits_of_all(method.teacher, image)]).mean(0)
    torch.testing.assert_close(update.loss, soft_cross_entropy(method.student(image), label.log()))


def test_students_and_teachers_of_timm_with_their_own_sizes_and_normalisations():
    torch.manual_seed(0)
    nets = [
        timm.create_model("test_vit", num_classes=5, img_size=32),
        timm.create_model("test_convnext", num_classes=5),
    ]
    given = ([0.5] * 3, [0.25] * 3)
    other = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    ensemble = Ensemble([LiveTeacher(nets[0]), LiveTeacher(nets[1], Renormalise(given, other))])
    image = torch.randn(4, 3, 64, 64)
    kind = method_class("meal-v2")
    method = kind(
        kind.Options(teacher_sizes=[32, 64]),
        student=timm.create_model("test_resnet", num_classes=5),
        teacher=ensemble,
        data=DataInfo(10, 5, Batch({"image": image[:2]})),
    )
    small = functional.interpolate(image, (32, 32), mode="bicubic", antialias=True)
    pixels = image * torch.tensor(given[1]).view(3, 1, 1) + torch.tensor(given[0]).view(3, 1, 1)
    own = (pixels - torch.tensor(other[0]).view(3, 1, 1)) / torch.tensor(other[1]).view(3, 1, 1)
    with torch.no_grad():
        expected = (nets[0](small) + nets[1](own)) / 2
    torch.testing.assert_close(method.ask(Batch({"image": image}))[1], expected, rtol=1e-4, atol=1e-4)
    for update in method.train().step(Batch({"image": image})):
        update.loss.backward()
    assert all(parameter.grad is not None for parameter in method.student.parameters())
    assert all(parameter.grad is None for net in nets for parameter in net.parameters())


def test_what_cannot_be_is_refused():
    with pytest.raises(IncompatibleError, match="3 teacher_sizes for 2 teachers"):
        build("meal-v2", teacher=teachers(), teacher_sizes=[8, 8, 8])
    with pytest.raises(IncompatibleError, match="classes"):
        updates(build("meal-v2", teacher=teacher_net(classes=7)))

"""MTT: the loss against a loop over plain modules, its limits, and what it refuses."""

import copy

import pytest
import torch
from torch.nn import functional

from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Clock
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher
from limbeck.models.convnet import ConvNet
from limbeck.models.synthetic import SyntheticImages
from tests.methods.datasets.test_experts import empty, source

IMAGES = {"height": 4, "width": 4, "classes": 3, "per_class": 2}


def experts(**arguments):
    torch.manual_seed(0)
    held = empty(experts=2, epochs=3, **arguments)
    held.snapshots.copy_(0.3 * torch.randn(held.snapshots.shape))
    return held


def method(slug="mtt", held=None, own=None, soft=False, seed=4, **options):
    torch.manual_seed(1)
    student, data = SyntheticImages(**IMAGES, lr=own, soft=soft), source()
    given = {"steps": 3, "segment": 1, "latest": 3, "lr": 0.1, "augmentation": False, **options}
    kind = method_class(slug)
    teacher = LiveTeacher(experts() if held is None else held)
    made = kind(kind.Options(**given), student=student, teacher=teacher, data=data.info())
    made.clock = Clock(step=0, steps=1, seed=seed)
    return made


def loss_of(made):
    (update,) = made.step(source().fetch(torch.arange(4)))
    return update.loss


def by_hand(made, rate):
    """The loss with a real module that is trained by hand; no gradients through it."""
    start, target = made.draw()
    network = copy.deepcopy(made.experts.network).train().requires_grad_(True)
    network.load_state_dict(start)
    for _ in range(made.options.steps):
        value = functional.cross_entropy(network(made.set.images.detach()), made.set.labels)
        slopes = torch.autograd.grad(value, list(network.parameters()))
        with torch.no_grad():
            for weight, slope in zip(network.parameters(), slopes, strict=True):
                weight -= rate * slope
    missed = sum((w - target[name]).square().sum() for name, w in network.named_parameters())
    return missed / sum((start[name] - target[name]).square().sum() for name in start)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_against_a_module_trained_by_hand(chunk, soft):
    made = method(chunk=chunk, soft=soft)
    torch.testing.assert_close(loss_of(made).detach(), by_hand(made, 0.1).detach(), rtol=1e-5, atol=0)


def test_the_gradient_against_differences():
    made = method(own=0.3, chunk=2).double()
    loss_of(made).backward()
    images, rate = made.set.images, made.set.log_lr
    for parameter, place in ((images, (0, 0, 1, 2)), (images, (5, 0, 3, 0)), (rate, ())):
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter[place] += step
            values.append(float(loss_of(made).detach()))
        with torch.no_grad():
            parameter[place] += 1e-5
        assert float(parameter.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_recomputation_changes_nothing():
    found = []
    for chunk in (0, 1, 2, 5):
        made = method(chunk=chunk, own=0.2, augmentation=True, batch_size=4).double()
        loss_of(made).backward()
        found.append(torch.cat([made.set.images.grad.flatten(), made.set.log_lr.grad.view(1)]))
    assert found[0].norm() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0}])
def test_without_steps_or_step_size_the_loss_is_1(options):
    assert float(loss_of(method(**options)).detach()) == 1


def test_an_expert_that_went_where_the_images_lead_leaves_no_loss():
    held = experts()
    made = method(held=held, latest=1)
    start, _ = made.draw()
    end = {name: value.detach() for name, value in made.follow(start, 0.1).items()}
    assert float(loss_of(made).detach()) > 0.1
    for expert in range(2):
        held.fill(expert, {name: torch.stack([start[name], *[end[name]] * 3]) for name in start})
    assert float(loss_of(made).detach()) < 1e-10


def test_segments_are_drawn_within_reach_and_by_the_seed():
    held = experts()
    for expert in range(2):
        for epoch in range(4):
            held.snapshots[expert, epoch] = 10 * expert + epoch
    made, seen = method(held=held, segment=2, latest=2), set()
    for seed in range(40):
        made.clock = Clock(seed=seed)
        start, target = (int(next(iter(weights.values())).flatten()[0]) for weights in made.draw())
        assert target == start + 2
        seen.add(start)
    assert seen == {0, 1, 10, 11}


def test_batches_use_up_all_images_before_any_comes_again():
    made = method(steps=7, batch_size=4)
    choices = made._choices()
    assert [len(rows) for rows in choices] == [4, 2, 4, 2, 4, 2, 4]
    for first in (0, 2, 4):
        assert sorted(torch.cat(choices[first : first + 2]).tolist()) == list(range(6))
    assert [len(rows) for rows in method(steps=2)._choices()] == [6, 6]


def test_the_set_s_own_step_size_comes_first():
    plain, own = method(lr=0.1), method(lr=9.0, own=0.1)
    torch.testing.assert_close(loss_of(plain), loss_of(own))
    loss_of(own).backward()
    assert own.set.log_lr.grad.isfinite()
    assert own.set.log_lr.grad != 0


def test_experts_stay_as_they_are():
    held = experts(network="pooled-convnet", depth=2, norm="batch")
    before = {name: value.clone() for name, value in held.state_dict().items()}
    loss_of(method(held=held, chunk=2)).backward()
    assert all(torch.equal(before[name], value) for name, value in held.state_dict().items())
    assert not any(part.training for part in held.modules())
    assert all(parameter.grad is None for parameter in held.parameters())


def test_what_does_not_fit_is_refused():
    kind, info = method_class("mtt"), source().info()
    options = kind.Options(latest=1, segment=1)
    with pytest.raises(IncompatibleError, match="stage of the method experts"):
        kind(options, student=SyntheticImages(**IMAGES), teacher=LiveTeacher(ConvNet()), data=info)
    with pytest.raises(IncompatibleError, match="synthetic-set"):
        kind(options, student=ConvNet(), teacher=LiveTeacher(experts()), data=info)
    with pytest.raises(IncompatibleError, match="end at epoch 4, and the experts were trained for 3"):
        method(latest=4, segment=1)
    method(latest=3, segment=1)  # just within reach


def test_defaults_are_those_of_the_paper():
    options = method_class("mtt").Options()
    assert (options.steps, options.segment, options.latest, options.lr) == (30, 2, 20, 0.001)

"""DataDAM and DM: losses by plain loops, zero for equal data, and what leaves them alone."""

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.models.convnet import ConvNet
from tests.methods.datasets.matched import batch, copy_of, loss_of, method

ALL = ("color", "crop", "cutout", "flip", "scale", "rotate")


@pytest.mark.parametrize("slug", ["dm", "datadam"])
@pytest.mark.parametrize("augmentation", [(), ALL])
def test_a_copy_of_the_data_costs_nothing(slug, augmentation):
    real = batch()
    for seed in range(3):
        same = loss_of(method(slug, student=copy_of(real), augmentation=augmentation, seed=seed), real)
        other = loss_of(method(slug, augmentation=augmentation, seed=seed), real)
        assert float(same.loss.detach()) < 1e-8 * float(other.loss.detach())


def test_the_loss_of_dm_is_the_plain_sum():
    made, real = method("dm"), batch()
    network, images = made.fresh_network(), made.set.images
    total = 0.0
    for label in range(3):
        mean = network.embed(real["image"][real["label"] == label]).mean(0)
        total += (mean - network.embed(images[2 * label : 2 * label + 2]).mean(0)).square().sum()
    update = loss_of(made, real)
    torch.testing.assert_close(update.loss, total)
    assert update.weight == 24
    (gradient,) = torch.autograd.grad(update.loss, images, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, images)[0])


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_the_loss_of_datadam_is_the_plain_sum(power):
    made, real = method("datadam", power=power, balance=0.3, weight=10.0), batch()
    network, images = made.fresh_network(), made.set.images

    def attended(maps):
        drawn = maps.abs().pow(power).sum(1).flatten(1)
        return (drawn / drawn.norm(dim=1, keepdim=True)).mean(0)  # each image by itself, and then the mean

    total = 0.0
    for label in range(3):
        theirs, embedded = network.maps(real["image"][real["label"] == label])
        ours, own = network.maps(images[2 * label : 2 * label + 2])
        assert len(ours) == 3
        for one, other in zip(theirs[:2], ours[:2], strict=True):  # not of the last block
            total += 10 * (attended(one) - attended(other)).square().sum()
        total += 10 * 0.3 * (embedded.mean(0) - own.mean(0)).square().sum()
    update = loss_of(made, real)
    torch.testing.assert_close(update.loss, total)
    gradients = [torch.autograd.grad(loss, images, retain_graph=True)[0] for loss in (update.loss, total)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_without_balance_attention_is_all():
    update = loss_of(method("datadam", balance=0.0))
    torch.testing.assert_close(update.loss, 100 * update.logs["attention"])
    assert update.logs["features"] > 0
    weighed = loss_of(method("datadam", balance=2.0))
    torch.testing.assert_close(weighed.loss, 100 * (weighed.logs["attention"] + 2 * weighed.logs["features"]))


@pytest.mark.parametrize("slug", ["dm", "datadam"])
def test_the_order_of_items_and_unlabelled_ones_do_not_matter(slug):
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    expected = loss_of(method(slug, augmentation=ALL)).loss
    torch.testing.assert_close(loss_of(method(slug, augmentation=ALL), batch(rows)).loss, expected)
    real = batch()
    more = {name: torch.cat([value, value[:5]]) for name, value in real.items()}
    more["label"][24:] = -100
    torch.testing.assert_close(loss_of(method(slug, augmentation=ALL), real.replace(**more)).loss, expected)


@pytest.mark.parametrize("slug", ["dm", "datadam", "dc"])
def test_a_class_that_a_batch_lacks_waits(slug):
    made, real = method(slug), batch()
    update = loss_of(made, real.select(real["label"] != 1))
    update.loss.backward()
    moved = made.set.images.grad.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, False, True, True]


def test_networks_are_drawn_anew_at_each_step():
    made = method("dm", seed=1)
    one = made.fresh_network().head.weight.clone()
    assert torch.equal(made.fresh_network().head.weight, one)
    made = method("dm", seed=2)
    assert not torch.equal(made.fresh_network().head.weight, one)
    assert not any("network" in name for name in made.state_dict())


@pytest.mark.parametrize("slug", ["dm", "datadam"])
def test_steps_bring_the_loss_down(slug):
    made = method(slug)
    losses = []
    for _ in range(30):  # always under the same network
        update = loss_of(made)
        losses.append(float(update.loss.detach()))
        (gradient,) = torch.autograd.grad(update.loss, made.set.images)
        with torch.no_grad():
            made.set.images -= 1e-1 * gradient / gradient.norm()
    assert losses[-1] < 0.9 * losses[0]


def test_what_is_no_set_is_refused():
    with pytest.raises(IncompatibleError, match="no set of images"):
        method("dm", student=ConvNet(2))

"""DC and DSA: the loss by plain differentiation, and the network that learns between the steps."""

import torch
from torch.nn import functional

from limbeck.core.method import Clock
from tests.methods.datasets.matched import batch, copy_of, loss_of, method

ALL = ("color", "crop", "cutout", "flip", "scale", "rotate")


def network_of(made):
    """The network with the weights that the method keeps, trainable."""
    network = made.build_network().requires_grad_(True)
    kept = {name: made.get_buffer("network_" + name.replace(".", "_")) for name, _ in network.named_parameters()}
    network.load_state_dict(kept)
    return network


def gradient_of(network, images, labels):
    loss = functional.cross_entropy(network(images), labels)
    return torch.autograd.grad(loss, list(network.parameters()), create_graph=True)


def test_the_loss_is_the_plain_sum_over_classes_and_rows():
    made, real = method("dc"), batch()
    update = loss_of(made, real)
    network, total = network_of(made), 0.0
    for label in range(3):
        theirs = gradient_of(network, real["image"][real["label"] == label], torch.full((8,), label))
        ours = gradient_of(network, made.set.images[2 * label : 2 * label + 2], torch.full((2,), label))
        for one, other in zip(theirs, ours, strict=True):
            if one.ndim > 1:
                for g, h in zip(one.flatten(1).detach(), other.flatten(1), strict=True):
                    total += 1 - (g @ h) / (g.norm() * h.norm() + 1e-6)
    torch.testing.assert_close(update.loss, total, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(loss, made.set.images)[0] for loss in (update.loss, total)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_copy_of_the_data_costs_nothing():
    real = batch()
    for augmentation in ((), ALL):
        same = loss_of(method("dc", student=copy_of(real), augmentation=augmentation), real).loss
        other = loss_of(method("dc", augmentation=augmentation), real).loss
        assert float(same.detach()) < 0.02 * float(other.detach())


def test_augmentation_is_an_option():
    plain = loss_of(method("dc")).loss
    assert not torch.equal(loss_of(method("dc", augmentation=ALL)).loss, plain)
    made = method("dc", augmentation=ALL, student=None)
    without = type(made)(made.options.model_copy(update={"augmentation": False}), student=made.student, data=made.data)
    without.clock = made.clock
    torch.testing.assert_close(loss_of(without).loss, plain)


def test_the_network_learns_from_the_set_between_steps_and_is_drawn_anew():
    made = method("dc", outer=3, inner=4, network_lr=0.1)
    seen, losses = [], []
    for step in range(4):
        made.clock = Clock(step=step, steps=10, seed=100 + step)
        loss_of(made)
        network = network_of(made)
        seen.append(made.network_head_weight.clone())
        losses.append(float(functional.cross_entropy(network(made.set.images), made.set.labels).detach()))
        made.after_update("student", {})
    assert losses[0] > losses[1] > losses[2]
    assert not torch.equal(seen[2], seen[3])
    assert losses[3] > losses[2]  # another network, which has learned nothing


def test_epochs_are_plain_sgd():
    made = method("dc", outer=2, inner=3, network_lr=0.05)
    loss_of(made)
    network = network_of(made)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(network(made.set.images.detach()), made.set.labels).backward()
        optimizer.step()
    made.after_update("student", {})
    after = network_of(made)
    for one, other in zip(network.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

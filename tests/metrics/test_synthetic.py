"""The evaluator of synthetic sets: one protocol for all, and nothing of the set changed."""

import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.data.source import ArraySource
from limbeck.metrics.synthetic import Protocol, Trial, compare_synthetic, evaluate_synthetic
from limbeck.models.convnet import ConvNet
from limbeck.synthesis.synthetic_set import SyntheticSet

QUICK = Protocol(steps=25, batch_size=16, lr=0.1, networks=2)


@pytest.fixture(scope="module")
def source():
    """Two classes that are told apart by which half is bright."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 2
    images = 0.2 * torch.rand(60, 1, 8, 8)
    images[labels == 0, :, :4] += 0.7
    images[labels == 1, :, 4:] += 0.7
    labels[::10] = -100
    return ArraySource(images, labels, classes=2)


def test_a_set_that_shows_the_classes_teaches_them(source):
    made = SyntheticSet.initialise(source, 3)
    before = made.images.detach().clone()
    figures = evaluate_synthetic(made, source, protocol=QUICK)
    assert figures["accuracy"] > 0.9
    assert figures["items"] == 60
    assert "accuracy_plain" not in figures
    assert "accuracy_hard" not in figures
    made.labels = 1 - made.labels
    assert evaluate_synthetic(made, source, protocol=QUICK)["accuracy"] < 0.1
    assert torch.equal(made.images, before)
    assert made.images.grad is None


def test_augmentation_and_soft_labels_are_reported_apart(source):
    made = SyntheticSet.initialise(source, 3, lr=0.02)
    made.augmentation = ("crop", "cutout")
    made.set_labels(torch.tensor([[0.4, 0.6], [0.9, 0.1]]).repeat_interleave(3, 0))  # the first class is mislabelled
    figures = evaluate_synthetic(made, source, protocol=QUICK)
    trial, (images, labels) = Trial(source, QUICK), (part.detach() for part in made())

    def mean(*arguments):
        found = trial.accuracies(*arguments, lr=float(made.lr.detach()))
        return sum(found) / len(found)

    assert figures["accuracy"] == pytest.approx(mean(images, labels, made.augmentation))
    assert figures["accuracy_plain"] == pytest.approx(mean(images, labels))
    assert figures["accuracy_hard"] == pytest.approx(mean(images, labels.argmax(1), made.augmentation))
    assert figures["step_size"] == pytest.approx(0.02)


def test_the_protocol_repeats_itself_and_leaves_the_stream_alone(source):
    images, labels = (part.detach() for part in SyntheticSet.initialise(source, 2)())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one = Trial(source, QUICK).accuracies(images, labels, ("crop",))
    assert torch.equal(torch.rand(3), expected)
    assert Trial(source, QUICK).accuracies(images, labels, ("crop",)) == one


def test_a_step_of_the_protocol_is_plain_sgd(source):
    images, labels = (part.detach() for part in SyntheticSet.initialise(source, 2)())
    made = []

    class Kept(Trial):
        def _accuracy(self, network):
            made.append(network)
            return 0.0

    Kept(source, Protocol(steps=2, lr=0.1, momentum=0.0, weight_decay=0.0, networks=1)).accuracies(images, labels)
    Kept(source, Protocol(steps=0, networks=1)).accuracies(images, labels)
    after, network = made
    for rate in (0.1, 0.01):  # a tenth from half time on
        gradient = torch.autograd.grad(
            torch.nn.functional.cross_entropy(network(images), labels), list(network.parameters())
        )
        with torch.no_grad():
            for weight, change in zip(network.parameters(), gradient, strict=True):
                weight -= rate * change
    for weight, expected in zip(after.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_a_set_is_held_against_random_and_all_items(source):
    figures = compare_synthetic(SyntheticSet.initialise(source, 3), source, source, protocol=QUICK)
    assert figures["random"] > 0.9
    assert figures["full"] > 0.9
    assert len(figures["by_network"]) == 3
    assert compare_synthetic(SyntheticSet.initialise(source, 3), source, None, protocol=QUICK).keys() == {"by_network"}
    with pytest.raises(IncompatibleError, match="no synthetic set"):
        evaluate_synthetic(ConvNet(), source)

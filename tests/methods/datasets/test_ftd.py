"""FTD: what it adds to MTT, an average of the images. Its experts are tested with the stage that makes them."""

import pytest
import torch

from limbeck.core.registry import method_class
from limbeck.models.synthetic import SyntheticImages
from tests.methods.datasets.test_mtt import loss_of, method


def moved(decay, images):
    """The method after updates that left the images at these values, in turn."""
    made = method("ftd", decay=decay)
    for value in images:
        with torch.no_grad():
            made.set.images.fill_(value)
        made.after_update("student", {})
    return made


def test_the_loss_is_that_of_mtt():
    assert torch.equal(loss_of(method("ftd", chunk=2)), loss_of(method("mtt", chunk=2)))


def test_a_decay_of_0_is_the_last_image():
    made = moved(0.0, [1.0, 2.0, 5.0])
    assert torch.equal(made.result().images, torch.full_like(made.average, 5.0))


def test_the_average_against_its_recursion():
    made = method("ftd", decay=0.75)
    average = made.set.images.detach().clone()
    for value in (1.0, -2.0, 4.0):
        with torch.no_grad():
            made.set.images.fill_(value)
        made.after_update("student", {})
        average = 0.75 * average + 0.25 * value
    torch.testing.assert_close(made.result().images.detach(), average)
    assert torch.equal(made.set.images, torch.full_like(average, 4.0))  # the raw images are left alone


def test_the_average_is_state_and_no_player():
    made = method("ftd")
    assert "average" in made.state_dict()
    assert list(made.players()) == ["student"]
    assert made.result() is not made.set
    assert type(made.result()) is SyntheticImages
    assert torch.equal(made.result().labels, made.set.labels)


def test_defaults_are_those_of_the_paper():
    options = method_class("ftd").Options()
    assert (options.decay, options.steps, options.segment, options.latest) == (0.9995, 30, 2, 20)
    with pytest.raises(ValueError, match="decay"):
        method_class("ftd").Options(decay=1.0)

"""Synthetic sets: how they begin, what they give, what they weigh."""

import pytest
import torch

from limbeck.data.source import ArraySource
from limbeck.synthesis.synthetic_set import SyntheticSet, first_images


@pytest.fixture
def source():
    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    labels[5] = -100
    return ArraySource(torch.rand(30, 2, 4, 5), labels, classes=3)


@pytest.mark.parametrize("how", ["real", "kmeans", "herding", "k-centre"])
def test_a_set_begins_with_different_real_images_of_each_class(source, how):
    made = SyntheticSet.initialise(source, 4, how)
    assert torch.equal(made.labels, torch.arange(3).repeat_interleave(4))
    real = source.fetch(torch.arange(30))
    for image, label in zip(*made(), strict=True):
        found = (real["image"] == image).flatten(1).all(1).nonzero().flatten()
        assert len(found) == 1
        assert real["label"][found] == label
    assert len(made.images.detach().flatten(1).unique(dim=0)) == 12


def test_drawn_beginnings_depend_on_the_seed(source):
    for how in ("real", "noise"):
        one, again, other = (first_images(source, 4, how, seed) for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def test_noise_is_standard_normal(source):
    made = SyntheticSet.initialise(source, 500, "noise").images.detach()
    assert made.shape == (1500, 2, 4, 5)
    assert abs(float(made.mean())) < 0.02
    assert abs(float(made.std()) - 1) < 0.02


def test_a_small_class_gives_its_images_again_and_an_empty_one_none(source):
    few = source.select(torch.tensor([0, 1, 2, 3, 4, 6]))
    made = SyntheticSet.initialise(few, 5)
    assert len(made.of_class(1).detach().flatten(1).unique(dim=0)) == 2
    with pytest.raises(ValueError, match="class 2 has no image"):
        SyntheticSet.initialise(source.select(torch.tensor([0, 1])), 1)


def test_images_of_a_class_and_rows_carry_gradients(source):
    made = SyntheticSet.initialise(source, 2, lr=0.1)
    made.of_class(1).sum().backward()
    assert made.images.grad.flatten(1).sum(1).tolist() == [0, 0, 40, 40, 0, 0]
    images, labels = made.batch(torch.tensor([5, 0]))
    assert torch.equal(images, made.images[[5, 0]])
    assert labels.tolist() == [2, 0]
    made.lr.backward()
    assert float(made.log_lr.grad) == pytest.approx(0.1)  # d exp(u) / du
    assert SyntheticSet.initialise(source, 1).lr is None


def test_soft_labels_take_the_place_of_hard_ones(source):
    made = SyntheticSet.initialise(source, 1)
    made.set_labels(torch.tensor([[0.1, 0.9, 0.0], [0.6, 0.2, 0.2], [0.0, 0.0, 1.0]]))
    assert made.soft
    assert made.hard_labels.tolist() == [1, 0, 2]
    assert torch.equal(made.of_class(0), made.images[1:2])
    with pytest.raises(ValueError, match="3 images"):
        made.set_labels(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="make no set"):
        SyntheticSet(torch.zeros(2, 1, 4, 4), torch.zeros(3, dtype=torch.int64))


def test_the_budget_counts_images_labels_and_step_size(source):
    assert SyntheticSet.initialise(source, 2).budget() == 6 * 40 * 4 + 6 * 8
    assert SyntheticSet.initialise(source, 2, lr=0.1).budget() == 6 * 40 * 4 + 6 * 8 + 4

"""Augmentations: what they do to images, and that they depend on nothing but seed and item."""

import pytest
import torch

from limbeck.data.augment import AUGMENTATIONS, augment, crop, erase, flip, jitter
from limbeck.data.noise import uniforms
from limbeck.data.source import ArraySource

ALL = tuple(AUGMENTATIONS)


@pytest.fixture(params=[1, 3])
def images(request) -> torch.Tensor:
    return torch.rand(40, request.param, 16, 12, generator=torch.Generator().manual_seed(1))


def test_numbers_depend_on_seed_and_item_alone():
    whole = uniforms(7, torch.arange(100), 3)
    assert torch.equal(uniforms(7, torch.tensor([42, 5]), 3), whole[[42, 5]])
    assert torch.equal(uniforms(7, torch.arange(100), 2), whole[:, :2])
    assert not torch.isclose(uniforms(8, torch.arange(100), 3), whole).any(1).all()


def test_numbers_are_uniform_and_uncorrelated():
    numbers = uniforms(2**62 + 3, torch.arange(50_000), 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = torch.histc(numbers, 16, 0, 1) / numbers.numel()
    torch.testing.assert_close(histogram, torch.full((16,), 1 / 16), atol=2e-3, rtol=0)
    correlation = torch.corrcoef(numbers.T)
    torch.testing.assert_close(correlation, torch.eye(4), atol=0.02, rtol=0)
    neighbours = torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))
    assert neighbours[0, 1].abs() < 0.02


def test_an_item_s_augmentation_does_not_depend_on_its_batch():
    source = ArraySource(torch.rand(30, 3, 8, 8), torch.zeros(30, dtype=torch.long), augmentations=ALL)
    whole = source.fetch(torch.arange(30), seed=5).image
    assert torch.equal(source.fetch(torch.tensor([11, 3, 11]), seed=5).image, whole[[11, 3, 11]])
    assert not torch.equal(source.fetch(torch.arange(30), seed=6).image, whole)


def test_augmentation_leaves_the_global_stream_alone():
    source = ArraySource(torch.rand(30, 3, 8, 8), torch.zeros(30, dtype=torch.long), augmentations=ALL)
    before = torch.get_rng_state()
    source.fetch(torch.arange(30), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_seed_means_no_augmentation():
    plain = ArraySource(torch.rand(30, 3, 8, 8))
    source = ArraySource(plain.images(torch.arange(30)), augmentations=ALL)
    assert torch.equal(source.fetch(torch.arange(30)).image, plain.fetch(torch.arange(30)).image)


def test_bytes_and_floats_are_augmented_alike():
    stored = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    fetched = [
        ArraySource(images, augmentations=ALL, normalisation=([0.5] * 3, [0.25] * 3)).fetch(torch.arange(10), seed=1)
        for images in (stored, stored / 255)
    ]
    torch.testing.assert_close(fetched[0].image, fetched[1].image, atol=1e-5, rtol=0)


def test_flip_mirrors_or_leaves(images):
    flipped = flip(images, torch.linspace(0, 0.99, 40)[:, None])
    assert torch.equal(flipped[:20], images[:20].flip(-1))
    assert torch.equal(flipped[21:], images[21:])


def test_crop_shifts_by_whole_pixels_and_repeats_the_border(images):
    draws = torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.999, 0.999]])
    down, same, up = crop(images[:3], draws)  # pads are 2 and 1 pixels
    assert torch.equal(down[:, 2:, 1:], images[0, :, :-2, :-1])
    assert torch.equal(down[:, 0, 1:], images[0, :, 0, :-1])
    assert torch.equal(same, images[1])
    assert torch.equal(up[:, :-2, :-1], images[2, :, 2:, 1:])


def test_jitter_scales_brightness_and_stays_in_range(images):
    same = jitter(images, torch.full((40, 3), 0.5))
    torch.testing.assert_close(same, images)
    darker = jitter(images, torch.tensor([0.0, 0.5, 0.5]).expand(40, 3))
    torch.testing.assert_close(darker, 0.6 * images)
    extreme = jitter(images, torch.rand(40, 3).round())
    assert extreme.min() >= 0
    assert extreme.max() <= 1


def test_erase_paints_one_rectangle_of_the_promised_size(images):
    draws = torch.rand(40, 5, generator=torch.Generator().manual_seed(3))
    fill = torch.full((images.shape[1], 1, 1), 2.0)
    hole = (erase(images, draws, fill) == 2).all(1)
    for item in range(40):
        rows, columns = hole[item].any(1), hole[item].any(0)
        assert torch.equal(hole[item], rows[:, None] & columns[None, :])
        assert (draws[item, 0] < 0.5) or not hole[item].any()
    assert hole.float().mean((1, 2)).max() < 0.45


def test_order_matters_and_repeats_are_drawn_anew(images):
    rows, fill = torch.arange(40), torch.zeros(images.shape[1], 1, 1)
    once = augment(images, ["crop"], 1, rows, fill)
    twice = augment(images, ["crop", "crop"], 1, rows, fill)
    assert once.shape == twice.shape == images.shape
    assert not torch.equal(twice, augment(once, ["crop"], 1, rows, fill))

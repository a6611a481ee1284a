"""Array sources: what they hand out, and what they refuse."""

import numpy
import pytest
import torch

from limbeck.core.errors import IncompatibleError
from limbeck.data.source import ArraySource


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (20, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_batch_is_normalised_with_the_data_s_own_mean_and_deviation(images):
    source = ArraySource(images, torch.arange(20) % 4)
    batch = source.fetch(torch.arange(20))
    assert batch.image.dtype == torch.float32
    torch.testing.assert_close(batch.image.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.image.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_a_given_normalisation_is_used_for_bytes_and_floats_alike(images):
    normalisation = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    expected = (images / 255 - torch.tensor(normalisation[0]).view(3, 1, 1)) / torch.tensor(normalisation[1]).view(
        3, 1, 1
    )
    for stored in (images, images / 255, (images / 255).numpy().astype(numpy.float64)):
        source = ArraySource(stored, torch.zeros(20, dtype=torch.long), normalisation=normalisation)
        torch.testing.assert_close(source.fetch(torch.arange(20)).image, expected, atol=1e-5, rtol=0)


def test_items_come_in_the_order_asked_for(images):
    source = ArraySource(images, torch.arange(20))
    rows = torch.tensor([7, 0, 7, 19])
    batch = source.fetch(rows)
    assert batch.label.tolist() == batch.index.tolist() == [7, 0, 7, 19]
    assert torch.equal(batch.image, source.fetch(torch.arange(20)).image[rows])


def test_a_selection_is_renumbered_and_keeps_classes_and_normalisation(images):
    source = ArraySource(images, torch.arange(20) % 4, class_names=["a", "b", "c", "d"])
    source.set_normalisation([0.1] * 3, [0.5] * 3)
    part = source.select(torch.tensor([4, 9]))
    assert (len(part), part.classes, part.class_names) == (2, 4, ("a", "b", "c", "d"))
    assert part.normalisation == source.normalisation
    assert torch.equal(part.fetch(torch.arange(2)).image, source.fetch(torch.tensor([4, 9])).image)


def test_a_selection_that_was_never_normalised_measures_its_own(images):
    part = ArraySource(images, torch.arange(20) % 4).select(torch.arange(5))
    torch.testing.assert_close(part.fetch(torch.arange(5)).image.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)


def test_the_sample_for_measuring_is_not_biased_when_classes_take_turns():
    brightness = (torch.arange(40_000) % 10 * 25).to(torch.uint8).view(-1, 1, 1, 1)
    mean, _ = ArraySource(brightness, torch.arange(40_000) % 10).normalisation
    assert mean[0] == pytest.approx(112.5 / 255, abs=0.02)


def test_a_constant_channel_is_only_centred():
    source = ArraySource(torch.full((4, 1, 2, 2), 0.25), torch.zeros(4, dtype=torch.long))
    assert torch.equal(source.fetch(torch.arange(4)).image, torch.zeros(4, 1, 2, 2))


def test_unlabelled_data_have_no_classes(images):
    source = ArraySource(images)
    assert source.classes == 0
    assert source.info().example.label.tolist() == [-100, -100]


def test_info_describes_even_a_single_item(images):
    info = ArraySource(images[:1], [3]).info()
    assert (info.items, info.classes, info.example.size) == (1, 4, 2)


@pytest.mark.parametrize(
    ("stored", "labels", "options", "message"),
    [
        (torch.zeros(4, 6, 6), None, {}, "items, channels, height, width"),
        (torch.zeros(4, 1, 6, 6), [0, 1], {}, "4 images, but labels of shape"),
        (torch.full((4, 1, 6, 6), float("nan")), None, {}, "NaN"),
        (torch.zeros(0, 1, 6, 6), None, {}, "at least one item"),
        (torch.zeros(4, 1, 6, 6), [0, 1, 2, 3], {"classes": 3}, "item 3 has the label 3"),
        (torch.zeros(4, 1, 6, 6), [0, 1, -5, 3], {}, "item 2 has the label -5"),
        (torch.zeros(4, 1, 6, 6), None, {"normalisation": ([0.1, 0.2], [1.0, 1.0])}, "1 channels"),
        (torch.zeros(4, 1, 6, 6), None, {"normalisation": ([0.1], [0.0])}, "above 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(stored, labels, options, message):
    with pytest.raises(IncompatibleError, match=message):
        ArraySource(stored, labels, **options)

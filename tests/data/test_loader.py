"""The loader: the same items and pixels however a step is shared out."""

import pytest
import torch

from limbeck.core.errors import RecipeError
from limbeck.data.loader import Loader
from limbeck.data.source import ArraySource


@pytest.fixture(scope="module")
def source() -> ArraySource:
    images = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return ArraySource(images, torch.arange(50) % 5, augmentations=("flip", "crop", "jitter", "erase"))


def pixels(loader: Loader, start: int = 0, stop: int = 6) -> list[torch.Tensor]:
    return [torch.cat([batch.image for batch in batches]) for batches in loader.steps(start, stop)]


def test_every_epoch_shows_every_item_once(source):
    loader = Loader(source, 10, seed=3)
    indices = torch.cat([batch.index for batches in loader.steps(0, 10) for batch in batches])
    first, second = indices[:50], indices[50:]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 1), (2, 2), (4, 1), (1, 8), (8, 1)])
def test_ranks_and_micro_batches_share_one_global_batch(source, world, accumulate):
    whole = pixels(Loader(source, 24, seed=1))  # 24 does not divide 50, so that batches straddle epochs
    parts = [Loader(source, 24, seed=1, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for step, expected in enumerate(whole):
        batches = [batch for loader in parts for batch in loader.at(step)]
        assert [batch.size for batch in batches] == [24 // (world * accumulate)] * (world * accumulate)
        assert torch.equal(torch.cat([batch.image for batch in batches]), expected)


def test_a_step_does_not_depend_on_those_before_it(source):
    loader = Loader(source, 24, seed=1)
    whole = pixels(loader)
    for step in (4, 0, 5):
        assert torch.equal(pixels(loader, step, step + 1)[0], whole[step])


def test_an_item_is_augmented_anew_in_each_epoch(source):
    loader = Loader(source, 50, seed=1)
    first, second = (loader.at(step)[0] for step in (0, 1))
    assert not torch.equal(first.image[first.index.argsort()], second.image[second.index.argsort()])


def test_a_batch_over_two_epochs_augments_each_item_with_its_own_epoch(source):
    small, large = Loader(source, 25, seed=1), Loader(source, 150, seed=1)
    assert torch.equal(pixels(large, 0, 1)[0], torch.cat(pixels(small, 0, 6)))


def test_without_augmentation_the_pixels_are_the_source_s(source):
    batch = Loader(source, 10, seed=1, augment=False).at(2)[0]
    assert torch.equal(batch.image, source.fetch(batch.index).image)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source, workers):
    alone = list(Loader(source, 24, seed=1, accumulate=2).steps(2, 7))
    helped = list(Loader(source, 24, seed=1, accumulate=2, workers=workers).steps(2, 7))
    assert len(alone) == len(helped) == 5
    for ours, theirs in zip(alone, helped, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert list(one) == list(other)
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_stream_is_left_alone(source, workers):
    before = torch.get_rng_state()
    for _ in Loader(source, 24, seed=1, workers=workers).steps(0, 3):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_no_steps_are_no_work(source):
    assert list(Loader(source, 24, seed=1, workers=2).steps(3, 3)) == []


def test_a_batch_that_cannot_be_shared_out_is_refused(source):
    with pytest.raises(RecipeError, match=r"(?s)train\.batch_size.*multiple of 6"):
        Loader(source, 10, seed=0, world=3, accumulate=2)

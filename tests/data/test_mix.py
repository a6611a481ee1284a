"""Mixup and cutmix."""

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.data.mix import cutmix, mixup


@pytest.fixture
def batch() -> Batch:
    values = torch.arange(6.0).view(6, 1, 1, 1)
    return Batch({"image": values.expand(6, 2, 8, 8), "label": torch.arange(6), "index": torch.arange(6)})


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_the_soft_label_says_what_share_of_the_image_is_whose(mix, batch):
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = mix(batch, classes=6)
        torch.testing.assert_close(mixed.soft_label.sum(1), torch.ones(6))
        # Image k is constant k and of class k, so its mean is the mean of the label.
        expected = mixed.soft_label @ torch.arange(6.0)
        torch.testing.assert_close(mixed.image.mean((1, 2, 3)), expected, atol=1e-5, rtol=0)
        assert torch.equal(mixed.label, batch.label)


def test_cutmix_pastes_one_rectangle(batch):
    torch.manual_seed(1)
    mixed = cutmix(batch, classes=6).image
    changed = (mixed != batch.image).any(0).any(0)
    assert torch.equal(changed, changed.any(1)[:, None] & changed.any(0)[None, :])
    assert changed.any()


def test_mixing_is_a_function_of_the_stream(batch):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(mixup(batch, classes=6).image)
    assert torch.equal(*results)


def test_an_unlabelled_item_gives_no_share(batch):
    torch.manual_seed(0)
    mixed = mixup(batch.replace(label=torch.full((6,), -100)), classes=6)
    assert not mixed.soft_label.any()

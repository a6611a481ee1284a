"""Siamese augmentation: the same for both sides, exact where it can be computed by hand, differentiable."""

import pytest
import torch

from limbeck.synthesis.augmentation import CHANGES, SiameseAugment, augment_classes, crop, cutout, flip, rotate, scale
from limbeck.synthesis.augmentation import colour as colour_of

ALL = "color_crop_cutout_flip_scale_rotate"


def images(items=3, channels=3, height=8, width=8):
    return torch.randn(items, channels, height, width, generator=torch.Generator().manual_seed(items))


def test_real_and_synthetic_images_change_alike():
    one, other = images(3), images(5)
    both, kinds = torch.cat([one, other]), set()
    for seed in range(40):
        augment = SiameseAugment(ALL)
        changed = augment(both, seed)
        assert torch.equal(changed, torch.cat([augment(one, seed), augment(other, seed)]))
        kinds.add(round(float(changed.std()), 6))
    assert len(kinds) > 10  # seeds differ


def test_each_draws_for_every_image():
    same = images(1).repeat(6, 1, 1, 1)
    augment = SiameseAugment(("crop",))
    alike, apart = augment(same, 3), augment(same, 3, each=True)
    assert len(alike.flatten(1).unique(dim=0)) == 1
    assert len(apart.flatten(1).unique(dim=0)) > 1


def test_besides_the_flip_one_change_is_made():
    ramp = torch.arange(64.0).view(1, 1, 8, 8).repeat(1, 3, 1, 1)
    seen = {tuple(SiameseAugment("flip")(ramp, seed)[0, 0, 0, :2].tolist()) for seed in range(10)}
    assert seen == {(0.0, 1.0), (7.0, 6.0)}
    assert torch.equal(SiameseAugment("")(ramp, 0), ramp)
    assert torch.equal(SiameseAugment("none")(ramp, 0), ramp)
    with pytest.raises(ValueError, match="no augmentation"):
        SiameseAugment("flip_blur")


def test_changes_by_hand():
    picture = torch.arange(16.0).view(1, 1, 4, 4) + 1
    half = torch.full((1, 3), 0.5)
    assert torch.equal(flip(picture, half), picture)  # below one half mirrors
    assert torch.equal(flip(picture, half - 0.1), picture.flip(-1))
    torch.testing.assert_close(colour_of(picture.repeat(1, 3, 1, 1), half), picture.repeat(1, 3, 1, 1))
    right = crop(images(1), torch.tensor([[0.5, 0.99]]))  # one pixel of eight, from the right
    torch.testing.assert_close(right[..., :-1], images(1)[..., 1:])
    assert (right[..., -1] == 0).all()
    holed = cutout(torch.ones(1, 1, 8, 8), torch.tensor([[0.5, 0.5]]))
    assert (holed == 0).sum() == 16
    assert holed[0, 0, 2:6, 2:6].sum() == 0
    torch.testing.assert_close(rotate(picture, half), picture)
    same = (1 - 1 / 1.2) / (1.2 - 1 / 1.2)  # where the factor is 1
    torch.testing.assert_close(scale(picture, torch.full((1, 2), same)), picture, atol=1e-4, rtol=1e-4)
    turned = rotate(picture.double(), torch.ones(1, 1, dtype=torch.float64), degrees=90.0)
    torch.testing.assert_close(turned, torch.rot90(picture.double(), 1, (2, 3)))


@pytest.mark.parametrize("name", CHANGES)
def test_gradients_are_right(name):
    change = CHANGES[name]
    draws = torch.tensor([[0.3, 0.8, 0.6], [0.9, 0.1, 0.2]], dtype=torch.float64)[:, : change.draws]
    for channels in (1, 3):
        picture = images(2, channels, 4, 4).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: change.apply(x, draws), picture)


def test_classes_change_each_in_their_own_way():
    labels = torch.tensor([2, 0, -100, 2, 1, 0])
    picture = images(1).repeat(6, 1, 1, 1)
    augment = SiameseAugment(ALL)
    changed = augment_classes(augment, picture, labels, 7)
    assert torch.equal(changed[2], picture[2])
    for label in range(3):
        own = changed[labels == label]
        assert torch.equal(own, augment(picture[labels == label], 7 + label))
    assert torch.equal(changed[0], changed[3])
    assert not torch.equal(changed[0], changed[4])
    other = augment_classes(augment, picture[:2], labels[:2], 7)  # a batch of other sizes changes alike
    assert torch.equal(other, changed[:2])

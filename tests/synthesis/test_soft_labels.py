"""Crops of single images, CutMix's rectangle, and what is kept of both."""

import pytest
import torch

from limbeck.synthesis.soft_labels import CropViews, boxes_of, draw_paste, kept_share, show

NOTHING = torch.zeros(4, dtype=torch.int64)


def views(boxes, flips=None, partners=None, paste=NOTHING) -> CropViews:
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    flips = torch.zeros(len(boxes), dtype=torch.bool) if flips is None else torch.as_tensor(flips)
    partners = torch.arange(len(boxes)) if partners is None else torch.as_tensor(partners)
    return CropViews(boxes, flips, partners, torch.as_tensor(paste))


def test_the_whole_image_is_itself_and_its_mirror():
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    whole = [[0.0, 0.0, 1.0, 1.0]] * 2
    assert torch.allclose(show(images, views(whole)), images)
    mirrored = show(images, views(whole, [False, True]))
    assert torch.allclose(mirrored[0], images[0])
    assert torch.allclose(mirrored[1], images[1].flip(-1))


def test_a_crop_of_a_quarter_is_that_quarter_enlarged():
    images = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    shown = show(images, views([[0.5, 0.25, 0.5, 0.5]]))[0, 0]
    part = images[0, 0, 4:8, 2:6]
    # Inside, away from the crop's edges, enlarging twice mixes neighbours in the shares 3 to 1.
    assert torch.allclose(shown[1, 1], (9 * part[0, 0] + 3 * part[0, 1] + 3 * part[1, 0] + part[1, 1]) / 16)
    assert torch.allclose(shown[6, 3], (9 * part[3, 1] + 3 * part[3, 2] + 3 * part[2, 1] + part[2, 2]) / 16)


def test_a_rectangle_of_the_partner_is_pasted_after_cropping():
    images = torch.randn(3, 1, 6, 6)
    whole = [[0.0, 0.0, 1.0, 1.0]] * 3
    pasted = views(whole, partners=[1, 2, 0], paste=[1, 4, 2, 5])
    shown, plain = show(images, pasted), show(images, views(whole))
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[1:4, 2:5] = True
    assert torch.equal(shown[:, 0, ~inside], plain[:, 0, ~inside])
    assert torch.equal(shown[:, 0, inside], plain[[1, 2, 0]][:, 0, inside])
    assert kept_share(pasted, (6, 6)) == pytest.approx(0.75)
    assert kept_share(views(whole), (6, 6)) == 1


def test_boxes_lie_inside_and_have_the_area_and_ratio_drawn():
    draws = torch.rand(500, 4, generator=torch.Generator().manual_seed(0))
    top, left, tall, wide = boxes_of(draws, (0.08, 0.5)).unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert max((top + tall).max(), (left + wide).max()) <= 1 + 1e-6
    assert torch.allclose(tall * wide, 0.08 + 0.42 * draws[:, 0], atol=1e-6)
    assert torch.allclose((wide / tall).log(), (2 * draws[:, 1] - 1) * torch.tensor(4 / 3).log(), atol=1e-5)
    whole = boxes_of(torch.full((1, 4), 0.5), (1.0, 1.0))
    assert torch.allclose(whole, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), atol=1e-6)


def test_cutmix_leaves_as_much_as_its_law_says():
    draws = torch.Generator().manual_seed(0)
    found = [draw_paste((64, 64), 1.0, draws).tolist() for _ in range(400)]
    assert all(0 <= a <= b <= 64 and 0 <= c <= d <= 64 for a, b, c, d in found)
    # Uncut, half of the image would be left on average; a side s around a uniform centre keeps s (1 - s / 4) of itself.
    expected = 1 - sum((s := (n + 0.5) / 1000) ** 2 * (1 - s / 4) ** 2 * 2 * s for n in range(1000)) / 1000
    left = sum(1 - (b - a) * (d - c) / 64**2 for a, b, c, d in found) / 400
    assert left == pytest.approx(expected, abs=0.03)
    assert draw_paste((64, 64), 0.0, draws).tolist() == [0, 0, 0, 0]


def test_what_is_kept_shows_the_same_again():
    draws = torch.Generator().manual_seed(1)
    made = CropViews(
        boxes_of(torch.rand(4, 4, generator=draws), (0.08, 1.0)),
        torch.tensor([True, False, True, False]),
        torch.randperm(4, generator=draws),
        torch.tensor([1, 5, 0, 3]),
    )
    images = torch.randn(4, 1, 8, 8)
    again = CropViews.of({**made.tensors(), "logits": torch.zeros(4, 10)})
    assert torch.equal(show(images, again), show(images, made))
    with pytest.raises(KeyError, match="boxes"):
        CropViews.of({"flips": made.flips})

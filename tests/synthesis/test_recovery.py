"""The curriculum at its exact places, views of a whole batch, groups, storage."""

import math

import pytest
import torch
from torch.nn import functional

from limbeck.synthesis.recovery import (
    SharedView,
    Window,
    apply_view,
    draw_view,
    draw_window,
    from_bytes,
    groups_of,
    least_area,
    to_bytes,
    with_gradient,
)

WHOLE = Window(0, 0, 6, 8)


@pytest.mark.parametrize("milestone", [1.0, 0.5])
@pytest.mark.parametrize("curriculum", ["cosine", "linear"])
def test_the_way_down_at_its_ends_and_its_middle(curriculum, milestone):
    end = round(milestone * 4000)
    assert least_area(curriculum, 0, 4000, milestone) == 1.0
    assert least_area(curriculum, end // 2, 4000, milestone) == pytest.approx(0.54)
    assert least_area(curriculum, end, 4000, milestone) == 0.08
    assert least_area(curriculum, end - 1, 4000, milestone) == pytest.approx(0.08, abs=1e-3)
    assert least_area(curriculum, 3999, 4000, milestone) == pytest.approx(0.08, abs=1e-3)
    values = [least_area(curriculum, step, 4000, milestone) for step in range(4000)]
    assert values == sorted(values, reverse=True)


def test_cosine_and_linear_differ_at_a_quarter():
    assert least_area("cosine", 100, 400) == pytest.approx(0.08 + 0.92 * (1 + math.sqrt(0.5)) / 2)
    assert least_area("linear", 100, 400) == pytest.approx(0.08 + 0.92 * 0.75)


def test_step_shows_the_whole_until_the_milestone():
    assert {least_area("step", step, 100, 0.3) for step in range(30)} == {1.0}
    assert {least_area("step", step, 100, 0.3) for step in range(30, 100)} == {0.08}
    assert {least_area("step", step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("curriculum", ["cosine", "linear", "step"])
def test_no_milestone_is_no_curriculum(curriculum):
    assert {least_area(curriculum, step, 50, 0.0) for step in range(50)} == {0.08}
    assert least_area(curriculum, 0, 50, 0.0, final=0.2) == 0.2


def test_windows_lie_inside_and_have_the_areas_and_ratios_asked_for():
    draws = torch.Generator().manual_seed(0)
    areas = []
    for _ in range(300):
        top, left, tall, wide = draw_window(96, 64, (0.2, 0.6), (3 / 4, 4 / 3), draws)
        assert 0 <= top <= 96 - tall
        assert 0 <= left <= 64 - wide
        assert 0.72 < wide / tall < 1.38  # sides are whole pixels
        areas.append(tall * wide / (96 * 64))
    assert 0.18 < min(areas) < 0.25
    assert 0.55 < max(areas) < 0.62
    assert sum(areas) / 300 == pytest.approx(0.4, abs=0.04)


def test_a_window_of_the_whole_area_is_the_whole_square():
    draws = torch.Generator().manual_seed(0)
    assert {draw_window(8, 8, (1.0, 1.0), (3 / 4, 4 / 3), draws) for _ in range(50)} == {Window(0, 0, 8, 8)}


def test_a_long_image_falls_back_to_its_largest_central_window():
    found = draw_window(30, 10, (1.0, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(0))
    assert found == Window(8, 0, 13, 10)


def test_one_view_for_all_images_follows_torchs_own_pieces():
    images = torch.randn(3, 2, 6, 8)
    view = SharedView(Window(1, 2, 4, 5), flip=True, roll=(2, 3))
    cropped = functional.interpolate(images[:, :, 1:5, 2:7], (6, 8), mode="bilinear", align_corners=False)
    expected = cropped.flip(-1)
    for _ in range(2):
        expected = torch.cat([expected[:, :, -1:], expected[:, :, :-1]], 2)
    for _ in range(3):
        expected = torch.cat([expected[..., -1:], expected[..., :-1]], 3)
    assert torch.equal(apply_view(images, view), expected)
    one_by_one = torch.cat([apply_view(image[None], view) for image in images])
    assert torch.allclose(one_by_one, expected)


def test_a_view_of_everything_is_the_image():
    images = torch.randn(2, 1, 6, 8)
    assert torch.equal(apply_view(images, SharedView(WHOLE, False, (0, 0))), images)
    assert torch.equal(apply_view(images, SharedView(WHOLE, False, (6, 8))), images)  # shifts are cyclic


def test_gradients_flow_through_a_view():
    images = torch.randn(1, 1, 6, 8, dtype=torch.float64, requires_grad=True)
    view = SharedView(Window(1, 2, 4, 5), True, (2, 3))
    assert torch.autograd.gradcheck(lambda value: apply_view(value, view), images)


def test_shifts_and_mirrors_take_all_their_values():
    draws = torch.Generator().manual_seed(0)
    views = [draw_view((8, 8), (0.5, 1.0), draws, jitter=2) for _ in range(200)]
    assert {shift for view in views for shift in view.roll} == {0, 1, 2}
    assert {view.flip for view in views} == {True, False}
    assert not any(draw_view((8, 8), (0.5, 1.0), draws, flip=0.0).flip for _ in range(50))


def test_groups_hold_each_class_once():
    labels = torch.tensor([2, 0, 1, 0, 2, 0])
    assert [rows.tolist() for rows in groups_of(labels)] == [[1, 2, 0], [3, 4], [5]]
    assert [rows.tolist() for rows in groups_of(labels, 2)] == [[1, 2], [0], [3, 4], [5]]


def test_a_value_with_a_gradient_of_its_own():
    inputs, gradient = torch.randn(3, requires_grad=True), torch.randn(3)
    made = with_gradient(torch.tensor(7.0), inputs, gradient)
    assert float(made.detach()) == 7.0
    assert torch.equal(torch.autograd.grad(made, inputs)[0], gradient)


def test_storage_keeps_images_to_half_a_level_and_stored_ones_exactly():
    mean, std = torch.tensor([0.3, 0.6]), torch.tensor([0.2, 0.5])
    pixels = torch.rand(3, 2, 4, 4)
    images = (pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    stored = to_bytes(images, mean, std)
    assert torch.equal(stored, (pixels * 255).round().to(torch.uint8))
    again = from_bytes(stored, mean, std)
    assert ((again - images).abs() * std.view(-1, 1, 1)).max() < 0.5001 / 255
    assert torch.equal(to_bytes(again, mean, std), stored)
    beyond = torch.full((1, 2, 1, 1), 9.0)
    assert to_bytes(beyond, mean, std).unique().tolist() == [255]
    assert to_bytes(-beyond, mean, std).unique().tolist() == [0]

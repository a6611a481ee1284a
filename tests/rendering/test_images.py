import pytest
import torch

from limbeck.rendering.cameras import turntable
from limbeck.rendering.images import ImageScene
from limbeck.rendering.scene import Scene, clip_pixelwise


def test_images_are_their_own_renderings():
    images = torch.rand(3, 4, 5, 6)
    scene = ImageScene(images)
    output = scene(None)
    assert torch.equal(output.image, images)
    assert torch.equal(output.opacity, torch.ones(3, 1, 5, 6))
    output.image.sum().backward()
    assert torch.equal(scene.values.grad, torch.ones(3, 4, 5, 6))


def test_some_of_the_images_train_alone():
    scene = ImageScene(torch.rand(4, 2, 1, 1))
    output = scene(torch.tensor([2, 0]), aux=("views",))
    assert torch.equal(output.image, scene.values[[2, 0]])
    assert output.aux["views"].tolist() == [2, 0]
    output.image.sum().backward()
    assert scene.values.grad.flatten(1)[:, 0].tolist() == [1, 0, 1, 0]


def test_one_image_is_shown_to_every_camera():
    scene = ImageScene(torch.rand(1, 3, 4, 4))
    assert scene(turntable(5, 4, 4)).image.shape == (5, 3, 4, 4)
    several = ImageScene(torch.rand(3, 3, 4, 4))
    assert several(turntable(3, 4, 4)).image.shape == (3, 3, 4, 4)
    with pytest.raises(ValueError, match="3 images cannot be shown to 2 cameras"):
        several(turntable(2, 4, 4))


def test_bounded_images_stay_within_their_range():
    images = torch.rand(1, 3, 4, 4).clamp(0.01, 0.99)
    scene = ImageScene(images, bounded=True)
    torch.testing.assert_close(scene(None).image, images)
    optimizer = torch.optim.SGD(scene.parameters(), lr=1e4)
    scene(None).image.sum().backward()
    optimizer.step()
    assert scene(None).image.min() >= 0
    with pytest.raises(ValueError, match="strictly within"):
        ImageScene(torch.ones(1, 3, 2, 2), bounded=True)


def test_the_base_scene_cannot_be_rendered():
    with pytest.raises(NotImplementedError):
        Scene()(turntable(1, 2, 2))


def test_pixelwise_clipping_keeps_directions_and_small_gradients():
    gradient = torch.tensor([[[[0.04, 0.5]], [[-0.01, -1.0]], [[0.0, 0.0]]]])
    clipped = clip_pixelwise(gradient, 0.05)
    assert torch.equal(clipped[..., 0], gradient[..., 0])
    torch.testing.assert_close(clipped[..., 1], 0.05 * gradient[..., 1])
    assert torch.equal(clip_pixelwise(torch.zeros(1, 3, 2, 2), 0.05), torch.zeros(1, 3, 2, 2))


def test_clipping_as_a_hook_on_the_rendering():
    scene = ImageScene(torch.rand(1, 3, 2, 2))
    output = scene(None)
    output.image.register_hook(lambda gradient: clip_pixelwise(gradient, 0.05))
    (3 * output.image).sum().backward()
    torch.testing.assert_close(scene.values.grad, torch.full((1, 3, 2, 2), 0.05))

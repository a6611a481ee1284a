"""Particles: each view shows its own, over its own background; and what keeps fields from fog."""

import math

import pytest
import torch

from limbeck.models.scenes import GaussianScenes, ImageScenes, VoxelScenes, sphere
from limbeck.rendering.cameras import turntable
from limbeck.rendering.particles import Backdrops, all_around, as_pictures, look, particle_count
from limbeck.rendering.regularisers import half_opacity, ray_entropy, sparsity


def two() -> VoxelScenes:
    torch.manual_seed(0)
    return VoxelScenes(particles=2, resolution=4, samples=6, noise=1.0, background="black").eval()


def test_each_view_is_rendered_of_its_particle_in_its_place():
    scene, cameras, which = two(), turntable(5, 6, 6), torch.tensor([1, 0, 1, 1, 0])
    seen = look(scene, which, cameras, aux=("weights", "normals"))
    for place, number in enumerate(which.tolist()):
        alone = scene.scenes[number].render(cameras[[place]], aux=("weights", "normals"))
        torch.testing.assert_close(seen.image[place], alone.image[0])
        torch.testing.assert_close(seen.normals[place], alone.normals[0])
        torch.testing.assert_close(seen.aux["weights"][place], alone.aux["weights"][0])
    assert not torch.allclose(scene.scenes[0].render(cameras).image, scene.scenes[1].render(cameras).image)


def test_a_particle_that_is_not_seen_gets_no_gradient():
    scene = two()
    look(scene, torch.ones(3, dtype=torch.int64), turntable(3, 4, 4)).image.sum().backward()
    assert scene.scenes[0].field.grid.grad is None
    assert scene.scenes[1].field.grid.grad.abs().max() > 0


@pytest.mark.parametrize("particles", [1, 2])
def test_backdrops_are_behind_the_chosen_views_alone(particles):
    torch.manual_seed(0)
    scene, cameras = GaussianScenes(particles=particles, count=5, background="black"), turntable(4, 6, 6)
    which = torch.arange(4) % particles
    drops = Backdrops(torch.rand(4, 3), torch.tensor([True, False, True, False]))
    plain, seen = look(scene, which, cameras), look(scene, which, cameras, drops)
    behind = (1 - plain.opacity) * drops.colours[..., None, None] * drops.chosen.view(-1, 1, 1, 1)
    torch.testing.assert_close(seen.image, plain.image + behind)


def test_images_are_particles_without_cameras():
    scene = ImageScenes(particles=5, channels=2, height=1, width=1)
    assert particle_count(scene) == 5
    assert torch.equal(look(scene, torch.tensor([3, 3, 0]), None).image, scene.values[[3, 3, 0]])
    assert all_around(scene, 7, 9, 9).shape == (5, 2, 1, 1)


def test_pictures_are_grayed_and_normalised():
    image = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(as_pictures(image, 1, [0.5], [0.25]), (image.mean(1, keepdim=True) - 0.5) / 0.25)
    torch.testing.assert_close(as_pictures(image[:, :1], 3, [0.0] * 3, [1.0] * 3), image[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="3 channels cannot become pictures of 4"):
        as_pictures(image, 4, [0.0] * 4, [1.0] * 4)


def test_regularisers_against_their_formulas():
    weights = torch.tensor([0.0, 0.5, 1.0, 0.25]).view(1, 4, 1, 1)
    bits = (0 + 1 + 0 + (0.25 * 2 + 0.75 * math.log2(4 / 3))) / 4
    assert abs(float(ray_entropy(weights)[0]) - bits) < 2e-4
    opacity = torch.tensor([0.0, 0.5]).view(1, 1, 1, 2)
    assert abs(float(sparsity(opacity)[0]) - (0.1 + math.sqrt(0.26)) / 2) < 1e-6
    assert abs(float(half_opacity(opacity)[0]) - math.log(2) / 2) < 5e-3
    sure = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    assert half_opacity(sure)[0] < half_opacity(opacity)[0]


def test_a_sphere_is_closed_and_turned_outwards():
    vertices, faces = sphere(2)
    assert faces.shape == (128, 3)
    assert len(vertices) == 66  # Euler: 66 - 192 + 128 = 2
    torch.testing.assert_close(vertices.norm(dim=1), torch.ones(66))
    one, two_, three = vertices[faces].unbind(1)
    assert (torch.linalg.cross(two_ - one, three - one) * one).sum(1).min() > 0

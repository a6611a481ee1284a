import math
import sys
import types

import pytest
import torch

from limbeck.core.errors import MissingExtraError
from limbeck.models.adapters import gsplat
from limbeck.rendering import splatting
from limbeck.rendering.cameras import CameraRanges, turntable
from limbeck.rendering.gaussians import GaussianScene
from limbeck.rendering.scene import PointLight
from limbeck.rendering.splatting import BLUR, Gaussians, project_gaussians, rasterize, rotation_matrices
from tests.rendering.shapes import assert_gradients_match

FRONT = turntable(1, 33, 33, elevation=0.0, distance=4.0).to(torch.float64)


def cloud(count=6, degree=1, seed=0, opacity=(0.3, 0.8), spread=0.4):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return Gaussians(
        means=spread * (2 * draw(count, 3) - 1),
        scales=0.1 + 0.2 * draw(count, 3),
        quaternions=2 * draw(count, 4) - 1,
        opacities=opacity[0] + (opacity[1] - opacity[0]) * draw(count),
        harmonics=0.4 * (draw(count, 1 + 3 * degree, 3) - 0.5),
    )


def parts(gaussians):
    return [gaussians.means, gaussians.scales, gaussians.quaternions, gaussians.opacities, gaussians.harmonics]


def scene_of(gaussians, **options):
    scene = GaussianScene(gaussians.means, gaussians.scales, torch.full_like(gaussians.means, 0.5), degree=1, **options)
    with torch.no_grad():
        scene.quaternions.copy_(gaussians.quaternions)
        scene.opacity_logits.copy_(torch.logit(gaussians.opacities))
        scene.harmonics.copy_(gaussians.harmonics)
    return scene


def test_rotations_of_quaternions():
    half = math.radians(90) / 2
    about_z = torch.tensor([[3 * math.cos(half), 0.0, 0.0, 3 * math.sin(half)]])
    expected = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    torch.testing.assert_close(rotation_matrices(about_z), expected, atol=1e-6, rtol=0)
    matrices = rotation_matrices(cloud().quaternions)
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3, dtype=torch.float64).expand(6, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(6, dtype=torch.float64))


def test_a_gaussian_on_the_axis_has_the_closed_form():
    """Seen from +x, y goes to the right and z upwards, both enlarged by focal / depth."""
    scales = torch.tensor([[0.5, 0.1, 0.2]], dtype=torch.float64)
    one = Gaussians(
        means=torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64),
        scales=scales,
        quaternions=torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64),
        opacities=torch.tensor([0.7], dtype=torch.float64),
        harmonics=torch.zeros(1, 1, 3, dtype=torch.float64),
    )
    splats = project_gaussians(one, FRONT)
    torch.testing.assert_close(splats.centres, torch.full((1, 1, 2), 16.5, dtype=torch.float64))
    torch.testing.assert_close(splats.depths, torch.full((1, 1), 3.0, dtype=torch.float64))
    enlarged = (FRONT.focal[0] / 3.0) ** 2
    expected = torch.diag(enlarged * scales[0, 1:].square() + BLUR)
    torch.testing.assert_close(splats.covariances[0, 0], expected)
    raster = rasterize(one, torch.ones(1, 1, 1, dtype=torch.float64), FRONT)
    assert abs(float(raster.opacity.max()) - 0.7) < 1e-12  # at the centre of pixel (16, 16)
    assert int(raster.opacity.flatten().argmax()) == 16 * 33 + 16
    right = 0.7 * math.exp(-0.5 * 4 / float(expected[0, 0]))
    above = 0.7 * math.exp(-0.5 * 9 / float(expected[1, 1]))
    torch.testing.assert_close(raster.opacity[0, 0, 16, 18].item(), right)
    torch.testing.assert_close(raster.opacity[0, 0, 13, 16].item(), above)
    assert abs(float(raster.radii) - 3 * float(expected.max().sqrt())) < 1e-9


def test_the_projected_covariance_is_that_of_projected_samples():
    """A small Gaussian off the axis, turned: its points, projected exactly, have the linearised covariance."""
    small = cloud(1)
    small = Gaussians(small.means, 0.05 * small.scales, small.quaternions, small.opacities, small.harmonics)
    cameras = (
        CameraRanges(distance=(3.0, 3.0)).sample(3, 4000, 4000, torch.Generator().manual_seed(1)).to(torch.float64)
    )
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    points = small.means + noise @ torch.linalg.cholesky(small.covariances()[0]).T
    pixels, _ = cameras.project(points)
    splats = project_gaussians(small, cameras)
    for view in range(3):
        measured = torch.cov(pixels[view].T)
        error = (splats.covariances[view, 0] - BLUR * torch.eye(2) - measured).norm() / measured.norm()
        assert error < 0.02
        assert (splats.centres[view, 0] - pixels[view].mean(0)).norm() < 0.02 * measured.trace().sqrt()


def test_far_outside_the_image_the_map_is_linearised_at_its_rim():
    one = cloud(1)
    means = torch.tensor([[0.0, y, 0.0] for y in (1.0, 9.0, 20.0)], dtype=torch.float64)
    three = Gaussians(means, *(part.expand(3, *part.shape[1:]) for part in parts(one)[1:]))
    splats = project_gaussians(three, FRONT)
    assert (splats.covariances[0, 0] - splats.covariances[0, 1]).abs().max() > 1
    torch.testing.assert_close(splats.covariances[0, 1], splats.covariances[0, 2])  # same depth, both beyond the rim
    rim = 1.3 * 16.5 / FRONT.focal[0] * 4.0
    at_rim = project_gaussians(Gaussians(torch.tensor([[0.0, rim, 0.0]]).double(), *parts(one)[1:]), FRONT)
    torch.testing.assert_close(splats.covariances[0, 1], at_rim.covariances[0, 0], atol=1e-4, rtol=1e-6)


def test_a_scene_that_moves_overrides_its_gaussians():
    class Rising(GaussianScene):
        def gaussians(self, time=None):
            still = super().gaussians(time)
            return Gaussians(still.means + torch.tensor([0.0, 0.0, time]), *parts(still)[1:])

    scene, cameras = Rising.ball(20, 0.3, torch.Generator().manual_seed(0)), turntable(1, 16, 16, elevation=0.0)
    rows = torch.arange(16.0)[:, None]
    heights = [(scene(cameras, time=time).opacity * rows).sum() / 16 for time in (0.0, 0.3)]
    assert heights[1] < heights[0] - 1


def test_blending_against_a_loop_over_pixels():
    gaussians, cameras = cloud(), turntable(2, 19, 21).to(torch.float64)
    values = torch.rand(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    raster = rasterize(gaussians, values, cameras)
    splats = project_gaussians(gaussians, cameras)
    for view, row, column in [(0, 9, 10), (1, 3, 17), (0, 16, 15), (1, 18, 2), (1, 10, 16)]:
        through, total = 1.0, torch.zeros(2, dtype=torch.float64)
        for index in splats.depths[view].argsort().tolist():
            offset = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64) - splats.centres[view, index]
            power = float(offset @ torch.linalg.inv(splats.covariances[view, index]) @ offset)
            alpha = min(0.999, float(gaussians.opacities[index]) * math.exp(-0.5 * power))
            if alpha >= 1 / 255:
                total += through * alpha * values[view, index]
                through *= 1 - alpha
        torch.testing.assert_close(raster.values[view, :, row, column], total)
        torch.testing.assert_close(raster.opacity[view, 0, row, column].item(), 1 - through)


def test_tiles_leave_nothing_out(monkeypatch):
    small = cloud(60, spread=1.0)
    small = Gaussians(small.means, 0.2 * small.scales, *parts(small)[2:])
    cameras = turntable(2, 40, 56).to(torch.float64)
    values = small.colours(cameras)
    tiled = rasterize(small, values, cameras)
    monkeypatch.setattr(splatting, "_TILE", 100)
    whole = rasterize(small, values, cameras)
    assert whole.opacity.max() > 0.3
    torch.testing.assert_close(tiled.values, whole.values)
    torch.testing.assert_close(tiled.opacity, whole.opacity)


def test_the_order_of_gaussians_does_not_matter():
    gaussians, cameras = cloud(40), turntable(3, 20, 20).to(torch.float64)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = Gaussians(*(part[order] for part in parts(gaussians)))
    values = torch.rand(3, 40, 3, dtype=torch.float64)
    one, other = rasterize(gaussians, values, cameras), rasterize(shuffled, values[:, order], cameras)
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.opacity, other.opacity)


def test_an_opaque_gaussian_hides_what_is_behind():
    pair = cloud(2, opacity=(1.0, 1.0))
    means = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64)
    pair = Gaussians(means, torch.full_like(means, 0.3), *parts(pair)[2:])
    values = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    assert rasterize(pair, values, FRONT).values[0, 0, 16, 16] > 0.998
    behind = turntable(2, 33, 33, elevation=0.0, distance=4.0).to(torch.float64)[[1]]
    assert rasterize(pair, values, behind).values[0, 0, 16, 16] < 0.002


def test_what_is_behind_the_camera_is_not_seen():
    gaussians = cloud(1)
    gaussians = Gaussians(torch.tensor([[6.0, 0.1, 0]], dtype=torch.float64), *parts(gaussians)[1:])
    leaf = gaussians.means.requires_grad_()
    raster = rasterize(gaussians, torch.ones(1, 1, 1, dtype=torch.float64), FRONT)
    assert raster.opacity.abs().max() == 0
    assert raster.radii.tolist() == [[0.0]]
    raster.values.sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("degree", [0, 1])
def test_gradients(degree):
    """No opacity is cut off here: the cut is a step, where finite differences say nothing."""
    gaussians = cloud(5, degree)
    leaves = [part.requires_grad_() for part in parts(gaussians)]
    cameras = turntable(2, 18, 17).to(torch.float64)
    target = torch.rand(2, 3, 18, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def loss():
        raster = rasterize(Gaussians(*leaves), gaussians.colours(cameras), cameras, cutoff=0.0)
        return (raster.values - target).square().sum() + raster.opacity.square().sum()

    assert_gradients_match(loss, leaves, tolerance=1e-5)


def test_colours_of_degree_one_vary_with_the_direction():
    one = cloud(1)
    one = Gaussians(torch.zeros(1, 3, dtype=torch.float64), *parts(one)[1:])
    cameras = turntable(4, 4, 4, elevation=30.0).to(torch.float64)
    colours = one.colours(cameras)
    directions = -cameras.position / cameras.position.norm(dim=-1, keepdim=True)
    for view in range(4):
        x, y, z = directions[view].tolist()
        constant, *linear = one.harmonics[0]
        expected = 0.5 + 0.28209479 * constant + 0.48860251 * (-y * linear[0] + z * linear[1] - x * linear[2])
        torch.testing.assert_close(colours[view, 0], expected)
    assert (colours[0] - colours[2]).abs().max() > 0.01


def test_large_renderings_are_blended_again_in_the_backward_pass(monkeypatch):
    results = []
    for held in (2**22, 10):
        monkeypatch.setattr(splatting, "_HELD", held)
        scene = scene_of(cloud(20))
        output = scene(turntable(2, 20, 36).to(torch.float64))
        output.image.square().sum().backward()
        results.append((output.image, scene.means.grad, scene.harmonics.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_scene_renders_depth_background_and_what_is_asked():
    scene = scene_of(cloud())
    cameras = turntable(2, 16, 16).to(torch.float64)
    output = scene(cameras, background=torch.zeros(3), aux=("centres", "radii", "scales", "normals"))
    plain = scene(cameras, background=torch.ones(3))
    torch.testing.assert_close(plain.image - output.image, (1 - output.opacity).expand(-1, 3, -1, -1))
    seen = output.opacity > 0.5
    depths = -cameras.local(scene.means)[..., 2]
    assert (output.depth[seen] >= depths.min()).all()
    assert (output.depth[seen] <= depths.max()).all()
    output.image.sum().backward()
    assert output.aux["centres"].grad.abs().sum() > 0
    assert output.aux["scales"].shape == (6, 3)
    assert plain.normals is None
    with pytest.raises(ValueError, match="does not offer"):
        scene(cameras, aux=("weights",))


def test_a_flat_gaussian_shows_its_normal_to_every_camera():
    flat = cloud(1, opacity=(0.999, 0.999))
    means = torch.zeros(1, 3, dtype=torch.float64)
    scales = torch.tensor([[0.01, 0.4, 0.4]], dtype=torch.float64)
    scene = scene_of(Gaussians(means, scales, torch.tensor([[1.0, 0, 0, 0]]).double(), *parts(flat)[3:]))
    cameras = turntable(2, 33, 33, elevation=0.0, distance=4.0).to(torch.float64)
    normals = scene(cameras, aux=("normals",)).normals[:, :, 16, 16]
    torch.testing.assert_close(normals, torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).double(), atol=1e-6, rtol=0)
    lit = scene(cameras, light=PointLight(torch.tensor([[3.0, 0, 0]] * 2), mode="normal")).image[:, 0, 16, 16]
    torch.testing.assert_close(lit, torch.tensor([1.0, 0.0]).double(), atol=2e-3, rtol=0)


def test_every_view_has_its_own_lamp():
    scene, cameras = scene_of(cloud()), turntable(2, 12, 12).to(torch.float64)
    position = torch.tensor([[3.0, 0, 1], [0, -3.0, 2]])
    both = scene(cameras, light=PointLight(position)).image
    for view in range(2):
        alone = scene(cameras[[view]], light=PointLight(position[[view]])).image
        torch.testing.assert_close(both[[view]], alone)


def test_a_ball_of_gaussians_follows_its_generator():
    one, same, other = (GaussianScene.ball(50, 0.4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.means, same.means)
    assert not torch.equal(one.means, other.means)
    assert one.means.norm(dim=-1).max() <= 0.4
    with pytest.raises(ValueError, match="degree"):
        GaussianScene.ball(5, degree=2)


def test_a_few_steps_of_adam_fit_a_known_scene():
    cameras = CameraRanges(distance=(2.0, 2.5)).sample(4, 20, 20, torch.Generator().manual_seed(0))
    known = scene_of(cloud(12, opacity=(0.6, 0.9)))
    target = known.float()(cameras).image.detach()
    scene = GaussianScene.ball(60, 0.5, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(scene.parameters(), lr=0.03)
    errors = []
    for _ in range(60):
        error = (scene(cameras).image - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.15 * errors[0]


def test_the_adapter_speaks_gsplats_conventions(monkeypatch):
    """gsplat needs a GPU; here what it would be given is projected again, as its documentation defines it."""
    seen = {}

    def rasterization(**given):
        seen.update(given)
        homogeneous = torch.nn.functional.pad(given["means"], (0, 1), value=1.0)
        local = torch.einsum("vij,nj->vni", given["viewmats"], homogeneous)[..., :3]
        image = torch.einsum("vij,vnj->vni", given["Ks"], local)
        size = (len(given["viewmats"]), given["height"], given["width"])
        info = {"means2d": image[..., :2] / image[..., 2:], "radii": torch.ones(*local.shape[:2], 2, dtype=torch.int32)}
        return torch.zeros(*size, given["colors"].shape[-1]), torch.zeros(*size, 1), info

    module = types.ModuleType("gsplat")
    module.rasterization = rasterization
    monkeypatch.setitem(sys.modules, "gsplat", module)
    gaussians, cameras = cloud(), CameraRanges().sample(3, 10, 14, torch.Generator().manual_seed(0)).to(torch.float64)
    raster = gsplat.rasterize_gsplat(gaussians, torch.zeros(3, 6, 4, dtype=torch.float64), cameras)
    torch.testing.assert_close(raster.centres, project_gaussians(gaussians, cameras).centres)
    assert raster.values.shape == (3, 4, 10, 14)
    assert raster.opacity.shape == (3, 1, 10, 14)
    assert raster.radii.shape == (3, 6)
    assert seen["eps2d"] == BLUR


def test_without_gsplat_or_cuda_plain_torch_blends(monkeypatch):
    gaussians, cameras = cloud(), turntable(1, 8, 8).to(torch.float64)
    values = torch.rand(1, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(
        gsplat.fastest(gaussians, values, cameras).values, rasterize(gaussians, values, cameras).values
    )
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(MissingExtraError, match="gsplat"):
        gsplat.rasterize_gsplat(gaussians, values, cameras)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat runs on CUDA only")
def test_gsplat_agrees_with_plain_torch():
    pytest.importorskip("gsplat")
    gaussians = Gaussians(*(part.float().cuda() for part in parts(cloud(30))))
    cameras = turntable(3, 48, 40).to("cuda")
    values = torch.rand(3, 30, 4, device="cuda")
    ours, theirs = rasterize(gaussians, values, cameras), gsplat.fastest(gaussians, values, cameras)
    torch.testing.assert_close(theirs.values, ours.values, atol=5e-3, rtol=0)
    torch.testing.assert_close(theirs.opacity, ours.opacity, atol=5e-3, rtol=0)
    torch.testing.assert_close(theirs.centres, ours.centres, atol=1e-3, rtol=0)

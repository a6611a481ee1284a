import math

import pytest
import torch

from limbeck.rendering.cameras import CameraRanges, look_at, orbit, turntable, view_names, view_weights


def one(azimuth=0.0, elevation=0.0, distance=2.0, fov=60.0, height=8, width=12):
    values = (torch.tensor([value], dtype=torch.float64) for value in (azimuth, elevation, distance, fov))
    return orbit(*values, height, width)


def draw(views, seed=0):
    return CameraRanges().sample(views, 9, 7, torch.Generator().manual_seed(seed))


def test_the_front_camera_stands_on_x_and_sees_y_to_its_right_and_z_upwards():
    expected = torch.tensor([[0.0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(one().world_from_camera[0], expected)
    points = torch.tensor([[0.0, 0, 0], [0, 0.3, 0], [0, 0, 0.3]], dtype=torch.float64)
    pixels, depth = one().project(points)
    focal = 4 / math.tan(math.radians(30))
    expected = torch.tensor([[6, 4], [6 + 0.15 * focal, 4], [6, 4 - 0.15 * focal]], dtype=torch.float64)
    torch.testing.assert_close(pixels[0], expected)
    torch.testing.assert_close(depth[0], torch.full((3,), 2.0, dtype=torch.float64))


def test_angles_distance_and_field_of_view_come_back():
    cameras = draw(20)
    around = orbit(cameras.azimuth, cameras.elevation, cameras.distance, cameras.fov, 9, 7)
    torch.testing.assert_close(around.world_from_camera, cameras.world_from_camera, atol=1e-5, rtol=0)
    torch.testing.assert_close(around.focal, cameras.focal)
    wide = cameras.resized(18, 30)
    torch.testing.assert_close(wide.fov, cameras.fov)


def test_samples_fill_their_ranges_and_follow_the_generator():
    ranges = CameraRanges((-30, 60), (5, 20), (3, 4), (20, 25))
    cameras = ranges.sample(400, 4, 4, torch.Generator().manual_seed(1))
    for name, value in (("azimuth", cameras.azimuth), ("elevation", cameras.elevation), ("distance", cameras.distance)):
        low, high = getattr(ranges, name)
        assert low - 1e-3 <= value.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < value.max() <= high + 1e-3
    assert 20 - 1e-3 <= cameras.fov.min() < cameras.fov.max() <= 25 + 1e-3
    again = ranges.sample(400, 4, 4, torch.Generator().manual_seed(1))
    assert torch.equal(again.world_from_camera, cameras.world_from_camera)
    other = ranges.sample(400, 4, 4, torch.Generator().manual_seed(2))
    assert not torch.equal(other.world_from_camera, cameras.world_from_camera)


def test_without_a_generator_the_global_stream_is_used():
    torch.manual_seed(3)
    first = CameraRanges().sample(2, 4, 4)
    second = CameraRanges().sample(2, 4, 4)
    torch.manual_seed(3)
    assert torch.equal(CameraRanges().sample(2, 4, 4).focal, first.focal)
    assert not torch.equal(first.focal, second.focal)


@pytest.mark.parametrize(
    "wrong", [{"azimuth": (2, 1)}, {"elevation": (0, 91)}, {"distance": (0, 1)}, {"fov": (0, 40)}, {"fov": (40, 180)}]
)
def test_impossible_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CameraRanges(**wrong)


def test_poses_are_rigid_and_invert():
    cameras = draw(10).to(torch.float64)
    unit = torch.eye(4, dtype=torch.float64).expand(10, 4, 4)
    torch.testing.assert_close(cameras.world_from_camera @ cameras.camera_from_world, unit, atol=1e-6, rtol=0)
    rotation = cameras.world_from_camera[:, :3, :3]
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(10, dtype=torch.float64), atol=1e-6, rtol=0)


def test_points_along_a_ray_project_onto_its_pixel():
    cameras = draw(3)
    rays = cameras.rays()
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(3, 9, 7))
    distance = 1.7
    points = rays.origins + distance * rays.directions
    for view in range(3):
        pixels, depth = cameras[[view]].project(points[view].reshape(-1, 3))
        rows, columns = torch.meshgrid(torch.arange(9) + 0.5, torch.arange(7) + 0.5, indexing="ij")
        torch.testing.assert_close(pixels[0], torch.stack((columns, rows), -1).reshape(-1, 2), atol=1e-3, rtol=0)
        torch.testing.assert_close(depth[0], distance * rays.cosine[view].flatten())
    assert rays.flat().views.tolist() == [0] * 63 + [1] * 63 + [2] * 63


def test_looking_straight_down_is_defined():
    eye = torch.tensor([[0.0, 0.0, 3.0]])
    pose = look_at(eye, torch.zeros(3))[0]
    torch.testing.assert_close(pose[:3, 2], torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(pose[:3, :3] @ pose[:3, :3].T, torch.eye(3))
    torch.testing.assert_close(pose[:3, 1], torch.tensor([1.0, 0.0, 0.0]))
    over = [one(elevation=value).world_from_camera for value in (89.999, 90.0)]
    torch.testing.assert_close(over[0], over[1], atol=1e-4, rtol=0)


def test_look_at_agrees_with_orbit_and_honours_the_target():
    cameras = draw(5)
    torch.testing.assert_close(look_at(cameras.position, torch.zeros(3)), cameras.world_from_camera, atol=1e-5, rtol=0)
    target = torch.tensor([0.3, -0.2, 0.1])
    pose = look_at(cameras.position, target)
    expected = torch.nn.functional.normalize(cameras.position - target, dim=-1)
    torch.testing.assert_close(pose[:, :3, 2], expected)


def test_a_turntable_turns_once():
    cameras = turntable(8, 4, 4, elevation=20.0, distance=3.0)
    expected = torch.tensor([0.0, 45, 90, 135, 180, -135, -90, -45])
    found = torch.where(cameras.azimuth < -179.9, cameras.azimuth + 360, cameras.azimuth)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(cameras.elevation, torch.full((8,), 20.0))


def test_names_of_views():
    azimuth = torch.tensor([0.0, 44, -44, 46, -90, 134, 136, 180, 10])
    elevation = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 61])
    cameras = orbit(azimuth, elevation, torch.tensor(2.0), torch.tensor(50.0), 4, 4)
    names = ["front", "front", "front", "side", "side", "side", "back", "back", "overhead"]
    assert view_names(cameras) == names
    assert view_names(cameras, overhead=70.0)[-1] == "front"


def test_weights_of_views():
    expected = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    torch.testing.assert_close(view_weights(torch.tensor([0.0, -45, 90, 135, -180])), expected)


def test_the_focal_length_can_be_trained():
    focal = torch.tensor([10.0], requires_grad=True)
    cameras = type(one())(one().world_from_camera.float(), focal, 8, 12)
    pixels, _ = cameras.project(torch.tensor([[0.0, 0.5, 0.0]]))
    (gradient,) = torch.autograd.grad(pixels[0, 0, 0], focal)
    assert abs(float(gradient) - 0.25) < 1e-6

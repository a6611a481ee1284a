import math
import sys

import numpy
import pytest
import torch
from torch.nn import functional

from limbeck.core.errors import IncompatibleError, MissingExtraError
from limbeck.models.adapters.mesh import field_mesh, mesh_tensors, tensors_mesh, write_mesh
from limbeck.rendering.cameras import turntable
from limbeck.rendering.fields import DensityBlob, VoxelField
from limbeck.rendering.meshes import MeshScene, face_normals, laplacian, normal_consistency, vertex_normals
from limbeck.rendering.scene import PointLight
from limbeck.report.pictures import grid
from limbeck.report.turntable import write_gif
from tests.rendering.shapes import assert_gradients_match, icosphere

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("skimage")

GRID = (torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]), torch.tensor([[0, 1, 2], [0, 2, 3]]))


def test_a_sphere_has_the_depth_and_normals_of_a_sphere():
    vertices, faces = icosphere(4)
    cameras = turntable(2, 16, 16, distance=3.0)
    output = MeshScene(vertices, faces)(cameras, aux=("faces",))
    rays = cameras.rays()
    along = -(rays.origins * rays.directions).sum(-1)
    offset = (rays.origins + along[..., None] * rays.directions).norm(dim=-1)
    inside = offset < 0.95
    distance = along - (1 - offset.square()).clamp_min(0).sqrt()
    torch.testing.assert_close(output.depth[:, 0][inside], (distance * rays.cosine)[inside], atol=0.02, rtol=0)
    points = rays.origins + distance[..., None] * rays.directions
    torch.testing.assert_close(output.normals.movedim(1, -1)[inside], points[inside], atol=0.02, rtol=0)
    assert torch.equal(output.opacity[:, 0], (output.aux["faces"] >= 0).float())
    assert (output.opacity[:, 0][offset > 1.0] == 0).all()
    assert torch.equal(output.image[:, 0][offset > 1.0], torch.ones(int((offset > 1.0).sum())))


def test_the_nearest_triangle_is_seen():
    vertices = torch.cat([torch.tensor([[x, -5.0, -5], [x, 5, -5], [x, 0, 8]]) for x in (-1.0, 0.5)])
    scene = MeshScene(vertices, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    cameras = turntable(2, 4, 4, elevation=0.0, distance=3.0, fov=20.0)
    output = scene(cameras, aux=("faces",))
    assert output.aux["faces"][0].unique().tolist() == [1]
    assert output.aux["faces"][1].unique().tolist() == [0]
    torch.testing.assert_close(output.depth[0], torch.full((1, 4, 4), 2.5))
    torch.testing.assert_close(output.depth[1], torch.full((1, 4, 4), 2.0))


def test_pieces_give_what_the_whole_gives():
    from limbeck.rendering.meshes import first_hits

    vertices, faces = icosphere(2)
    rays = turntable(2, 9, 9).rays().flat()
    whole = first_hits(vertices, faces, rays)
    assert (whole >= 0).any()
    assert torch.equal(whole, first_hits(vertices, faces, rays, pairs=1000))


def test_gradients_of_vertices_and_colours():
    vertices, faces = icosphere(1)
    scene = MeshScene(vertices, faces).double()
    torch.manual_seed(0)
    with torch.no_grad():
        scene.colour_logits.normal_()
    cameras = turntable(1, 10, 10, distance=3.0).to(torch.float64)
    lamp = PointLight(cameras.position)
    # Finite differences over a moving outline would measure what has no gradient: only pixels well inside count.
    inside = scene(cameras).depth < 2.3
    target = torch.rand(1, 3, 10, 10, dtype=torch.float64)
    assert inside.any()

    def loss():
        output = scene(cameras, light=lamp)
        return (inside * (output.image * target + output.normals * target + output.depth)).sum()

    assert_gradients_match(loss, [scene.vertices, scene.colour_logits], tolerance=1e-4)


def test_every_view_has_its_own_lamp():
    scene, cameras = MeshScene(*icosphere(2)), turntable(2, 8, 8, distance=4.0)
    position = torch.tensor([[3.0, 0, 1], [0, -3.0, 2]])
    both = scene(cameras, light=PointLight(position)).image
    for view in range(2):
        alone = scene(cameras[[view]], light=PointLight(position[[view]])).image
        torch.testing.assert_close(both[[view]], alone)


def test_a_fixed_shape_trains_its_texture_alone():
    vertices, faces = icosphere(1)
    scene = MeshScene(
        vertices, faces, texture=torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sigmoid()), fixed=True
    )
    assert {name for name, value in scene.named_parameters() if value.requires_grad} == {
        "texture.0.weight",
        "texture.0.bias",
    }
    scene(turntable(1, 8, 8)).image.sum().backward()
    assert scene.vertices.grad is None
    assert scene.texture[0].weight.grad.abs().sum() > 0


def test_normals_of_triangles():
    normals = face_normals(*GRID)
    torch.testing.assert_close(normals, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))  # twice the area of 1/2
    vertices, faces = icosphere(3)
    assert ((face_normals(vertices, faces) * vertices[faces].mean(1)).sum(-1) > 0).all()
    torch.testing.assert_close(
        vertex_normals(vertices, faces), functional.normalize(vertices, dim=-1), atol=0.04, rtol=0
    )


def test_smoothness():
    vertices, faces = GRID
    assert float(normal_consistency(vertices, faces)) < 1e-6
    folded = vertices.clone()
    folded[3] = torch.tensor([1.0, 1.0, 0.0])  # the second triangle now lies at right angles to the first
    expected = functional.cosine_similarity(*face_normals(folded, faces), dim=0)
    torch.testing.assert_close(normal_consistency(folded, faces), 1 - expected)
    assert float(normal_consistency(vertices, faces[:1])) == 0
    # Corners 0 and 2 have three neighbours, 1 and 3 two, in a square of side 1.
    three, two = math.hypot(1 / 3 * 2, 1 / 3 * 2), math.hypot(0.5, 0.5)
    assert abs(float(laplacian(vertices, faces)) - (2 * three + 2 * two) / 4) < 1e-6
    sphere = icosphere(1)
    rough = sphere[0] + 0.05 * torch.randn(sphere[0].shape, generator=torch.Generator().manual_seed(0))
    assert normal_consistency(rough, sphere[1]) > normal_consistency(*sphere)


def test_the_gradients_of_smoothness():
    vertices, faces = icosphere(1)
    rough = vertices.double() + 0.1 * torch.randn(vertices.shape, generator=torch.Generator().manual_seed(0)).double()
    rough.requires_grad_()
    assert_gradients_match(lambda: laplacian(rough, faces) + normal_consistency(rough, faces), [rough])


def test_the_mesh_of_a_ball_is_closed_and_has_its_radius():
    field = VoxelField(65, blob=DensityBlob(strength=10.0, radius=0.5))
    level = math.log(2)  # softplus(0): where the blob crosses 0
    mesh = field_mesh(field, level, resolution=48)
    radius = numpy.linalg.norm(mesh.vertices, axis=1)
    assert abs(radius - 0.5).max() < 0.01
    assert mesh.is_watertight
    assert mesh.volume > 0  # faces look outwards
    assert abs(mesh.volume / (4 / 3 * math.pi * 0.5**3) - 1) < 0.03
    assert set(mesh.visual.vertex_colors[:, :3].flatten()) == {128}
    vertices, faces = mesh_tensors(mesh)
    assert MeshScene(vertices, faces)(turntable(1, 8, 8)).opacity.max() == 1


def test_a_shape_that_fills_the_cube_is_cut_off_and_closed():
    mesh = field_mesh(VoxelField(9, bound=0.5, blob=DensityBlob(10.0, 2.0)), 0.5, resolution=16)
    assert mesh.is_watertight
    assert abs(mesh.vertices).max() <= 0.5 + 1 / 15


def test_there_may_be_no_surface():
    with pytest.raises(IncompatibleError, match="no surface at density 50"):
        field_mesh(VoxelField(9, blob=DensityBlob()), 50.0, resolution=8)


@pytest.mark.parametrize("ending", ["obj", "ply", "glb", "stl"])
def test_files_hold_the_mesh(tmp_path, ending):
    vertices, faces = icosphere(1)
    write_mesh(tensors_mesh(vertices, faces, torch.full_like(vertices, 0.25)), tmp_path / f"ball.{ending}")
    back = trimesh.load(tmp_path / f"ball.{ending}", force="mesh")
    assert len(back.faces) == len(faces)
    assert abs(numpy.linalg.norm(back.vertices, axis=1) - 1).max() < 1e-5
    with pytest.raises(IncompatibleError, match="cannot be written"):
        write_mesh(back, tmp_path / "ball.blend")


@pytest.mark.parametrize(("module", "package"), [("skimage", "scikit-image"), ("trimesh", "trimesh")])
def test_missing_packages_are_named(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=package):
        field_mesh(VoxelField(9, blob=DensityBlob()), 0.5, resolution=8)


def test_a_turntable_has_one_frame_a_camera(tmp_path):
    images = pytest.importorskip("PIL.Image")
    vertices, faces = icosphere(1)
    scene = MeshScene(vertices * torch.tensor([0.3, 0.6, 0.9]), faces).train()
    with torch.no_grad():
        frames = scene(turntable(7, 12, 10)).image
        expected = scene.eval()(turntable(7, 12, 10)[[5]]).image[0]
    write_gif(frames, tmp_path / "turn.gif")
    with images.open(tmp_path / "turn.gif") as picture:
        assert (picture.n_frames, picture.size, picture.info["loop"]) == (7, (10, 12), 0)
        assert picture.info["duration"] == 430
    sheet = grid(frames, 3)  # images this small are enlarged twofold, with a line between
    assert sheet.shape == (3, 3 * 25, 3 * 21)
    found = sheet[:, 25:49:2, 42:62:2]
    torch.testing.assert_close(found, expected, atol=0.003, rtol=0)


def test_without_pillow_there_is_no_turntable(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match="pillow"):
        write_gif(torch.zeros(2, 3, 4, 4), tmp_path / "a.gif")

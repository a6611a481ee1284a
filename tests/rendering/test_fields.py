import pytest
import torch
from torch.nn import functional

from limbeck.rendering.cameras import CameraRanges, turntable
from limbeck.rendering.field_scene import FieldScene
from limbeck.rendering.fields import DensityBlob, HashField, VoxelField
from limbeck.rendering.scene import DirectionBackground, PointLight
from limbeck.rendering.volume import composite
from tests.rendering.shapes import Ball, assert_gradients_match


def small_hash(**options):
    torch.manual_seed(0)
    # Two grids: 4 cells a side fit 2^8 entries, 8 cells a side are hashed.
    return HashField(levels=2, table=8, base=4, growth=2.0, width=8, **options)


def points(count=50, seed=0, dtype=torch.float32):
    return 2 * torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype) - 1


def scramble(field, seed=4):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
    return field


def test_a_voxel_field_is_linear_between_its_values_and_exact_on_them():
    field = VoxelField(resolution=4, bound=1.5)
    axis = torch.linspace(-1.5, 1.5, 4)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    with torch.no_grad():
        field.grid[0, 0] = 1 + 2 * x - 3 * y + 0.5 * z  # trilinear interpolation reproduces it everywhere
    where = 1.5 * points()
    expected = 1 + where @ torch.tensor([2.0, -3.0, 0.5])
    torch.testing.assert_close(field.raw(where)[:, 0], expected, atol=1e-5, rtol=0)


def test_the_blob_and_the_activations():
    blob = DensityBlob(10.0, 0.5)
    where = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 1.0, 0]])
    torch.testing.assert_close(blob(where), torch.tensor([10.0, 0.0, -10.0]))
    density, colour = VoxelField(8, blob=blob)(where)
    torch.testing.assert_close(density, functional.softplus(torch.tensor([10.0, 0.0, -10.0])))
    assert torch.equal(colour, torch.full((3, 3), 0.5))
    torch.testing.assert_close(
        VoxelField(8, blob=DensityBlob(1.0), activation="exp").density(where)[1], torch.tensor(1.0)
    )
    hollow = VoxelField(8, bound=4.0, blob=DensityBlob(-10.0, 2.5)).density(torch.tensor([[0.0, 0, 0], [3.0, 0, 0]]))
    assert hollow[0] < 1e-4 < 1 < hollow[1]
    with pytest.raises(ValueError, match="activation"):
        VoxelField(8, activation="relu")


def test_nothing_outside_the_cube():
    for field in (VoxelField(8), small_hash()):
        density = field.density(torch.tensor([[1.01, 0, 0], [0, 0, -2.0], [0.99, 0, 0]]))
        assert density[:2].tolist() == [0.0, 0.0]
        assert density[2] > 0.1


def test_the_hash_encoding_against_a_loop():
    field = scramble(small_hash())
    where = points(20, seed=3)
    encoding = field.encode(where)
    for row, point in enumerate(where.tolist()):
        for level, side in enumerate((4, 8)):
            scaled = [(value + 1) / 2 * side for value in point]
            low = [min(int(value), side - 1) for value in scaled]
            total = torch.zeros(2)
            for corner in range(8):
                x, y, z = (low[axis] + (corner >> axis & 1) for axis in range(3))
                weight = 1.0
                for axis in range(3):
                    inside = scaled[axis] - low[axis]
                    weight *= inside if corner >> axis & 1 else 1 - inside
                counted = x + 5 * (y + 5 * z)
                hashed = (x ^ (y * 2654435761) ^ (z * 805459861)) % 256
                total += weight * field.tables[level, counted if side == 4 else hashed].detach()
            torch.testing.assert_close(encoding[row, 2 * level : 2 * level + 2], total, atol=1e-4, rtol=1e-4)


def test_a_hash_field_is_continuous_across_its_cells_and_reaches_the_faces():
    field = scramble(small_hash())
    for place in (0.25, -0.5, 0.0):
        near = field.encode(torch.tensor([[place - 1e-6, 0.3, 0.1], [place + 1e-6, 0.3, 0.1]]))
        torch.testing.assert_close(near[0], near[1], atol=1e-4, rtol=0)
    assert field.encode(torch.ones(1, 3)).isfinite().all()


@pytest.mark.parametrize("make", [lambda: VoxelField(5, blob=DensityBlob(1.0)), small_hash], ids=["voxels", "hash"])
@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_gradients_of_fields(make, activation):
    field = scramble(make()).double()
    field.activation = activation
    where = (0.9 * points(30, seed=5, dtype=torch.float64)).requires_grad_()

    def loss():
        density, colour = field(where)
        return density.sum() + colour.square().sum()

    assert_gradients_match(loss, [where, *field.parameters()], tolerance=1e-5)


def test_normals_point_outwards_and_train_the_field():
    field = VoxelField(33, blob=DensityBlob())
    where = 0.5 * functional.normalize(points(), dim=-1)
    torch.testing.assert_close(field.normals(where), functional.normalize(where, dim=-1), atol=0.01, rtol=0)
    scramble(field).double()
    target = points(50, seed=1, dtype=torch.float64)
    assert_gradients_match(lambda: (field.normals(0.8 * target) * target).sum(), [field.grid], tolerance=1e-5)


def test_a_ball_against_its_closed_form():
    """Opacity 1 - exp(-sigma chord) at every pixel, the ball's colour over the background, depth between its faces."""
    field = Ball(density=2.0, radius=0.6)
    scene = FieldScene(field, samples=2000).eval()
    cameras = turntable(2, 12, 12, distance=2.5)
    with torch.no_grad():
        output = scene(cameras, background=torch.tensor([0.0, 0.5, 1.0]))
    rays = cameras.rays()
    along = -(rays.origins * rays.directions).sum(-1)
    closest = (rays.origins + along[..., None] * rays.directions).norm(dim=-1)
    chord = 2 * (0.6**2 - closest**2).clamp_min(0).sqrt()
    opacity = 1 - torch.exp(-2.0 * chord)
    torch.testing.assert_close(output.opacity[:, 0], opacity, atol=3e-3, rtol=0)
    colour = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    behind = torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    expected = opacity[:, None] * colour + (1 - opacity[:, None]) * behind
    torch.testing.assert_close(output.image, expected, atol=3e-3, rtol=0)
    seen = chord > 0.1
    mean = along - chord / 2 + 0.5 - chord / (torch.exp(2.0 * chord) - 1)  # mean of a cut-off exponential
    torch.testing.assert_close(output.depth[:, 0][seen], (mean * rays.cosine)[seen], atol=5e-3, rtol=0)
    assert (output.depth[:, 0][chord == 0] == 0).all()


class Wall(Ball):
    """Opaque where x < 0.25."""

    def density(self, points):
        return 1e4 * (points[:, 0] < 0.25)


def test_the_depth_of_an_opaque_plane_is_measured_along_the_viewing_axis():
    cameras = turntable(1, 8, 8, elevation=0.0, distance=3.0, fov=30.0)
    output = FieldScene(Wall(), samples=800).eval()(cameras)
    torch.testing.assert_close(output.depth, torch.full((1, 1, 8, 8), 2.75), atol=3e-3, rtol=0)
    assert (output.opacity > 0.999).all()


def test_resampling_finds_the_surface_with_few_samples():
    cameras = turntable(1, 8, 8, elevation=0.0, distance=3.0, fov=30.0)
    plain = FieldScene(Wall(), samples=24).eval()(cameras).depth
    finer = FieldScene(Wall(), samples=24, resampled=24).eval()(cameras).depth
    assert (finer - 2.75).abs().max() < 0.5 * (plain - 2.75).abs().max()


def test_kinds_of_background():
    cameras = turntable(2, 4, 4)
    empty = FieldScene(Ball(density=0.0), samples=4)
    assert torch.equal(empty(cameras).image, torch.ones(2, 3, 4, 4))
    each = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    torch.testing.assert_close(empty(cameras, background=each).image, each[:, :, None, None].expand(2, 3, 4, 4))
    picture = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(empty(cameras, background=picture).image, picture)
    towards = empty(cameras, background=lambda directions: (directions + 1) / 2).image
    torch.testing.assert_close(towards, (cameras.rays().directions.permute(0, 3, 1, 2) + 1) / 2)
    fixed = FieldScene(Ball(density=0.0), samples=4, background=each[0])
    torch.testing.assert_close(fixed(cameras).image, each[0][:, None, None].expand(2, 3, 4, 4))
    assert "background" in fixed.state_dict()


def test_a_trained_background_is_part_of_the_scene():
    scene = FieldScene(VoxelField(4), samples=4, background=DirectionBackground())
    names = [name for name, _ in scene.named_parameters()]
    assert any(name.startswith("background.") for name in names)
    scene(turntable(1, 4, 4)).image.sum().backward()
    assert scene.background.layers[2].bias.grad.abs().sum() > 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"FieldScene does not offer \['radii'\]"):
        FieldScene(Ball())(turntable(1, 4, 4), aux=("radii",))


def test_weights_on_request():
    scene = FieldScene(VoxelField(8, blob=DensityBlob()), samples=10)
    output = scene(turntable(2, 4, 5), aux=("weights",))
    assert output.aux["weights"].shape == (2, 10, 4, 5)
    torch.testing.assert_close(output.aux["weights"].sum(1, keepdim=True), output.opacity, atol=1e-6, rtol=0)
    assert output.normals is None


def test_training_looks_at_random_places_evaluation_does_not():
    scene = FieldScene(VoxelField(8, blob=DensityBlob()), samples=8)
    cameras = turntable(1, 6, 6)
    torch.manual_seed(0)
    first, second = scene(cameras).image, scene(cameras).image
    torch.manual_seed(0)
    assert torch.equal(scene(cameras).image, first)
    assert not torch.equal(first, second)
    scene.eval()
    assert torch.equal(scene(cameras).image, scene(cameras).image)


@pytest.mark.parametrize("light", [False, True])
def test_pieces_give_what_the_whole_gives(light):
    """Also in the backward pass, where each piece is computed again."""
    results = []
    cameras = turntable(2, 6, 6)
    lamp = PointLight(cameras.position) if light else None
    for chunk in (2**20, 100):
        scene = FieldScene(scramble(VoxelField(6, blob=DensityBlob())), samples=8, chunk=chunk)
        torch.manual_seed(1)
        output = scene(cameras, light=lamp)
        output.image.square().sum().backward()
        results.append((output.image, output.depth, scene.field.grid.grad))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(whole, pieces, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_rendering():
    scene = FieldScene(scramble(VoxelField(5, blob=DensityBlob(2.0))), samples=12).double().eval()
    cameras = turntable(2, 4, 4).to(torch.float64)
    target = torch.rand(2, 3, 4, 4, dtype=torch.float64)

    def loss():
        output = scene(cameras, aux=("normals",))
        return (output.image - target).square().sum() + output.depth.sum() + (output.normals * target).sum()

    assert_gradients_match(loss, [scene.field.grid], tolerance=1e-5)


def test_lamps():
    points_, views = torch.zeros(2, 3), torch.tensor([0, 1])
    normals = torch.tensor([[0.0, 0, 1], [0.0, 0, 1]])
    albedo = torch.tensor([[0.5, 0.2, 1.0], [0.5, 0.2, 1.0]])
    position = torch.tensor([[0.0, 0, 2], [0.0, 0, -2]])  # the second shines from behind
    shade = PointLight(position, 0.1, 0.9)(albedo, normals, points_, views)
    torch.testing.assert_close(shade, torch.stack((albedo[0], 0.1 * albedo[1])))
    white = PointLight(position, 0.1, 0.9, "textureless")(albedo, normals, points_, views)
    torch.testing.assert_close(white, torch.tensor([[1.0] * 3, [0.1] * 3]))
    shown = PointLight(position, mode="normal")(albedo, normals, points_, views)
    torch.testing.assert_close(shown, torch.tensor([[0.5, 0.5, 1.0]] * 2))
    with pytest.raises(ValueError, match="mode"):
        PointLight(position, mode="glossy")


def test_a_lit_ball_is_bright_on_the_side_of_the_lamp():
    cameras = turntable(1, 16, 16, elevation=0.0)
    lamp = PointLight(torch.tensor([[2.5, 3.0, 0.0]]))  # to the right of the front camera
    scene = FieldScene(Ball(density=60.0), samples=64).eval()
    output = scene(cameras, light=lamp, aux=("normals",))
    assert output.image[0, 0, 8, 10] > output.image[0, 0, 8, 5] + 0.1
    inside = output.opacity[0, 0] > 0.99
    facing = (output.normals[0] * cameras.position[0][:, None, None]).sum(0)
    assert (facing[inside] > 0).all()


@pytest.mark.parametrize("make", [lambda: VoxelField(16, blob=DensityBlob()), small_hash], ids=["voxels", "hash"])
def test_a_few_steps_of_adam_fit_a_known_scene(make):
    cameras = CameraRanges(distance=(2.0, 2.5), fov=(40, 50)).sample(6, 16, 16, torch.Generator().manual_seed(0))
    target = FieldScene(Ball(density=20.0), samples=64).eval()(cameras).image.detach()
    torch.manual_seed(0)
    scene = FieldScene(make(), samples=24)
    optimizer = torch.optim.Adam(scene.parameters(), lr=0.1)
    errors = []
    for _ in range(40):
        error = (scene(cameras).image - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.15 * errors[0]


def test_opacities_and_densities_share_one_formula():
    opacity = torch.tensor([0.3, 0.6, 0.2])
    weights, left = composite(-torch.log1p(-opacity))
    torch.testing.assert_close(weights, torch.tensor([0.3, 0.7 * 0.6, 0.7 * 0.4 * 0.2]))
    torch.testing.assert_close(left, torch.tensor(0.7 * 0.4 * 0.8))

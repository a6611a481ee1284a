"""Meshes out of density fields by scikit-image's marching cubes, and files by trimesh."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.durable import write_bytes
from limbeck.core.errors import IncompatibleError, MissingExtraError
from limbeck.rendering.fields import RadianceField

_CHUNK = 2**18
_FORMATS = ("obj", "ply", "glb", "stl")


@torch.no_grad()
def field_mesh(field: RadianceField, level: float, resolution: int = 64) -> Any:
    """The surface where a field's density crosses a level, as a `trimesh.Trimesh` with a colour at each vertex.

    The mesh is closed: what reaches the faces of the field's cube is cut off there.

    Args:
        field: what to extract.
        level: density per world unit, positive.
        resolution: values along each side of the cube, at least 2; memory and time grow with its cube.

    Raises:
        MissingExtraError: scikit-image or trimesh is not installed.
        IncompatibleError: the density is on the same side of the level everywhere.
    """
    measure, trimesh = _packages("a mesh")
    parameter = next(field.parameters(), torch.empty(0))
    volume = _density_grid(field, resolution, parameter)
    low, high = float(volume.min()), float(volume.max())
    if not low < level < high:
        raise IncompatibleError(
            f"no surface at density {level}: the field's densities go up to {high:.3g}", "choose a level between"
        )
    spacing = 2 * field.bound / (resolution - 1)
    # In axes ordered (x, y, z), "ascent" is what makes faces counter-clockwise as seen from where the density is low.
    found = measure.marching_cubes(volume.numpy(), level, spacing=(spacing,) * 3, gradient_direction="ascent")
    vertices, faces = found[:2]
    points = torch.from_numpy(vertices.copy()) - (field.bound + spacing)  # the volume has one empty layer around it
    colours = torch.cat([field(block)[1].cpu() for block in points.to(parameter).split(_CHUNK)])
    return trimesh.Trimesh(points.numpy(), faces, vertex_colors=(colours * 255).round().byte().numpy())


def _density_grid(field: RadianceField, resolution: int, like: Tensor) -> Tensor:
    """Densities (x, y, z) on the CPU, with a layer of zeros around."""
    axis = torch.linspace(-field.bound, field.bound, resolution, device=like.device, dtype=like.dtype)
    points = torch.cartesian_prod(axis, axis, axis)
    density = torch.cat([field.density(block) for block in points.split(_CHUNK)])
    return torch.nn.functional.pad(density.view((resolution,) * 3), (1,) * 6).float().cpu()


def mesh_tensors(mesh: Any) -> tuple[Tensor, Tensor]:
    """Vertices (vertices, 3) float32 and faces (faces, 3) of a `trimesh.Trimesh`, for a `MeshScene`."""
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces, dtype=torch.long)


def tensors_mesh(vertices: Tensor, faces: Tensor, colours: Tensor | None = None) -> Any:
    """A `trimesh.Trimesh` of vertices (vertices, 3), faces (faces, 3) and colours (vertices, 3) in [0, 1].

    Raises:
        MissingExtraError: trimesh is not installed.
    """
    trimesh = _packages("a mesh")[1]
    shades = None if colours is None else (colours.detach().cpu() * 255).round().byte().numpy()
    return trimesh.Trimesh(vertices.detach().cpu().numpy(), faces.cpu().numpy(), vertex_colors=shades, process=False)


def write_mesh(mesh: Any, path: Path) -> None:
    """Writes a `trimesh.Trimesh` as .obj, .ply, .glb or .stl, by the name's ending.

    Raises:
        IncompatibleError: another ending.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in _FORMATS:
        raise IncompatibleError(f"a mesh cannot be written as '{path.name}'", f"endings: {', '.join(_FORMATS)}")
    content = mesh.export(file_type=kind)
    write_bytes(path, content.encode() if isinstance(content, str) else content)


def _packages(purpose: str) -> tuple[Any, Any]:
    try:
        from skimage import measure
    except ImportError as error:
        raise MissingExtraError("scikit-image", "scenes", purpose) from error
    try:
        import trimesh
    except ImportError as error:
        raise MissingExtraError("trimesh", "scenes", purpose) from error
    return measure, trimesh

"""The shipped scenes: fields, Gaussians, images and a mesh, each from plain arguments, with as many particles as asked.

Particles start different from each other, by a little noise from torch's global stream.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.options import OptionsBase
from limbeck.models.configs import (
    GaussianSceneConfig,
    HashSceneConfig,
    ImageSceneConfig,
    MeshSceneConfig,
    VoxelSceneConfig,
)
from limbeck.rendering.field_scene import FieldScene
from limbeck.rendering.fields import DensityBlob, HashField, RadianceField, VoxelField
from limbeck.rendering.gaussians import GaussianScene
from limbeck.rendering.images import ImageScene
from limbeck.rendering.meshes import MeshScene
from limbeck.rendering.particles import Particles
from limbeck.rendering.scene import DirectionBackground, Scene

Behind = Literal["white", "black", "gray", "trained"]
_COLOURS = {"white": 1.0, "black": 0.0, "gray": 0.5}


def background_of(kind: Behind) -> nn.Module | Tensor:
    """What is behind a scene: one colour, or a small network from directions to colours."""
    return DirectionBackground() if kind == "trained" else torch.full((3,), _COLOURS[kind])


class _Shipped(Particles):
    """Scenes that one configuration describes.

    Attributes:
        config: all constructor arguments as plain data; they rebuild the scenes.
    """

    def __init__(self, made: OptionsBase, build: Callable[[], Scene]) -> None:
        config: dict[str, Any] = made.model_dump()
        count = config["particles"]
        view = {name: config[name] for name in ("elevation", "distance", "fov")}
        super().__init__([build() for _ in range(count)], **view)
        self.config = config


def _field_scene(made: Any, field: RadianceField) -> FieldScene:
    return FieldScene(field, made.samples, made.resampled, background=background_of(made.background))


def _blob(made: Any) -> DensityBlob | None:
    return DensityBlob(made.blob, made.blob_radius) if made.blob else None


class VoxelScenes(_Shipped):
    """Voxel grids of density and colour; see `VoxelSceneConfig`."""

    def __init__(
        self,
        particles: int = 1,
        resolution: int = 24,
        samples: int = 48,
        resampled: int = 0,
        bound: float = 0.6,
        blob: float = 10.0,
        blob_radius: float = 0.5,
        noise: float = 0.1,
        background: Behind = "white",
        elevation: float = 17.5,
        distance: float = 1.25,
        fov: float = 55.0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        made = VoxelSceneConfig(**arguments)

        def build() -> Scene:
            field = VoxelField(made.resolution, made.bound, _blob(made))
            with torch.no_grad():
                field.grid.normal_(0, made.noise)
            return _field_scene(made, field)

        super().__init__(made, build)


class HashScenes(_Shipped):
    """Hashed feature grids with a small network; see `HashSceneConfig`."""

    def __init__(
        self,
        particles: int = 1,
        levels: int = 8,
        table: int = 15,
        base: int = 16,
        width: int = 32,
        samples: int = 64,
        resampled: int = 0,
        bound: float = 1.0,
        blob: float = 10.0,
        blob_radius: float = 0.5,
        background: Behind = "white",
        elevation: float = 17.5,
        distance: float = 1.25,
        fov: float = 55.0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        made = HashSceneConfig(**arguments)

        def build() -> Scene:
            field = HashField(
                made.levels,
                table=made.table,
                base=made.base,
                width=made.width,
                bound=made.bound,
                blob=_blob(made),
            )
            return _field_scene(made, field)

        super().__init__(made, build)


class GaussianScenes(_Shipped):
    """Balls of 3-D Gaussians; see `GaussianSceneConfig`."""

    def __init__(
        self,
        particles: int = 1,
        count: int = 256,
        radius: float = 0.5,
        opacity: float = 0.1,
        degree: int = 0,
        background: Behind = "white",
        elevation: float = 17.5,
        distance: float = 1.25,
        fov: float = 55.0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        made = GaussianSceneConfig(**arguments)

        def build() -> Scene:
            look: dict[str, Any] = {"opacity": made.opacity, "degree": made.degree}
            return GaussianScene.ball(made.count, made.radius, background=background_of(made.background), **look)

        super().__init__(made, build)


class MeshScenes(_Shipped):
    """Spheres of triangles, with a colour at each vertex; see `MeshSceneConfig`."""

    def __init__(
        self,
        particles: int = 1,
        subdivisions: int = 3,
        radius: float = 0.4,
        noise: float = 0.01,
        background: Behind = "white",
        elevation: float = 17.5,
        distance: float = 1.25,
        fov: float = 55.0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        made = MeshSceneConfig(**arguments)

        def build() -> Scene:
            vertices, faces = sphere(made.subdivisions)
            uneven = made.radius * (vertices + made.noise * torch.randn_like(vertices))
            return MeshScene(uneven, faces, background=background_of(made.background))

        super().__init__(made, build)


class ImageScenes(ImageScene):
    """Images that are particles themselves; see `ImageSceneConfig`.

    Attributes:
        config: all constructor arguments as plain data; `ImageScenes(**config)` rebuilds the images' shape.
    """

    def __init__(
        self,
        particles: int = 1,
        channels: int = 3,
        height: int = 32,
        width: int = 32,
        noise: float = 1.0,
        bounded: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        made = ImageSceneConfig(**arguments)
        start = made.noise * torch.randn(made.particles, made.channels, made.height, made.width)
        super().__init__(torch.sigmoid(start).clamp(1 / 512, 511 / 512) if made.bounded else start, made.bounded)
        self.config: dict[str, Any] = made.model_dump()


def sphere(subdivisions: int) -> tuple[Tensor, Tensor]:
    """Vertices (n, 3) on the unit sphere and faces (8 4^subdivisions, 3), from an octahedron."""
    axes = torch.eye(3)
    vertices = [*axes, *-axes]
    faces = [(0, 1, 2), (1, 3, 2), (3, 4, 2), (4, 0, 2), (1, 0, 5), (3, 1, 5), (4, 3, 5), (0, 4, 5)]
    for _ in range(subdivisions):
        middle: dict[tuple[int, int], int] = {}

        def between(one: int, other: int, middle: dict[tuple[int, int], int] = middle) -> int:
            key = (min(one, other), max(one, other))
            if key not in middle:
                middle[key] = len(vertices)
                vertices.append(nn.functional.normalize(vertices[one] + vertices[other], dim=0))
            return middle[key]

        finer = []
        for a, b, c in faces:
            ab, bc, ca = between(a, b), between(b, c), between(c, a)
            finer += [(a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca)]
        faces = finer
    return torch.stack(vertices), torch.tensor(faces)

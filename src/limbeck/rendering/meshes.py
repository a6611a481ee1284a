"""Triangle meshes as scenes, by casting rays, for refining geometry and texture after a field has found the shape."""

from collections.abc import Callable, Collection
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from limbeck.rendering.cameras import Cameras, Rays
from limbeck.rendering.scene import Background, Light, RenderOutput, Scene

Texture = Callable[[Tensor], Tensor]


class MeshScene(Scene):
    """A mesh with fixed triangles, trained vertices and a texture in space.

    Every pixel shows the nearest triangle that its ray meets. Depth, normals and colour inside the outline have exact
    gradients in the vertices; the outline itself has none (that would take a rasteriser with antialiasing, such as
    nvdiffrast). Cost: pixels times triangles, in pieces of bounded memory.

    Args:
        vertices: to start from, world units.
        faces: vertex indices, counter-clockwise as seen from outside.
        texture: colours (points, 3) in [0, 1] of surface points (points, 3), a module; None for a trained colour at
            each vertex, gray to begin with.
        fixed: keeps the vertices where they are, to train the texture alone.
        background: see `Scene`.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"normals", "faces"})
    faces: Int[Tensor, "faces 3"]

    def __init__(
        self,
        vertices: Float[Tensor, "vertices 3"],
        faces: Int[Tensor, "faces 3"],
        texture: Texture | None = None,
        fixed: bool = False,
        background: Background = None,
    ) -> None:
        super().__init__(background)
        self.vertices = nn.Parameter(vertices.detach().clone(), requires_grad=not fixed)
        self.register_buffer("faces", faces)
        self.texture = texture
        self.colour_logits = nn.Parameter(torch.zeros_like(vertices)) if texture is None else None

    def render(
        self,
        cameras: Cameras,
        background: Background = None,
        light: Light | None = None,
        time: Tensor | float | None = None,
        aux: Collection[str] = (),
    ) -> RenderOutput:
        """See `Scene.render`; normals are always made; "faces" in `aux` is each pixel's triangle, -1 for none."""
        self.check_aux(aux)
        rays = cameras.rays().flat()
        face = first_hits(self.vertices.detach(), self.faces, rays)
        hit = face >= 0
        corners = self.faces[face[hit]]
        distance, weights = meet(self.vertices[corners], rays.origins[hit], rays.directions[hit])
        points = rays.origins[hit] + distance[:, None] * rays.directions[hit]
        normals = functional.normalize((vertex_normals(self.vertices, self.faces)[corners] * weights).sum(1), dim=-1)
        if self.colour_logits is not None:
            colour = (torch.sigmoid(self.colour_logits)[corners] * weights).sum(1)
        else:
            assert self.texture is not None
            colour = self.texture(points)
        if light is not None:
            colour = light(colour, normals, points, rays.views[hit])
        found = torch.cat((colour, (distance * rays.cosine[hit])[:, None], torch.ones_like(points[:, :1]), normals), -1)
        seen = found.new_zeros(len(face), 8).index_put((hit.nonzero()[:, 0],), found)
        size = (len(cameras), cameras.height, cameras.width)
        colour, depth, opacity, normals = seen.unflatten(0, size).movedim(-1, 1).split((3, 1, 1, 3), 1)
        image = self.over_background(colour, cameras, opacity, background)
        return RenderOutput(image, depth, opacity, normals, {"faces": face.view(size)} if "faces" in aux else {})


def meet(
    triangles: Float[Tensor, "*rays 3 3"], origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"]
) -> tuple[Float[Tensor, "*rays"], Float[Tensor, "*rays 3 1"]]:
    """Distance to the plane of a triangle (corners, coordinates) along a ray, and barycentric weights there.

    A ray parallel to the plane gets infinite or undefined numbers, which compare false with everything.

    Source: Möller and Trumbore, *Fast, Minimum Storage Ray/Triangle Intersection*, 1997.
    """
    corner = triangles[..., 0, :]
    one, other = triangles[..., 1, :] - corner, triangles[..., 2, :] - corner
    offset = origins - corner
    across, along = torch.linalg.cross(directions, other), torch.linalg.cross(offset, one)
    volume = (one * across).sum(-1)
    second, third = (offset * across).sum(-1) / volume, (directions * along).sum(-1) / volume
    distance = (other * along).sum(-1) / volume
    return distance, torch.stack((1 - second - third, second, third), -1)[..., None]


@torch.no_grad()
def first_hits(
    vertices: Float[Tensor, "vertices 3"], faces: Int[Tensor, "faces 3"], rays: Rays, pairs: int = 2**20
) -> Int[Tensor, "rays"]:
    """The nearest triangle in front of each of a row of rays, -1 for none; `pairs` bounds what is held at a time."""
    triangles, piece, found = vertices[faces], max(1, pairs // len(faces)), []
    for start in range(0, len(rays.cosine), piece):
        part = rays[slice(start, start + piece)]
        size = (len(part.cosine), len(faces), 3)
        each = (part.origins[:, None].expand(size), part.directions[:, None].expand(size))
        distance, weights = meet(triangles.expand(*size, 3), *each)
        inside = (weights[..., 0] >= 0).all(-1) & (distance > 1e-6)
        nearest, face = torch.where(inside, distance, torch.inf).min(-1)
        found.append(torch.where(nearest.isinf(), -1, face))
    return torch.cat(found)


def face_normals(vertices: Float[Tensor, "vertices 3"], faces: Int[Tensor, "faces 3"]) -> Float[Tensor, "faces 3"]:
    """Outward normals of triangles, each as long as twice its area."""
    one, two, three = vertices[faces].unbind(1)
    return torch.linalg.cross(two - one, three - one)


def vertex_normals(vertices: Float[Tensor, "vertices 3"], faces: Int[Tensor, "faces 3"]) -> Float[Tensor, "vertices 3"]:
    """Unit normals at vertices: means of the adjacent triangles', weighted by area."""
    normals = face_normals(vertices, faces).repeat_interleave(3, 0)
    return functional.normalize(torch.zeros_like(vertices).index_add(0, faces.flatten(), normals), dim=-1)


def normal_consistency(vertices: Float[Tensor, "vertices 3"], faces: Int[Tensor, "faces 3"]) -> Float[Tensor, ""]:
    """Mean of 1 - cosine between the normals of triangles that share an edge; 0 for a plane, or without such edges."""
    unit = functional.normalize(face_normals(vertices, faces), dim=-1)
    edges, owner = _edges(faces)
    key, order = (edges[:, 0] * len(vertices) + edges[:, 1]).sort(stable=True)
    shared = key[1:] == key[:-1]
    one, other = owner[order[:-1][shared]], owner[order[1:][shared]]
    return (1 - (unit[one] * unit[other]).sum(-1)).sum() / max(1, len(one))


def laplacian(vertices: Float[Tensor, "vertices 3"], faces: Int[Tensor, "faces 3"]) -> Float[Tensor, ""]:
    """Mean distance of vertices from the mean of their neighbours, world units."""
    edges = _edges(faces)[0].unique(dim=0)
    both = torch.cat((edges, edges.flip(-1)))
    total = torch.zeros_like(vertices).index_add(0, both[:, 0], vertices[both[:, 1]])
    count = torch.bincount(both[:, 0], minlength=len(vertices)).clamp_min(1)
    offset = total / count[:, None] - vertices
    return (offset.square().sum(-1) + 1e-12).sqrt().mean()  # the root of 0 has no finite gradient


def _edges(faces: Int[Tensor, "faces 3"]) -> tuple[Int[Tensor, "edges 2"], Int[Tensor, "edges"]]:
    """The three edges of every triangle, smaller vertex first, and the triangle of each."""
    edges = torch.cat((faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]])).sort(-1).values
    return edges, torch.arange(len(faces), device=faces.device).repeat(3)

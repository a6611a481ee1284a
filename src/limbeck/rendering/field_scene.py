"""A radiance field as a scene, by quadrature along rays."""

from collections.abc import Collection
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from limbeck.rendering.cameras import Cameras, Rays
from limbeck.rendering.fields import RadianceField
from limbeck.rendering.scene import Background, Light, RenderOutput, Scene
from limbeck.rendering.volume import box_interval, composite, resample, stratified, uniform_edges


class FieldScene(Scene):
    """A radiance field seen by absorption and emission along each pixel's ray.

    In training mode a ray looks at a random place in each of its steps (torch's global stream), in evaluation mode at
    the middle. Cost: views x height x width x samples evaluations of the field, seven times that with normals; empty
    space is evaluated too (there is no occupancy grid).

    Args:
        field: density and colour.
        samples: equal steps through the field's cube.
        resampled: where positive, steps of a second pass of this many samples, placed by the weights of the first,
            which then has no gradient.
        near: distance from the camera at which rays begin, world units.
        background: see `Scene`.
        chunk: most samples whose intermediate values are held at a time; a larger rendering goes piece by piece, and
            in the backward pass each piece is computed again.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"normals", "weights"})

    def __init__(
        self,
        field: RadianceField,
        samples: int = 64,
        resampled: int = 0,
        near: float = 0.05,
        background: Background = None,
        chunk: int = 2**20,
    ) -> None:
        super().__init__(background)
        self.field = field
        self.samples, self.resampled, self.near, self.chunk = samples, resampled, near, chunk

    def render(
        self,
        cameras: Cameras,
        background: Background = None,
        light: Light | None = None,
        time: Tensor | float | None = None,
        aux: Collection[str] = (),
    ) -> RenderOutput:
        """See `Scene.render`; `aux` may name "normals" and "weights" (views, samples, height, width)."""
        self.check_aux(aux)
        rays = cameras.rays().flat()
        place = self._places(rays)
        piece = max(1, self.chunk // place[0].shape[-1])
        normals = light is not None or "normals" in aux
        parts = []
        for start in range(0, len(rays.cosine), piece):
            part = slice(start, start + piece)
            inputs = (rays[part], place[0][part], place[1][part], light, normals)
            whole = piece >= len(rays.cosine) or not torch.is_grad_enabled()
            parts.append(self._march(*inputs) if whole else checkpoint(self._march, *inputs, use_reentrant=False))
        size = (len(cameras), cameras.height, cameras.width)
        colour, depth, opacity, normal, weights = (
            torch.cat(part).unflatten(0, size).movedim(-1, 1) for part in zip(*parts, strict=True)
        )
        image = self.over_background(colour, cameras, opacity, background)
        asked = {"weights": weights} if "weights" in aux else {}
        return RenderOutput(image, depth, opacity, normal if normals else None, asked)

    def _places(self, rays: Rays) -> tuple[Tensor, Tensor]:
        """Distances (rays, samples) at which to look, and the lengths of their steps."""
        near, far = box_interval(rays.origins, rays.directions, self.field.bound, self.near)
        edges = uniform_edges(near, far, self.samples)
        if self.resampled:
            with torch.no_grad():
                distance = stratified(edges, self.training)
                points = rays.origins[:, None] + rays.directions[:, None] * distance[..., None]
                blocks = points.reshape(-1, 3).split(self.chunk)
                density = torch.cat([self.field.density(block) for block in blocks]).view_as(distance)
                edges = resample(edges, composite(density * edges.diff())[0], self.resampled)
        return stratified(edges, self.training), edges.diff()

    def _march(
        self,
        rays: Rays,
        distance: Float[Tensor, "rays samples"],
        step: Float[Tensor, "rays samples"],
        light: Light | None,
        normals: bool,
    ) -> tuple[Tensor, ...]:
        """Colour (rays, 3), depth (rays, 1), opacity (rays, 1), normals (rays, 3 or 0), weights (rays, samples)."""
        points = (rays.origins[:, None] + rays.directions[:, None] * distance[..., None]).flatten(0, 1)
        density, colour = self.field(points)
        weights, left = composite(density.view_as(distance) * step)
        normal = self.field.normals(points) if normals else points.new_zeros(len(points), 0)
        if light is not None:
            colour = light(colour, normal, points, rays.views.repeat_interleave(distance.shape[1]))
        channels = torch.cat((colour, normal), -1).unflatten(0, distance.shape)
        seen = torch.einsum("rs,rsc->rc", weights, channels)
        opacity = 1 - left[:, None]
        depth = (weights * distance).sum(-1, keepdim=True) * rays.cosine[:, None] / opacity.clamp_min(1e-6)
        return seen[:, :3], depth, opacity, functional.normalize(seen[:, 3:], dim=-1, eps=1e-3), weights

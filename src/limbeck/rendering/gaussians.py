"""A cloud of 3-D Gaussians as a scene."""

import math
from collections.abc import Collection
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from limbeck.rendering.cameras import Cameras
from limbeck.rendering.scene import Background, Light, RenderOutput, Scene
from limbeck.rendering.splatting import Gaussians, Rasterizer, rasterize


class GaussianScene(Scene):
    """Gaussians of fixed number, blended from front to back; any parameters of the optimizer keep them valid.

    Densification and pruning would change the parameters' shapes under the optimizer and are not offered; `centres`
    and `radii` in `aux` are what they would need.

    Args:
        means: (n, 3) in world units.
        scales: (n, 3) standard deviations, positive.
        colours: (n, 3) in [0, 1].
        opacity: of every Gaussian, in (0, 1).
        degree: of the spherical harmonics, 0 (same colour from everywhere) or 1.
        background: see `Scene`.
        rasterizer: blends; plain torch unless given. `limbeck.models.adapters.gsplat` holds one for CUDA.

    Source: Kerbl et al., *3D Gaussian Splatting for Real-Time Radiance Field Rendering*, 2023, arXiv 2308.04079.
    """

    offers: ClassVar[frozenset[str]] = frozenset({"normals", "centres", "radii", "scales"})

    def __init__(
        self,
        means: Float[Tensor, "n 3"],
        scales: Float[Tensor, "n 3"],
        colours: Float[Tensor, "n 3"],
        opacity: float = 0.1,
        degree: int = 0,
        background: Background = None,
        rasterizer: Rasterizer = rasterize,
    ) -> None:
        super().__init__(background)
        if degree not in (0, 1):
            raise ValueError(f"degree must be 0 or 1, got {degree}")
        self.rasterizer = rasterizer
        self.means = nn.Parameter(means.detach().clone())
        self.log_scales = nn.Parameter(scales.log())
        self.quaternions = nn.Parameter(functional.pad(torch.ones_like(means[:, :1]), (0, 3)))
        self.opacity_logits = nn.Parameter(torch.full_like(means[:, 0], math.log(opacity / (1 - opacity))))
        flat = (colours - 0.5)[:, None] * math.sqrt(4 * math.pi)
        self.harmonics = nn.Parameter(functional.pad(flat, (0, 0, 0, 3 * degree)))

    @classmethod
    def ball(
        cls, count: int, radius: float = 0.5, generator: torch.Generator | None = None, **options: object
    ) -> "GaussianScene":
        """Gray Gaussians spread evenly at random through a ball, each about as wide as its share of the volume."""
        device = generator.device if generator is not None else None
        draw = torch.randn(count, 3, generator=generator, device=device)
        depth = torch.rand(count, 1, generator=generator, device=device).pow(1 / 3)
        means = radius * depth * functional.normalize(draw, dim=-1)
        scales = torch.full_like(means, radius * count ** (-1 / 3))
        return cls(means, scales, torch.full_like(means, 0.5), **options)  # type: ignore[arg-type]

    def gaussians(self, time: Tensor | float | None = None) -> Gaussians:
        """The Gaussians at a time; here the same at any. A scene that moves overrides this."""
        return Gaussians(
            self.means, self.log_scales.exp(), self.quaternions, torch.sigmoid(self.opacity_logits), self.harmonics
        )

    def render(
        self,
        cameras: Cameras,
        background: Background = None,
        light: Light | None = None,
        time: Tensor | float | None = None,
        aux: Collection[str] = (),
    ) -> RenderOutput:
        """See `Scene.render`; `aux` may name "normals", "centres", "radii" (of `Raster`) and "scales" (n, 3)."""
        self.check_aux(aux)
        gaussians = self.gaussians(time)
        colour, normals = gaussians.colours(cameras), None
        if light is not None or "normals" in aux:
            normals = gaussians.normals(cameras)
        if light is not None and normals is not None:
            views = torch.arange(len(cameras), device=colour.device).repeat_interleave(colour.shape[1])
            points = gaussians.means.repeat(len(cameras), 1)
            colour = light(colour.flatten(0, 1), normals.flatten(0, 1), points, views).view_as(colour)
        depth = -cameras.local(gaussians.means)[..., 2:]
        channels = [colour, depth] if normals is None else [colour, depth, normals]
        raster = self.rasterizer(gaussians, torch.cat(channels, -1), cameras)
        if "centres" in aux and raster.centres.requires_grad:
            raster.centres.retain_grad()
        image = self.over_background(raster.values[:, :3], cameras, raster.opacity, background)
        seen = None if normals is None else functional.normalize(raster.values[:, 4:], dim=1, eps=1e-3)
        known = {"centres": raster.centres, "radii": raster.radii, "scales": gaussians.scales}
        asked = {name: value for name, value in known.items() if name in aux}
        return RenderOutput(image, raster.values[:, 3:4] / raster.opacity.clamp_min(1e-6), raster.opacity, seen, asked)

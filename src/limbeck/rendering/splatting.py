"""3-D Gaussians on the image plane: projection, and blending from front to back in plain torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from limbeck.rendering.cameras import Cameras
from limbeck.rendering.volume import composite

BLUR = 0.3  # variance in squared pixels that is added to every projected Gaussian, so that none falls between pixels
NEAR = 0.01  # world units
CUTOFF = 1 / 255  # an opacity below this is taken for 0
_MOST_OPAQUE = 0.999
_TILE = 16  # pixels
_HELD = 2**22  # pairs of pixel and Gaussian above which tiles are blended again in the backward pass, not remembered


@dataclass(frozen=True)
class Gaussians:
    """Gaussians in space, activations applied.

    Attributes:
        means: world units.
        scales: standard deviations along the own axes, positive, world units.
        quaternions: rotations (w, x, y, z) of the own axes, of any length but 0.
        opacities: at the centre, in [0, 1].
        harmonics: colour coefficients, of degree 0 (1) or 1 (4).
    """

    means: Float[Tensor, "n 3"]
    scales: Float[Tensor, "n 3"]
    quaternions: Float[Tensor, "n 4"]
    opacities: Float[Tensor, "n"]
    harmonics: Float[Tensor, "n basis 3"]

    def covariances(self) -> Float[Tensor, "n 3 3"]:
        """Covariance matrices in world axes."""
        axes = rotation_matrices(self.quaternions) * self.scales[:, None]
        return axes @ axes.mT

    def normals(self, cameras: Cameras) -> Float[Tensor, "views n 3"]:
        """The axis of the smallest scale, turned towards each camera."""
        shortest = self.scales.argmin(-1)[:, None, None].expand(-1, 3, 1)
        axis = rotation_matrices(self.quaternions).gather(2, shortest)[..., 0]
        facing = ((cameras.position[:, None] - self.means) * axis).sum(-1, keepdim=True)
        return torch.where(facing < 0, -axis, axis)

    def colours(self, cameras: Cameras) -> Float[Tensor, "views n 3"]:
        """Colours in [0, 1] as each camera sees them."""
        directions = functional.normalize(self.means - cameras.position[:, None], dim=-1)
        flat = self.harmonics[:, 0].mul(math.sqrt(1 / (4 * math.pi))).expand(len(cameras), -1, -1)
        if self.harmonics.shape[1] == 1:
            return (0.5 + flat).clamp(0, 1)
        signs = directions.new_tensor([-1.0, 1.0, -1.0])  # of the real harmonics y, z, x
        basis = math.sqrt(3 / (4 * math.pi)) * signs * directions[..., [1, 2, 0]]
        return (0.5 + flat + torch.einsum("vnk,nkc->vnc", basis, self.harmonics[:, 1:])).clamp(0, 1)


@dataclass(frozen=True)
class Splats:
    """Gaussians projected onto image planes.

    Attributes:
        centres: pixel coordinates (x from the left, y from the top).
        covariances: squared pixels, `BLUR` included.
        depths: along the viewing axis, world units.
        visible: in front of the camera.
    """

    centres: Float[Tensor, "views n 2"]
    covariances: Float[Tensor, "views n 2 2"]
    depths: Float[Tensor, "views n"]
    visible: Bool[Tensor, "views n"]


@dataclass(frozen=True)
class Raster:
    """Blended values of Gaussians, their total opacity, and where they fell.

    Attributes:
        values: sums of value times weight.
        opacity: sum of weights, in [0, 1].
        centres: pixel coordinates; gradients pass through it, so that `retain_grad` sees them.
        radii: three standard deviations along the longer axis in pixels, 0 where not visible; without gradient.
    """

    values: Float[Tensor, "views channels height width"]
    opacity: Float[Tensor, "views 1 height width"]
    centres: Float[Tensor, "views n 2"]
    radii: Float[Tensor, "views n"]


# (gaussians, values (views, n, channels), cameras) -> Raster
Rasterizer = Callable[[Gaussians, Tensor, Cameras], Raster]


def rotation_matrices(quaternions: Float[Tensor, "n 4"]) -> Float[Tensor, "n 3 3"]:
    """Rotations of quaternions (w, x, y, z), which are normalised first."""
    w, x, y, z = functional.normalize(quaternions, dim=-1).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def project_gaussians(gaussians: Gaussians, cameras: Cameras) -> Splats:
    """Elliptical weighted averages: a Gaussian seen through the camera's map, linearised at its mean.

    ``S' = J R S R^T J^T + BLUR I``. For the Jacobian J alone, means far outside the image are moved to 1.3 times its
    half-width, where the linearisation still holds.

    Source: Zwicker et al., *EWA Splatting*, 2002; Kerbl et al., *3D Gaussian Splatting*, 2023, arXiv 2308.04079.
    """
    flip = gaussians.means.new_tensor([1.0, -1.0, -1.0])  # image axes: y down, z into the scene
    rotation = flip[:, None] * cameras.camera_from_world[:, None, :3, :3]
    x, y, z = (cameras.local(gaussians.means) * flip).unbind(-1)
    visible, z = z > NEAR, z.clamp_min(NEAR)
    focal = cameras.focal[:, None]
    centres = torch.stack((cameras.width / 2 + focal * x / z, cameras.height / 2 + focal * y / z), -1)
    limits = (0.65 * cameras.width / focal, 0.65 * cameras.height / focal)
    slope_x, slope_y = ((side / z).clamp(-limit, limit) for side, limit in zip((x, y), limits, strict=True))
    zero = torch.zeros_like(z)
    rows = torch.stack((torch.ones_like(z), zero, -slope_x, zero, torch.ones_like(z), -slope_y), -1)
    jacobian = (focal / z)[..., None, None] * rows.unflatten(-1, (2, 3)) @ rotation
    blur = BLUR * torch.eye(2, device=z.device, dtype=z.dtype)
    return Splats(centres, jacobian @ gaussians.covariances() @ jacobian.mT + blur, z, visible)


def rasterize(
    gaussians: Gaussians, values: Float[Tensor, "views n channels"], cameras: Cameras, cutoff: float = CUTOFF
) -> Raster:
    """Blends the values of Gaussians at every pixel, nearest first; their order in the tensors does not matter.

    Cost: pixels times the Gaussians that reach their tile of 16 x 16. What is kept for the backward pass is bounded:
    large renderings are blended again there, tile by tile.
    """
    splats = project_gaussians(gaussians, cameras)
    blended = torch.stack(
        [_blend_view(splats, view, gaussians.opacities, values[view], cameras, cutoff) for view in range(len(cameras))]
    )
    half_trace = splats.covariances.detach().diagonal(dim1=-2, dim2=-1).mean(-1)
    spread = (half_trace.square() - torch.linalg.det(splats.covariances.detach())).clamp_min(0).sqrt()
    radii = 3 * (half_trace + spread).sqrt() * splats.visible
    return Raster(blended[:, :-1], blended[:, -1:], splats.centres, radii)


def _blend_view(
    splats: Splats, view: int, opacities: Tensor, values: Tensor, cameras: Cameras, cutoff: float
) -> Float[Tensor, "channels height width"]:
    """One image of the values, and of the opacity as last channel."""
    centres, covariance = splats.centres[view], splats.covariances[view]
    xx, xy, yy = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    conics = torch.stack((yy, -xy, xx), -1) / (xx * yy - xy * xy)[:, None]
    tiles = [
        (top, left, min(top + _TILE, cameras.height), min(left + _TILE, cameras.width))
        for top in range(0, cameras.height, _TILE)
        for left in range(0, cameras.width, _TILE)
    ]
    members = _members(splats, view, opacities.detach(), tiles, cutoff)
    costly = torch.is_grad_enabled() and sum(map(len, members)) * _TILE**2 > _HELD
    image = []
    for tile, chosen in zip(tiles, members, strict=True):
        inputs = (tile, centres[chosen], conics[chosen], opacities[chosen], values[chosen], cutoff)
        image.append(checkpoint(_blend_tile, *inputs, use_reentrant=False) if costly else _blend_tile(*inputs))
    across = math.ceil(cameras.width / _TILE)
    return torch.cat([torch.cat(image[start : start + across], -1) for start in range(0, len(image), across)], -2)


def _members(
    splats: Splats, view: int, opacities: Tensor, tiles: list[tuple[int, int, int, int]], cutoff: float
) -> list[Tensor]:
    """Indices of the Gaussians that reach each tile, nearest first."""
    centres, variances = splats.centres[view].detach(), splats.covariances[view].detach().diagonal(dim1=-2, dim2=-1)
    # Beyond this many standard deviations along an axis of the image the opacity is below the cutoff.
    reach = (2 * (opacities / cutoff).clamp_min(1).log()).sqrt() if cutoff else torch.full_like(opacities, math.inf)
    extent = reach[:, None] * variances.sqrt()
    order = splats.depths[view].detach().argsort(stable=True)
    order = order[(splats.visible[view] & (opacities > cutoff))[order]]
    left, top = (centres - extent)[order].unbind(-1)
    right, bottom = (centres + extent)[order].unbind(-1)
    return [order[(bottom > a) & (right > b) & (top < c) & (left < d)] for a, b, c, d in tiles]


def _blend_tile(
    tile: tuple[int, int, int, int],
    centres: Float[Tensor, "m 2"],
    conics: Float[Tensor, "m 3"],
    opacities: Float[Tensor, "m"],
    values: Float[Tensor, "m channels"],
    cutoff: float,
) -> Tensor:
    """Values and opacity (channels + 1, rows, columns) of a tile; conics: (xx, xy, yy) of the inverse covariances."""
    top, left, bottom, right = tile
    y = torch.arange(top, bottom, device=centres.device, dtype=centres.dtype) + 0.5 - centres[:, 1:]
    x = torch.arange(left, right, device=centres.device, dtype=centres.dtype) + 0.5 - centres[:, :1]
    xx, xy, yy = conics[..., None].unbind(1)
    # Of the three terms of the exponent only the mixed one needs every pair of row and column.
    mixed = torch.einsum("mr,mc->mrc", xy * y, x)
    exponent = (0.5 * yy * y * y)[:, :, None] + (0.5 * xx * x * x)[:, None, :] + mixed
    alpha = (opacities[:, None, None] * torch.exp(-exponent)).clamp(max=_MOST_OPAQUE)
    alpha = torch.where(alpha < cutoff, torch.zeros_like(alpha), alpha)
    weights, left_over = composite(-torch.log1p(-alpha).permute(1, 2, 0))
    return torch.cat((torch.einsum("rcm,mk->krc", weights, values), 1 - left_over[None]))

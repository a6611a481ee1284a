"""gsplat's CUDA rasteriser behind the interface of the one in plain torch."""

from importlib.util import find_spec

import torch
from torch import Tensor

from limbeck.core.errors import MissingExtraError
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.splatting import BLUR, NEAR, Gaussians, Raster, rasterize


def fastest(gaussians: Gaussians, values: Tensor, cameras: Cameras) -> Raster:
    """A `Rasterizer`: gsplat for tensors on CUDA where it is installed, plain torch otherwise."""
    if gaussians.means.is_cuda and find_spec("gsplat"):
        return rasterize_gsplat(gaussians, values, cameras)
    return rasterize(gaussians, values, cameras)


def rasterize_gsplat(gaussians: Gaussians, values: Tensor, cameras: Cameras) -> Raster:
    """Blends values (views, n, channels) with gsplat; float32, on CUDA.

    It differs from plain torch where a pixel is all but opaque (it stops at a transmittance of 1e-4) and beyond 3.33
    standard deviations (nothing is drawn). It gives no gradient in the focal lengths.

    Raises:
        MissingExtraError: gsplat is not installed.
    """
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise MissingExtraError("gsplat", "scenes", "splatting on the GPU") from error
    blended, opacity, info = rasterization(
        means=gaussians.means,
        quats=gaussians.quaternions,
        scales=gaussians.scales,
        opacities=gaussians.opacities,
        colors=values,
        viewmats=image_from_world(cameras),
        Ks=intrinsics(cameras),
        width=cameras.width,
        height=cameras.height,
        near_plane=NEAR,
        eps2d=BLUR,
        packed=False,
    )
    radii = info["radii"].float()
    radii = radii.amax(-1) if radii.ndim == 3 else radii  # newer versions give one along each axis
    return Raster(blended.permute(0, 3, 1, 2), opacity.permute(0, 3, 1, 2), info["means2d"], radii)


def image_from_world(cameras: Cameras) -> Tensor:
    """Poses (views, 4, 4) into image axes: x right, y down, z into the scene."""
    flip = cameras.focal.new_tensor([1.0, -1.0, -1.0, 1.0])
    return flip[:, None] * cameras.camera_from_world


def intrinsics(cameras: Cameras) -> Tensor:
    """Calibration matrices (views, 3, 3), in pixels."""
    matrices = torch.zeros(len(cameras), 3, 3, device=cameras.focal.device, dtype=cameras.focal.dtype)
    matrices[:, 0, 0] = matrices[:, 1, 1] = cameras.focal
    matrices[:, 0, 2], matrices[:, 1, 2], matrices[:, 2, 2] = cameras.width / 2, cameras.height / 2, 1.0
    return matrices

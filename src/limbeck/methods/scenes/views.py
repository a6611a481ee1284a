"""What a step looks at: cameras drawn for each item, what a prompt says of a view, and poses as networks see them."""

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition
from limbeck.rendering.cameras import CameraRanges, Cameras, view_weights
from limbeck.rendering.particles import Backdrops

NAMES = ("front", "side", "back", "overhead")
"""Views that prompts and labels tell apart."""

ViewPrompts = Literal["none", "named", "blended"]
PoseInput = Literal["pose", "projection", "none"]


def draw_cameras(draws: ItemNoise, ranges: CameraRanges, height: int, width: int) -> Cameras:
    """A camera for each item, uniform within the ranges."""
    unit = torch.stack([draws.uniform(name) for name in ("azimuth", "elevation", "distance", "fov")])
    return ranges.at(unit, height, width)


def draw_backdrops(draws: ItemNoise, rate: float) -> Backdrops:
    """A random colour for each item, which counts for a share of them."""
    colours = torch.stack([draws.uniform(f"backdrop {channel}") for channel in "rgb"], 1)
    return Backdrops(colours, draws.uniform("backdrop") < rate)


def view_shares(cameras: Cameras, kind: ViewPrompts, overhead: float = 60.0) -> Tensor:
    """How much each of `NAMES` says about each view (views, 4), adding up to 1.

    "named" gives all to one, by 45 degrees to either side of the front and of the back and by the elevation above which
    a view is overhead; "blended" goes linearly from the front over the side to the back.
    """
    turned = cameras.azimuth.abs()
    if kind == "blended":
        return torch.cat([view_weights(cameras.azimuth), torch.zeros_like(turned)[:, None]], 1)
    is_above, is_front, is_back = cameras.elevation > overhead, turned <= 45, turned >= 135
    level = torch.stack([is_front, ~is_front & ~is_back, is_back], 1) & ~is_above[:, None]
    return torch.cat([level, is_above[:, None]], 1).to(turned)


def prompt_of_view(batch: Batch, condition: Condition, shares: Tensor) -> Condition:
    """The condition with its prompt replaced by what the batch holds for the views, mixed by their shares (items, 4).

    A batch with view prompts holds `prompt_front`, `prompt_side`, `prompt_back` and `prompt_overhead` besides `prompt`,
    and likewise for `pooled`.
    """
    found: dict[str, Tensor] = {}
    for name in condition.keys() & {"prompt", "pooled"}:
        rows = torch.stack([batch[f"{name}_{view}"] for view in NAMES], 1)
        weight = shares.to(rows).view(*shares.shape, *[1] * (rows.ndim - 2))
        found[name] = (weight * rows).sum(1)
    return {**condition, **found}


def label_of_view(labels: list[int], shares: Tensor) -> Tensor:
    """One of the labels an item (items,): of front, side, back and, where there are four, overhead."""
    known = torch.tensor([*labels, *labels[1:2]][: len(NAMES)], device=shares.device)  # overhead looks like the side
    return known[shares.argmax(1)]


def pose_numbers(cameras: Cameras | None, kind: PoseInput, near: float = 0.1, far: float = 100.0) -> Tensor | None:
    """What a network is told of cameras (views, 16): the pose, or the projection to the image; None for no cameras."""
    if cameras is None or kind == "none":
        return None
    if kind == "pose":
        return cameras.world_from_camera.flatten(1)
    projection = cameras.focal.new_zeros(len(cameras), 4, 4)
    projection[:, 0, 0], projection[:, 1, 1] = 2 * cameras.focal / cameras.width, 2 * cameras.focal / cameras.height
    projection[:, 2, 2], projection[:, 2, 3] = (far + near) / (near - far), 2 * far * near / (near - far)
    projection[:, 3, 2] = -1.0
    return (projection @ cameras.camera_from_world).flatten(1)

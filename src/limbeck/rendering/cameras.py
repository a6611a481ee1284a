"""Pinhole cameras: poses, rays, projection, samplers, and the names of views for prompts.

World: z up; azimuth 0 looks at the front from +x and grows towards +y. Camera: x right, y up, looking along -z. Angles
are in degrees, images have square pixels, the principal point at their centre, and pixel centres at half-integers.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

Range = tuple[float | int, float | int]


@dataclass(frozen=True)
class Rays:
    """One ray a pixel.

    Attributes:
        origins: where each ray starts, world units.
        directions: unit vectors.
        cosine: depth along the viewing axis per unit of distance along the ray, in (0, 1].
        views: index of each ray's camera.
    """

    origins: Float[Tensor, "*rays 3"]
    directions: Float[Tensor, "*rays 3"]
    cosine: Float[Tensor, "*rays"]
    views: Int[Tensor, "*rays"]

    def flat(self) -> "Rays":
        """The same rays in one row, view by view, line by line."""
        return Rays(
            self.origins.reshape(-1, 3), self.directions.reshape(-1, 3), self.cosine.flatten(), self.views.flatten()
        )

    def __getitem__(self, part: slice) -> "Rays":
        return Rays(self.origins[part], self.directions[part], self.cosine[part], self.views[part])


@dataclass(frozen=True)
class Cameras:
    """A batch of pinhole cameras of one image size.

    Attributes:
        world_from_camera: rigid poses; the last column is the camera's position.
        focal: focal lengths in pixels, positive; may require gradients.
        height: pixels.
        width: pixels.
    """

    world_from_camera: Float[Tensor, "views 4 4"]
    focal: Float[Tensor, "views"]
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.focal)

    def __getitem__(self, views: slice | list[int] | Tensor) -> "Cameras":
        return replace(self, world_from_camera=self.world_from_camera[views], focal=self.focal[views])

    def to(self, target: torch.device | torch.dtype | str) -> "Cameras":
        """The same cameras on another device or in another precision."""
        return replace(self, world_from_camera=self.world_from_camera.to(target), focal=self.focal.to(target))

    def resized(self, height: int, width: int) -> "Cameras":
        """The same vertical field of view at another image size."""
        return replace(self, focal=self.focal * (height / self.height), height=height, width=width)

    @property
    def position(self) -> Float[Tensor, "views 3"]:
        """Where the cameras stand."""
        return self.world_from_camera[:, :3, 3]

    @property
    def camera_from_world(self) -> Float[Tensor, "views 4 4"]:
        """The inverse poses."""
        inverse = self.world_from_camera.clone()
        inverse[:, :3, :3] = self.world_from_camera[:, :3, :3].mT
        inverse[:, :3, 3:] = -(inverse[:, :3, :3] @ self.world_from_camera[:, :3, 3:])
        return inverse

    @property
    def fov(self) -> Float[Tensor, "views"]:
        """Vertical field of view in degrees."""
        return torch.rad2deg(2 * torch.atan(self.height / (2 * self.focal)))

    @property
    def distance(self) -> Float[Tensor, "views"]:
        """Distance from the origin of the world."""
        return self.position.norm(dim=-1)

    @property
    def azimuth(self) -> Float[Tensor, "views"]:
        """Degrees in (-180, 180] about the vertical axis through the origin; 0 is the front, +x."""
        return torch.rad2deg(torch.atan2(self.position[:, 1], self.position[:, 0]))

    @property
    def elevation(self) -> Float[Tensor, "views"]:
        """Degrees in [-90, 90] above the horizon, as seen from the origin."""
        return torch.rad2deg(torch.atan2(self.position[:, 2], self.position[:, :2].norm(dim=-1)))

    def rays(self) -> Rays:
        """The rays (views, height, width) through the pixels' centres."""
        x = torch.arange(self.width, device=self.focal.device, dtype=self.focal.dtype) + 0.5 - self.width / 2
        y = self.height / 2 - torch.arange(self.height, device=self.focal.device, dtype=self.focal.dtype) - 0.5
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) / self.focal[:, None, None, None]
        local = functional.pad(grid, (0, 1), value=-1.0)
        directions = torch.einsum("vij,vhwj->vhwi", self.world_from_camera[:, :3, :3], local)
        length = local.norm(dim=-1)
        views = torch.arange(len(self), device=self.focal.device)[:, None, None].expand(length.shape)
        origins = self.position[:, None, None].expand(directions.shape)
        return Rays(origins, directions / length[..., None], 1 / length, views)

    def local(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "views points 3"]:
        """Points in each camera's axes; what is in front has negative z."""
        pose = self.camera_from_world
        return torch.einsum("vij,nj->vni", pose[:, :3, :3], points) + pose[:, None, :3, 3]

    def project(
        self, points: Float[Tensor, "points 3"]
    ) -> tuple[Float[Tensor, "views points 2"], Float[Tensor, "views points"]]:
        """Pixel coordinates (x from the left, y from the top) and depth along the viewing axis of world points."""
        x, y, z = self.local(points).unbind(-1)
        scale = self.focal[:, None] / -z
        return torch.stack((self.width / 2 + scale * x, self.height / 2 - scale * y), -1), -z


def look_at(
    eye: Float[Tensor, "views 3"], target: Float[Tensor, "... 3"], up: Float[Tensor, "... 3"] | None = None
) -> Float[Tensor, "views 4 4"]:
    """Poses of cameras at `eye` that look at `target`, with `up` (default +z) upwards in the image.

    Where the view is parallel to `up`, the world's +x is upwards instead.
    """
    up = eye.new_tensor([0.0, 0.0, 1.0]) if up is None else up
    back = functional.normalize(eye - target, dim=-1)
    right = torch.linalg.cross(up.expand_as(back), back)
    spare = torch.linalg.cross(back.new_tensor([1.0, 0.0, 0.0]).expand_as(back), back)
    right = functional.normalize(torch.where(right.norm(dim=-1, keepdim=True) < 1e-6, spare, right), dim=-1)
    rotation = torch.stack((right, torch.linalg.cross(back, right), back, eye), -1)
    last = eye.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(eye), 1, 4)
    return torch.cat((rotation, last), 1)


def orbit(
    azimuth: Float[Tensor, "views"],
    elevation: Float[Tensor, "..."],
    distance: Float[Tensor, "..."],
    fov: Float[Tensor, "..."],
    height: int,
    width: int,
) -> Cameras:
    """Cameras on spheres about the origin that look at it; angles in degrees, `fov` vertical, in (0, 180)."""
    around, above = torch.deg2rad(azimuth), torch.deg2rad(elevation).expand_as(azimuth)
    level = torch.stack((around.cos(), around.sin(), torch.zeros_like(around)), -1)
    vertical = level.new_tensor([0.0, 0.0, 1.0])
    outwards = above.cos()[:, None] * level + above.sin()[:, None] * vertical
    upwards = above.cos()[:, None] * vertical - above.sin()[:, None] * level  # defined at the poles too
    pose = look_at(outwards * distance.expand_as(azimuth)[:, None], torch.zeros_like(outwards), upwards)
    focal = height / (2 * torch.tan(torch.deg2rad(fov) / 2))
    return Cameras(pose, focal.expand_as(azimuth), height, width)


def turntable(
    views: int, height: int, width: int, elevation: float = 15.0, distance: float = 2.5, fov: float = 40.0
) -> Cameras:
    """One turn about the object in equal steps, starting at the front."""
    azimuth = torch.arange(views) * (360.0 / views)
    return orbit(azimuth, torch.tensor(elevation), torch.tensor(distance), torch.tensor(fov), height, width)


@dataclass(frozen=True)
class CameraRanges:
    """Ranges (low, high) from which cameras are drawn uniformly.

    Attributes:
        azimuth: degrees.
        elevation: degrees within [-90, 90].
        distance: world units, positive.
        fov: vertical field of view, degrees within (0, 180).

    Raises:
        ValueError: low above high, or a value outside its limits.
    """

    azimuth: Range = (-180.0, 180.0)
    elevation: Range = (-10.0, 45.0)
    distance: Range = (1.0, 1.5)
    fov: Range = (40.0, 70.0)

    def __post_init__(self) -> None:
        limits = {"azimuth": (-360, 360), "elevation": (-90, 90), "distance": (1e-6, 1e6), "fov": (1e-3, 179.9)}
        for name, (lowest, highest) in limits.items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(f"{name} needs {lowest} <= low <= high <= {highest}, got ({low}, {high})")

    def sample(self, views: int, height: int, width: int, generator: torch.Generator | None = None) -> Cameras:
        """Random cameras that look at the origin, on the generator's device; torch's global stream where it is None."""
        device = generator.device if generator is not None else None
        return self.at(torch.rand(4, views, generator=generator, device=device), height, width)

    def at(self, unit: Float[Tensor, "4 views"], height: int, width: int) -> Cameras:
        """Cameras that look at the origin; azimuth, elevation, distance and fov lie at these shares of their ranges."""
        ranges = unit.new_tensor([self.azimuth, self.elevation, self.distance, self.fov])
        azimuth, elevation, distance, fov = torch.lerp(ranges[:, :1], ranges[:, 1:], unit)
        return orbit(azimuth, elevation, distance, fov, height, width)


def view_names(cameras: Cameras, overhead: float = 60.0, front: float = 45.0) -> list[str]:
    """ "overhead", "front", "back" or "side" for each camera, to be put into prompts ("…, side view").

    Args:
        cameras: cameras about an object at the origin whose front faces +x.
        overhead: elevation in degrees above which a view is overhead.
        front: largest azimuth in degrees, to either side, of a front view; and of a back view, from behind.
    """
    names = []
    for azimuth, elevation in zip(cameras.azimuth.abs().tolist(), cameras.elevation.tolist(), strict=True):
        level = "front" if azimuth <= front else "back" if azimuth >= 180 - front else "side"
        names.append("overhead" if elevation > overhead else level)
    return names


def view_weights(azimuth: Float[Tensor, "views"]) -> Float[Tensor, "views 3"]:
    """Weights of the front, side and back prompts' embeddings, linear in the azimuth (degrees within [-180, 180])."""
    turned = azimuth.abs() / 90
    front, back = (1 - turned).clamp_min(0), (turned - 1).clamp_min(0)
    return torch.stack((front, 1 - front - back, back), -1)

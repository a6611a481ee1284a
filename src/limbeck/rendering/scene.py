"""The interface of everything that can be rendered, and what a rendering holds."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.rendering.cameras import Cameras

Background = Tensor | Callable[[Tensor], Tensor] | None
# (albedo (points, 3), unit normals (points, 3), positions (points, 3), camera of each point (points,)) -> colour.
Light = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RenderOutput:
    """Images of a scene, differentiable in the scene's parameters.

    Attributes:
        image: colours in [0, 1] over the background; an `ImageScene` may hold latents of any range and channels.
        depth: mean depth along the viewing axis of what is seen, world units; 0 where nothing is.
        opacity: share of the background that is hidden, in [0, 1].
        normals: outward normals in world axes, length 1 or, where little is seen, less; None if they were not made.
        aux: what was asked for by name.
    """

    image: Float[Tensor, "views channels height width"]
    depth: Float[Tensor, "views 1 height width"]
    opacity: Float[Tensor, "views 1 height width"]
    normals: Float[Tensor, "views 3 height width"] | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


class Scene(nn.Module):
    """Anything trainable that cameras can look at; calling it renders it.

    Args:
        background: colours used where `render` is given none: a tensor, a module from directions to colours (trained
            along with the scene), or None for white.

    Attributes:
        offers: names that `render` knows in `aux`.
    """

    offers: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, background: Background = None) -> None:
        super().__init__()
        if isinstance(background, Tensor):
            self.register_buffer("background", background)
        else:
            self.background = background

    def render(
        self,
        cameras: Cameras,
        background: Background = None,
        light: Light | None = None,
        time: Tensor | float | None = None,
        aux: Collection[str] = (),
    ) -> RenderOutput:
        """Renders one image a camera.

        Args:
            cameras: the views.
            background: a colour (3,), one a view (views, 3), images (views, 3, height, width), or a function from
                unit directions (views, height, width, 3) to colours of that shape; None for the scene's own.
            light: how albedo and normals become colour; None shows the albedo.
            time: for scenes that move, in [0, 1]; still scenes look the same at any time.
            aux: names of further outputs, out of `offers`.

        Raises:
            ValueError: a name in `aux` that the scene does not offer.
        """
        raise NotImplementedError

    def forward(self, *arguments: Any, **options: Any) -> RenderOutput:
        return self.render(*arguments, **options)

    def check_aux(self, aux: Collection[str]) -> None:
        """Refuses names that the scene does not offer, with a ValueError."""
        if unknown := sorted(set(aux) - self.offers):
            raise ValueError(f"{type(self).__name__} does not offer {unknown}; it offers {sorted(self.offers)}")

    def over_background(
        self, seen: Float[Tensor, "views 3 height width"], cameras: Cameras, opacity: Tensor, background: Background
    ) -> Float[Tensor, "views 3 height width"]:
        """Colours, already weighted by opacity (views, 1, height, width), over a background as `render` takes it."""
        behind = background if background is not None else self.background
        if behind is None:
            return seen + (1 - opacity)
        if not isinstance(behind, Tensor):
            behind = behind(cameras.rays().directions).permute(0, 3, 1, 2)
        behind = behind if behind.ndim == 4 else behind[..., None, None]
        return seen + (1 - opacity) * behind.to(seen)


class DirectionBackground(nn.Module):
    """A small trained network from directions to background colours in [0, 1]; gray to begin with.

    Args:
        width: hidden units.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, width), nn.ReLU(), nn.Linear(width, 3))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, directions: Float[Tensor, "*rays 3"]) -> Float[Tensor, "*rays 3"]:
        waves = [directions, torch.sin(3 * directions), torch.cos(3 * directions)]
        return torch.sigmoid(self.layers(torch.cat(waves, -1)))


@dataclass(frozen=True)
class PointLight:
    """A white lamp and ambient light on a matt surface.

    ``colour = albedo (ambient + diffuse max(0, n . l))``, with l the direction to the lamp.

    Attributes:
        position: of the lamp, one a view.
        ambient: in [0, 1].
        diffuse: in [0, 1].
        mode: "lambertian"; "textureless", which shades white albedo; "normal", which shows (n + 1) / 2.

    Source: Poole et al., *DreamFusion*, 2022, arXiv 2209.14988.
    """

    position: Float[Tensor, "views 3"]
    ambient: float = 0.1
    diffuse: float = 0.9
    mode: str = "lambertian"

    def __post_init__(self) -> None:
        if self.mode not in ("lambertian", "textureless", "normal"):
            raise ValueError(f"mode must be 'lambertian', 'textureless' or 'normal', got '{self.mode}'")

    def __call__(
        self,
        albedo: Float[Tensor, "points 3"],
        normals: Float[Tensor, "points 3"],
        points: Float[Tensor, "points 3"],
        views: Int[Tensor, "points"],
    ) -> Float[Tensor, "points 3"]:
        if self.mode == "normal":
            return (normals + 1) / 2
        towards = nn.functional.normalize(self.position.to(points)[views] - points, dim=-1)
        shading = self.ambient + self.diffuse * (normals * towards).sum(-1, keepdim=True).clamp_min(0)
        return (shading if self.mode == "textureless" else albedo * shading).expand_as(albedo)


def clip_pixelwise(
    gradient: Float[Tensor, "views channels height width"], limit: float
) -> Float[Tensor, "views channels height width"]:
    """Scales each pixel's gradient so that no channel exceeds `limit` (> 0); keeps its direction in colour space.

    For `output.image.register_hook(lambda gradient: clip_pixelwise(gradient, limit))`.

    Source: *Dreamer XL*, 2024, arXiv 2405.11252.
    """
    return gradient * (limit / gradient.abs().amax(1, keepdim=True).clamp_min(limit))

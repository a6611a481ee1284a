"""A scene without depth: trainable images or latents, for score distillation in two dimensions."""

from collections.abc import Collection
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.rendering.cameras import Cameras
from limbeck.rendering.scene import Background, Light, RenderOutput, Scene


class ImageScene(Scene):
    """Images that are their own renderings; opaque, at depth 0.

    Points in the plane are images of shape (2, 1, 1).

    Args:
        images: to start from. With `bounded`, strictly within (0, 1).
        bounded: stores logits, so that images stay within (0, 1) whatever the optimizer does; without, the images
            themselves are the parameter, of any range.

    Raises:
        ValueError: `bounded` with images that are not strictly within (0, 1).
    """

    offers: ClassVar[frozenset[str]] = frozenset({"views"})

    def __init__(self, images: Float[Tensor, "items channels height width"], bounded: bool = False) -> None:
        super().__init__()
        if bounded and not bool(((images > 0) & (images < 1)).all()):
            raise ValueError("bounded images must lie strictly within (0, 1); clamp them, e.g. to [1/512, 511/512]")
        self.bounded = bounded
        self.values = nn.Parameter(torch.logit(images) if bounded else images.detach().clone())

    def render(
        self,
        cameras: Cameras | Tensor | None = None,
        background: Background = None,
        light: Light | None = None,
        time: Tensor | float | None = None,
        aux: Collection[str] = (),
    ) -> RenderOutput:
        """The images: all of them for None, those of an index tensor (views,), or for cameras one a camera.

        A single image is shown to every camera; background, light and time change nothing.

        Raises:
            ValueError: several images, and another number of cameras.
        """
        self.check_aux(aux)
        views = self._views(cameras)
        image = torch.sigmoid(self.values[views]) if self.bounded else self.values[views]
        opacity = torch.ones_like(image[:, :1])
        asked = {"views": views} if "views" in aux else {}
        return RenderOutput(image, torch.zeros_like(opacity), opacity.detach(), None, asked)

    def _views(self, cameras: Cameras | Tensor | None) -> Tensor:
        items, device = len(self.values), self.values.device
        if isinstance(cameras, Tensor):
            return cameras
        if cameras is None or len(cameras) == items:
            return torch.arange(items, device=device)
        if items > 1:
            raise ValueError(f"{items} images cannot be shown to {len(cameras)} cameras; pass their indices instead")
        return torch.zeros(len(cameras), dtype=torch.long, device=device)

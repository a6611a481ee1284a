"""LPIPS: a distance of images in the features of a trained network (Zhang et al., 2018)."""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.core.errors import UsageError

SIDE = 224


def lpips(a: Tensor, b: Tensor, network: Literal["vgg", "alex", "squeeze"] = "vgg") -> Tensor:
    """Perceptual distance of each pair (items,) of images (items, channels, height, width) in [-1, 1].

    Gray images are taken for three equal channels, and small ones enlarged to 224 pixels, as in consistency models.
    Gradients flow to both.

    Raises:
        UsageError: the trained network is not on this machine and cannot be downloaded.
    """
    a, b = (_coloured(image.float()) for image in (a, b))
    return _network(network, a.device)(a, b).flatten()


def _coloured(image: Tensor) -> Tensor:
    image = image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image[:, :3]
    if min(image.shape[2:]) < SIDE:
        image = functional.interpolate(image, SIDE, mode="bilinear", align_corners=False)
    return image.clamp(-1, 1)


@cache
def _network(kind: str, device: torch.device) -> nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric: Any = LearnedPerceptualImagePatchSimilarity(net_type=kind)  # type: ignore[arg-type]
    except (OSError, ModuleNotFoundError) as error:
        raise UsageError(
            f"LPIPS needs the trained network '{kind}', which torchvision downloads once ({error})",
            "run it where there is a network, or choose another distance",
        ) from error
    return metric.net.eval().requires_grad_(False).to(device)

"""Soft labels of crops (FKD): how each image was cropped, mirrored and pasted is kept with what the teacher said."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class CropViews:
    """What the images of a batch went through before they were labelled.

    Attributes:
        boxes: top, left, height and width of each crop as shares of the image (items, 4), float32 in [0, 1].
        flips: whether each was mirrored (items,).
        partners: whose rectangle each one shows (items,), places in the batch.
        paste: top, bottom, left and right of CutMix's rectangle (4,), pixels; of no height where nothing is pasted.
    """

    boxes: Float[Tensor, "items 4"]
    flips: Bool[Tensor, " items"]
    partners: Int64[Tensor, " items"]
    paste: Int64[Tensor, " 4"]

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, for a file."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "CropViews":
        """The parameters of a file; further tensors are passed over.

        Raises:
            KeyError: one is missing.
        """
        return cls(**{name: tensors[name] for name in cls.__slots__})


def boxes_of(
    draws: Float[Tensor, "items 4"], area: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Float[Tensor, "items 4"]:
    """Random crops: area uniform, sides' ratio log-uniform, place uniform; a side longer than the image is cut to it.

    Args:
        draws: uniform numbers in [0, 1), for area, ratio, top and left.
        area: least and largest share of the image's area, in (0, 1].
        ratio: least and largest width to height, in units of the image's own.
    """
    share = area[0] + (area[1] - area[0]) * draws[:, 0]
    low, high = torch.tensor(ratio, dtype=draws.dtype, device=draws.device).log()
    aspect = (low + (high - low) * draws[:, 1]).exp()
    tall, wide = (share / aspect).sqrt().clamp(max=1), (share * aspect).sqrt().clamp(max=1)
    return torch.stack([draws[:, 2] * (1 - tall), draws[:, 3] * (1 - wide), tall, wide], 1)


def draw_paste(size: tuple[int, int], alpha: float, draws: torch.Generator) -> Int64[Tensor, " 4"]:
    """CutMix's rectangle of one batch: top, bottom, left, right in pixels, around a uniform centre, cut at the border.

    Its area is the share 1 - lam of the image with lam from Beta(alpha, alpha), before it is cut.

    Args:
        size: height and width of the images, pixels.
        alpha: above 0; 0 pastes nothing.
        draws: a generator on the CPU.

    Source: Yun et al., *CutMix*, 2019, arXiv 1905.04899.
    """
    if not alpha:
        return torch.zeros(4, dtype=torch.int64)
    # Beta from two gamma draws: torch's Beta distribution takes no generator.
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=draws)
    side = float((1 - gammas[0] / gammas.sum()).clamp(min=0).sqrt())
    bounds = []
    for length, centre in zip(size, torch.rand(2, generator=draws).tolist(), strict=True):
        start, stop = centre * length - side * length / 2, centre * length + side * length / 2
        bounds += [max(0, round(start)), min(length, round(stop))]
    return torch.tensor(bounds)


def show(
    images: Float[Tensor, "items channels height width"], views: CropViews
) -> Float[Tensor, "items channels height width"]:
    """Images cropped and resized to their own size (bilinear), mirrored, with the partners' rectangle pasted in.

    A crop of the whole image that is not mirrored is the image itself.

    Args:
        images: any range.
        views: one row an image, on the images' device.
    """
    top, left, tall, wide = views.boxes.to(images.dtype).unbind(1)
    zero = torch.zeros_like(top)
    across = torch.where(views.flips, -wide, wide)  # a mirrored crop is read from right to left
    rows = [torch.stack([across, zero, 2 * left + wide - 1], 1), torch.stack([zero, tall, 2 * top + tall - 1], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    shown = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    first, last, start, stop = views.paste.tolist()
    if last > first and stop > start:
        pasted = shown.clone()
        pasted[:, :, first:last, start:stop] = shown[views.partners][:, :, first:last, start:stop]
        shown = pasted
    return shown


def kept_share(views: CropViews, size: tuple[int, int]) -> float:
    """lam, the share of each image's area that is its own and not its partner's.

    Args:
        views: of a batch.
        size: height and width of the images, pixels.
    """
    first, last, start, stop = views.paste.tolist()
    return 1 - (last - first) * (stop - start) / (size[0] * size[1])

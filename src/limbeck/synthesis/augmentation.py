"""Differentiable siamese augmentation (Zhao and Bilen, 2021): real and synthetic images change in the same way.

All take images (items, channels, height, width) in normalised units, where 0 is the mean of the data, and uniform
numbers in [0, 1) for each item; gradients flow to the images.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

Images = Float[Tensor, "items channels height width"]
Draws = Float[Tensor, "items numbers"]


def flip(images: Images, draws: Draws) -> Images:
    """Mirrors left to right with probability one half."""
    return torch.where(_column(draws, 0) < 0.5, images.flip(-1), images)


def colour(images: Images, draws: Draws) -> Images:
    """Shifts brightness by -0.5 to 0.5, scales saturation by 0 to 2 and contrast by 0.5 to 1.5."""
    images = images + _column(draws, 0) - 0.5
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * 2 * _column(draws, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + _column(draws, 2))


def saturated(images: Images, draws: Draws) -> Images:
    """`colour` for gray images, which have no saturation: brightness and contrast alone."""
    images = images + _column(draws, 0) - 0.5
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + _column(draws, 2))


def crop(images: Images, draws: Draws, share: float = 0.125) -> Images:
    """Shifts by up to `share` of each side in whole pixels; 0 comes in from outside."""
    height, width = images.shape[2:]
    rows = _shifted(height, draws[:, 0], share)[:, None, :, None]
    columns = _shifted(width, draws[:, 1], share)[:, None, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    items = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channels = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return images[items, channels, rows.clamp(0, height - 1), columns.clamp(0, width - 1)] * inside


def cutout(images: Images, draws: Draws, share: float = 0.5) -> Images:
    """Blanks a rectangle of `share` of each side, anywhere, possibly in part outside, with 0."""
    height, width = images.shape[2:]
    high, wide = int(height * share + 0.5), int(width * share + 0.5)
    rows = torch.arange(height, device=images.device) - _top(height, high, draws[:, 0])[:, None]
    columns = torch.arange(width, device=images.device) - _top(width, wide, draws[:, 1])[:, None]
    hole = ((rows >= 0) & (rows < high))[:, :, None] & ((columns >= 0) & (columns < wide))[:, None, :]
    return images * ~hole[:, None]


def scale(images: Images, draws: Draws, ratio: float = 1.2) -> Images:
    """Stretches each side on its own, by a factor between 1 / `ratio` and `ratio`; bilinear, 0 outside."""
    factors = 1 / ratio + (ratio - 1 / ratio) * draws[:, :2]
    matrix = torch.zeros(len(images), 2, 3, device=images.device)
    matrix[:, 0, 0], matrix[:, 1, 1] = factors[:, 0], factors[:, 1]
    return _resampled(images, matrix)


def rotate(images: Images, draws: Draws, degrees: float = 15.0) -> Images:
    """Turns by up to `degrees` either way about the centre; bilinear, 0 outside."""
    angle = (2 * draws[:, 0] - 1) * math.radians(degrees)
    matrix = torch.zeros(len(images), 2, 3, device=images.device)
    matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos(), -angle.sin()
    matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos()
    return _resampled(images, matrix)


class Change(NamedTuple):
    """One change: its function of (images, draws), and how many uniform numbers an item it needs."""

    apply: Callable[[Tensor, Tensor], Tensor]
    draws: int


CHANGES = {
    "flip": Change(flip, 1),
    "color": Change(lambda images, draws: (colour if images.shape[1] == 3 else saturated)(images, draws), 3),
    "crop": Change(crop, 2),
    "cutout": Change(cutout, 2),
    "scale": Change(scale, 2),
    "rotate": Change(rotate, 1),
}
"""The changes by the names of the papers' strategy strings."""


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """Names of a strategy such as "color_crop_cutout_flip_scale_rotate"; "" and "none" are no augmentation.

    Raises:
        ValueError: a name is unknown.
    """
    names = tuple(name for name in strategy.split("_") if name and name != "none")
    unknown = [name for name in names if name not in CHANGES]
    if unknown:
        raise ValueError(f"'{unknown[0]}' is no augmentation; there are {', '.join(CHANGES)}")
    return names


class SiameseAugment:
    """Flips where the strategy says so, then does one of its other changes, chosen anew for each seed.

    The change and, unless `each` is set, its numbers are a function of the seed alone: two batches of any size that are
    given the same seed change in the same way.

    Args:
        strategy: names joined by underscores, as the papers write it, or a sequence of names; see `CHANGES`.
    """

    def __init__(self, strategy: str | Sequence[str] = "color_crop_cutout_flip_scale_rotate") -> None:
        self.names = parse_strategy(strategy if isinstance(strategy, str) else "_".join(strategy))

    def __call__(self, images: Images, seed: int, each: bool = False) -> Images:
        """Changed images, with gradients to the given ones.

        Args:
            images: in normalised units.
            seed: of the change and its numbers.
            each: draw numbers for every image alone, as training on a finished set does.
        """
        draws = torch.Generator().manual_seed(seed)
        others = [name for name in self.names if name != "flip"]
        chosen = ["flip"] if "flip" in self.names else []
        if others:
            chosen.append(others[int(torch.randint(len(others), (), generator=draws))])
        for name in chosen:
            change = CHANGES[name]
            numbers = torch.rand(len(images) if each else 1, change.draws, generator=draws)
            images = change.apply(images, numbers.expand(len(images), -1).to(images.device, images.dtype))
        return images


def augment_classes(augment: SiameseAugment, images: Images, labels: Int64[Tensor, " items"], seed: int) -> Images:
    """Changes the images of each class in a way of their own, which is a function of the seed and the class.

    Args:
        augment: what to do.
        images: in normalised units.
        labels: class of each image; those below 0 are left as they are.
        seed: of all classes together, at least 0.
    """
    if not augment.names:
        return images
    present = labels.unique().tolist()
    rows = [(labels == label).nonzero().flatten() for label in present]
    parts = [
        images[own] if label < 0 else augment(images[own], seed + label)
        for label, own in zip(present, rows, strict=True)
    ]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def _column(draws: Tensor, number: int) -> Tensor:
    return draws[:, number].view(-1, 1, 1, 1)


def _shifted(side: int, draws: Tensor, share: float) -> Tensor:
    """Where each pixel (items, side) comes from."""
    most = int(side * share + 0.5)
    shift = (draws * (2 * most + 1)).long() - most
    return torch.arange(side, device=draws.device) + shift[:, None]


def _top(side: int, hole: int, draws: Tensor) -> Tensor:
    """The first pixel (items,) of a hole whose middle is anywhere in the image."""
    return (draws * (side + 1 - hole % 2)).long() - hole // 2


def _resampled(images: Tensor, matrix: Tensor) -> Tensor:
    grid = functional.affine_grid(matrix.to(images.dtype), list(images.shape), align_corners=True)
    return functional.grid_sample(images, grid, align_corners=True)

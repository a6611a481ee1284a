"""Augmentations of image batches, each drawn per item from (seed, item) so that it does not depend on the batch.

All take images (items, channels, height, width) as float32 in [0, 1] with the uniform numbers they need, one row an
item, and return images of the same shape. They are whole-batch tensor operations without a loop over items.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from limbeck.core.randomness import derive
from limbeck.data.noise import uniforms


def flip(images: Tensor, draws: Tensor) -> Tensor:
    """Mirrors an image left to right with probability one half."""
    return torch.where(draws[:, 0].view(-1, 1, 1, 1) < 0.5, images.flip(-1), images)


def crop(images: Tensor, draws: Tensor) -> Tensor:
    """Pads by an eighth of each side (at least one pixel) with the border's pixels and cuts a random window."""
    height, width = images.shape[2:]
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    padded = functional.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (items, channels, top, left, height, width)
    top = (draws[:, 0] * (2 * pad_y + 1)).long()
    left = (draws[:, 1] * (2 * pad_x + 1)).long()
    return windows[torch.arange(len(images)), :, top, left]


def jitter(images: Tensor, draws: Tensor, strength: float = 0.4) -> Tensor:
    """Scales brightness, contrast and (with three channels) saturation by factors in 1 ± `strength`."""
    brightness, contrast, saturation = (1 + strength * (2 * draws - 1)).view(-1, 3, 1, 1, 1).unbind(1)
    images = (images * brightness).clamp(0, 1)
    images = _blend(images, _gray(images).mean((2, 3), keepdim=True), contrast)
    return _blend(images, _gray(images), saturation) if images.shape[1] == 3 else images


def erase(images: Tensor, draws: Tensor, fill: Tensor) -> Tensor:
    """Paints a random rectangle of 2 to 33 % of the area with `fill`, with probability one half.

    Args:
        images: see above.
        draws: (items, 5).
        fill: a value for each channel (channels, 1, 1).
    """
    height, width = images.shape[2:]
    chosen, area, aspect, y, x = draws.unbind(1)
    area = 0.02 + 0.31 * area
    aspect = torch.exp((2 * aspect - 1) * 1.2)  # height to width, log-uniform in [0.3, 3.3]
    tall = (area * aspect).sqrt().clamp(max=1) * height
    wide = (area / aspect).sqrt().clamp(max=1) * width
    inside_y = _inside(y * (height - tall), tall, height)
    inside_x = _inside(x * (width - wide), wide, width)
    hole = inside_y[:, :, None] & inside_x[:, None, :] & (chosen < 0.5).view(-1, 1, 1)
    return torch.where(hole[:, None], fill, images)


class Augmentation(NamedTuple):
    """One augmentation: its function of (images, draws, fill) and how many uniform numbers an item it needs."""

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    draws: int


AUGMENTATIONS = {
    "flip": Augmentation(lambda images, draws, fill: flip(images, draws), 1),
    "crop": Augmentation(lambda images, draws, fill: crop(images, draws), 2),
    "jitter": Augmentation(lambda images, draws, fill: jitter(images, draws), 3),
    "erase": Augmentation(erase, 5),
}
"""The augmentations by their names in recipes."""


def augment(images: Tensor, names: Sequence[str], seed: int, items: Tensor, fill: Tensor) -> Tensor:
    """Applies augmentations in order.

    Args:
        images: (items, channels, height, width), float32 in [0, 1].
        names: keys of `AUGMENTATIONS`.
        seed: seed of this pass over the data.
        items: number of each item (items,), int64; the same item under the same seed is augmented the same way.
        fill: what `erase` paints with (channels, 1, 1).
    """
    for place, name in enumerate(names):
        augmentation = AUGMENTATIONS[name]
        draws = uniforms(derive(seed, place, name), items, augmentation.draws)
        images = augmentation.apply(images, draws, fill)
    return images


def _inside(start: Tensor, length: Tensor, size: int) -> Tensor:
    centres = torch.arange(size) + 0.5
    return (centres >= start[:, None]) & (centres < (start + length)[:, None])


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # luma of ITU-R BT.601
    return (images * weights).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (other + (images - other) * share).clamp(0, 1)

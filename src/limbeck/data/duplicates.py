"""Finding images of a pool that are, but for small changes, images of another set."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from limbeck.core.errors import IncompatibleError
from limbeck.data.source import ImageSource

Descriptor = Callable[[Tensor], Tensor]
"""Makes of images (items, channels, height, width), float32 in [0, 1], one vector each: (items, anything)."""

_SIDE, _KEPT = 32, 8  # pixels of the image that is hashed; frequencies kept along each axis


def perceptual_hash(images: Tensor) -> Tensor:
    """Signs of an image's low frequencies about their median: equal for pictures that look alike.

    The image is made gray, scaled to 32 x 32 pixels and cosine-transformed; of the 8 x 8 lowest frequencies all but the
    mean are compared with their median.

    Args:
        images: (items, channels, height, width), floats of any scale.

    Returns:
        (items, 63) float32 of 1 and -1, so that (63 - a · b) / 2 is the number of bits in which two hashes differ.
    """
    gray = _scaled(images, _SIDE)
    places = torch.arange(_SIDE, device=images.device, dtype=torch.float32)
    waves = torch.cos(math.pi / _SIDE * (places + 0.5) * places[:_KEPT, None])  # (frequencies, pixels)
    low = (waves @ gray @ waves.T).flatten(1)[:, 1:]
    return torch.where(low > low.median(1, keepdim=True).values, 1.0, -1.0)


def thumbnail(images: Tensor, side: int = 16) -> Tensor:
    """Gray images of `side` x `side` pixels, centred: their cosine is the correlation of the pictures.

    Args:
        images: (items, channels, height, width), floats of any scale.
        side: in pixels.

    Returns:
        (items, side * side) float32, blind to brightness; contrast only scales it.
    """
    flat = _scaled(images, side).flatten(1)
    return flat - flat.mean(1, keepdim=True)


def near_duplicates(
    pool: ImageSource,
    evaluation: ImageSource,
    *,
    descriptor: Descriptor = thumbnail,
    cosine: float = 0.97,
    bits: int | None = 12,
    batch_size: int = 256,
) -> Tensor:
    """Which images of a pool are near-duplicates of an evaluation image, and so may not be trained on.

    A pair counts as one picture if the cosine of the descriptors reaches `cosine` and the perceptual hashes differ in
    at most `bits` of 63 bits. SSLD matched local features (SIFT); such, or a network's embedding, go in as descriptor.

    Args:
        pool: images to look at.
        evaluation: images on which results will be measured; their descriptors are held in memory.
        descriptor: see `Descriptor`.
        cosine: least cosine of a pair, in [-1, 1].
        bits: most bits of difference of a pair; None asks the descriptor alone.
        batch_size: images of the pool at a time.

    Returns:
        (pool items,) bool.

    Raises:
        IncompatibleError: the descriptor does not give one vector an image.
    """
    known = [_described(evaluation, rows, descriptor, bits) for rows in _batches(evaluation, batch_size)]
    vectors, hashes = (torch.cat(part) for part in zip(*known, strict=True))
    found = torch.zeros(len(pool), dtype=torch.bool)
    for rows in _batches(pool, batch_size):
        vector, code = _described(pool, rows, descriptor, bits)
        alike = vector @ vectors.T >= cosine
        if bits is not None:
            alike &= (code.shape[1] - code @ hashes.T) / 2 <= bits
        found[rows] = alike.any(1).cpu()
    return found


def _described(source: ImageSource, rows: Tensor, descriptor: Descriptor, bits: int | None) -> tuple[Tensor, Tensor]:
    images = source.images(rows)
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    with torch.no_grad():
        vectors = descriptor(images)
    if len(vectors) != len(images):
        raise IncompatibleError(f"the descriptor makes {len(vectors)} vectors of {len(images)} images")
    code = perceptual_hash(images) if bits is not None else images.new_zeros(len(images), 0)
    return functional.normalize(vectors.flatten(1).float(), dim=1), code


def _batches(source: ImageSource, batch_size: int) -> tuple[Tensor, ...]:
    return torch.arange(len(source)).split(batch_size)


def _scaled(images: Tensor, side: int) -> Tensor:
    """Gray squares (items, side, side)."""
    gray = images.float().mean(1, keepdim=True)
    smaller = min(images.shape[2:]) > side
    return functional.interpolate(gray, (side, side), mode="bilinear", antialias=smaller)[:, 0]

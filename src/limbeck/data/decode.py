"""Decoding stored pictures (PNG, JPEG and the like) with Pillow."""

import io
from pathlib import Path

import numpy
import torch
from torch import Tensor

from limbeck.core.errors import DamagedFileError


def decode_picture(stored: bytes | Path, channels: int | None, size: int | None, name: object) -> Tensor:
    """A picture as bytes (channels, height, width), uint8.

    Args:
        stored: a file's content, or its path.
        channels: 1 for gray, 3 for colour; None takes gray pictures as gray and all others as colour.
        size: side in pixels of the square it is scaled to; None keeps its size.
        name: what to call the picture in messages.

    Raises:
        DamagedFileError: no picture that Pillow can read.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as picture:
            gray = channels == 1 or (channels is None and picture.mode in ("1", "L", "I", "I;16", "LA"))
            pixels = picture.convert("L" if gray else "RGB")
            if size is not None and pixels.size != (size, size):
                pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamagedFileError(name, f"no readable picture ({error})") from error
    array = numpy.asarray(pixels)
    return torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).copy())

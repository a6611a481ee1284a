"""Readers of data that fit in memory: the embedded digits, MNIST's IDX files and NumPy archives."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from limbeck.core.errors import DamagedFileError, RecipeError, did_you_mean
from limbeck.core.specs import DataSpec
from limbeck.data.source import ArraySource

_IDX_MAGIC = {"images": 0x0803, "labels": 0x0801}  # unsigned bytes in three dimensions, and in one


def read_digits(path: str, spec: DataSpec) -> tuple[ArraySource, None]:
    """The 1,797 gray 8x8 digits that scikit-learn carries (UCI, Alpaydin and Kaynak 1998); `path` is not used."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16  # stored as counts from 0 to 16
    return ArraySource(resized(images, spec.image_size), torch.from_numpy(labels)), None


def read_mnist(path: str, spec: DataSpec) -> tuple[ArraySource, ArraySource]:
    """A folder of IDX files, as they are or gzipped.

    With the files of both splits these are training and validation; with one of them the last share of its items,
    by index, is held out.

    Raises:
        RecipeError: no pair of image and label files in the folder.
        DamagedFileError: a file is not what IDX says it is.
    """
    folder = Path(path).expanduser()
    found = {split: source for split in ("train", "t10k") if (source := _read_idx_pair(folder, split, spec))}
    if not found:
        raise RecipeError(
            "data.name", f"no IDX files in '{path}'", "it should hold train-images-idx3-ubyte.gz and so on"
        )
    if len(found) == 2:
        return found["train"], found["t10k"]
    whole = next(iter(found.values()))
    kept = len(whole) - max(1, round(spec.validation * len(whole)))
    return whole.select(torch.arange(kept)), whole.select(torch.arange(kept, len(whole)))


def read_npz(path: str, spec: DataSpec) -> tuple[ArraySource, None]:
    """A NumPy archive with `image` and `label` (or the columns that the spec names); pickled objects are refused.

    Images may be (items, height, width), channels last or channels first; uint8, or floats in [0, 1].

    Raises:
        RecipeError: an array is missing or has the wrong shape.
        DamagedFileError: no archive, or one that holds pickled objects.
    """
    images = _read_array(path, spec.image_column or "image", "data.image_column")
    labels = _read_array(path, spec.label_column or "label", "data.label_column")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise RecipeError(
            "data.label_column",
            f"labels must be {len(images)} integers, not {labels.dtype} of shape {labels.shape}",
            "use -100 for items without a label",
        )
    tensor = _channels_first(torch.from_numpy(images))
    return ArraySource(resized(tensor, spec.image_size), torch.from_numpy(labels.astype(numpy.int64))), None


def resized(images: Tensor, size: int | None, chunk: int = 4096) -> Tensor:
    """Images (items, channels, height, width) scaled to squares of side `size` in pixels; None leaves them."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    parts = [
        functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).clamp_(min=0)
        for part in images.split(chunk)
    ]
    scaled = torch.cat(parts)
    return scaled.round().clamp_(max=255).to(torch.uint8) if images.dtype == torch.uint8 else scaled


def _read_idx_pair(folder: Path, split: str, spec: DataSpec) -> ArraySource | None:
    images = _find(folder, f"{split}-images-idx3-ubyte")
    labels = _find(folder, f"{split}-labels-idx1-ubyte")
    if images is None or labels is None:
        return None
    pixels, classes = _read_idx(images, "images"), _read_idx(labels, "labels")
    if len(pixels) != len(classes):
        raise DamagedFileError(labels, f"{len(classes)} labels for {len(pixels)} images")
    return ArraySource(resized(pixels[:, None], spec.image_size), classes.long())


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, kind: str) -> Tensor:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFileError(path, str(error)) from error
    dimensions = 3 if kind == "images" else 1
    header = 4 * (1 + dimensions)
    if len(content) < header or struct.unpack(">I", content[:4])[0] != _IDX_MAGIC[kind]:
        raise DamagedFileError(path, f"it does not begin like an IDX file of {kind}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    body = numpy.frombuffer(content, numpy.uint8, offset=header)
    if body.size != math.prod(shape):
        raise DamagedFileError(path, f"{body.size} bytes of data for the shape {shape}")
    return torch.from_numpy(body.reshape(shape).copy())


def _read_array(path: str, name: str, key: str) -> NDArray[Any]:
    file = Path(path).expanduser()
    try:
        with numpy.load(file, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise DamagedFileError(file, "a single array, not an archive of several")
            if name not in archive.files:
                raise RecipeError(key, f"no array '{name}' in '{path}'", did_you_mean(name, archive.files))
            return archive[name]
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DamagedFileError(file, str(error).splitlines()[0]) from error


def _channels_first(images: Tensor) -> Tensor:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        raise RecipeError("data.image_column", f"images must have 3 or 4 dimensions, not shape {tuple(images.shape)}")
    last = images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4)
    return images.permute(0, 3, 1, 2).contiguous() if last else images

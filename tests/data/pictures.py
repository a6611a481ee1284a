"""Small data sets written to disk for the tests: class folders, parquet, saved data sets, IDX files."""

import gzip
import io
import struct
from pathlib import Path

import numpy
from PIL import Image

CLASSES = ("cat", "dog", "emu")


def pixels(item: int, size: int = 8) -> "numpy.ndarray":
    """A picture whose pixels tell which item it is, (size, size, 3)."""
    return numpy.random.default_rng(item).integers(0, 256, (size, size, 3), dtype=numpy.uint8)


def png(item: int, size: int = 8) -> bytes:
    """The same picture as a PNG file's content."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(item, size)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, each: int = 4, classes: tuple[str, ...] = CLASSES) -> None:
    """`each` pictures a class; picture k of class c shows item 10 c + k."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for item in range(each):
            (root / name / f"{item:02}.png").write_bytes(png(10 * number + item))


def dataset(items: int = 12):
    """A `datasets.Dataset` with an Image and a ClassLabel column; item i is of class i % 3."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"id": Value("int64"), "picture": ImageFeature(), "kind": ClassLabel(names=list(CLASSES))})
    rows = {
        "id": list(range(items)),
        "picture": [{"bytes": png(item), "path": None} for item in range(items)],
        "kind": [item % 3 for item in range(items)],
    }
    return Dataset.from_dict(rows, features=features)


def write_idx(folder: Path, split: str, items: int, zipped: bool = True) -> None:
    """IDX files of gray 6x5 images; pixel p of item i is (i + p) % 256, its label i % 10."""
    images = (numpy.arange(items)[:, None] + numpy.arange(30)) % 256
    content = {
        f"{split}-images-idx3-ubyte": struct.pack(">4I", 0x0803, items, 6, 5) + images.astype(numpy.uint8).tobytes(),
        f"{split}-labels-idx1-ubyte": struct.pack(">2I", 0x0801, items) + bytes(item % 10 for item in range(items)),
    }
    folder.mkdir(exist_ok=True)
    for name, body in content.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(body) if zipped else body)

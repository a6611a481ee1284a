"""Reader of image folders: one subfolder a class."""

import json
from pathlib import Path

import torch

from limbeck.core.errors import DamagedFileError, RecipeError
from limbeck.core.specs import DataSpec
from limbeck.data.items import ItemSource
from limbeck.data.readers.columns import as_captions, check_captions

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_VALIDATION = ("val", "validation", "valid", "test")


def read_folder(path: str, spec: DataSpec) -> tuple[ItemSource, ItemSource | None]:
    """A folder with one subfolder of pictures a class, or with such folders under `train` and `val`; or, where a
    column of captions is named, a folder with `metadata.jsonl`.

    Classes are numbered in the order of their names. The items' order goes round the classes, so that a part of the
    data (`limit`) holds all of them.

    Raises:
        RecipeError: no class folders, no pictures, or a class that the training part does not have.
        DamagedFileError: the first picture cannot be read.
    """
    root = Path(path).expanduser()
    if spec.caption_column is not None:
        return _read_captioned(root, spec), None
    names = {folder.name for folder in root.iterdir() if folder.is_dir()}
    held_out = next((name for name in _VALIDATION if name in names), None)
    if "train" not in names or held_out is None:
        return _read(root / "train" if names == {"train"} else root, spec), None
    train = _read(root / "train", spec)
    return train, _read(root / held_out, spec, train.class_names)


def _read(root: Path, spec: DataSpec, classes: tuple[str, ...] | None = None) -> ItemSource:
    found = {folder.name: _pictures(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    known = classes or tuple(name for name, pictures in found.items() if pictures)
    unknown = [name for name, pictures in found.items() if pictures and name not in known]
    if unknown:
        raise RecipeError("data.name", f"the class '{unknown[0]}' of '{root}' is not among the training classes")
    if not any(found.values()):
        raise RecipeError("data.name", f"no pictures in '{root}'", "it should hold one folder of pictures a class")
    entries = [
        (place, known.index(name), picture)
        for name, pictures in found.items()
        for place, picture in enumerate(pictures)
    ]
    entries.sort(key=lambda entry: entry[:2])
    paths = [picture for _, _, picture in entries]
    labels = torch.tensor([label for _, label, _ in entries])
    return ItemSource(
        lambda key: (paths[key], paths[key]),
        labels,
        image_size=spec.image_size,
        classes=len(known),
        class_names=known,
    )


def _read_captioned(root: Path, spec: DataSpec) -> ItemSource:
    """Pictures as the rows of `metadata.jsonl` name them, relative to the folder, without classes."""
    table = root / "metadata.jsonl"
    if not table.is_file():
        raise RecipeError("data.caption_column", f"there is no 'metadata.jsonl' in '{root}'", "one row a picture")
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        paths = [root / row["file_name"] for row in rows]
        columns = sorted({name for row in rows for name in row})
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(table, f"its rows are no objects with file_name ({error})") from error
    if not rows:
        raise DamagedFileError(table, "it has no rows")
    check_captions(columns, spec)
    missing = next((path for path in paths if not path.is_file() or not _lies_within(path, root)), None)
    if missing is not None:
        raise DamagedFileError(table, f"there is no picture '{missing}' in the folder")
    captions = as_captions([row.get(str(spec.caption_column)) for row in rows])
    labels = torch.full((len(rows),), -100)
    return ItemSource(
        lambda key: (paths[key], paths[key]), labels, image_size=spec.image_size, classes=0, captions=captions
    )


def _lies_within(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())

"""Reader of data sets of the `datasets` library, saved with `save_to_disk`."""

from pathlib import Path
from typing import Any

from limbeck.core.errors import DamagedFileError, RecipeError
from limbeck.core.specs import DataSpec
from limbeck.data.items import ItemSource
from limbeck.data.readers.columns import Chosen, Column, as_captions, as_labels, check_captions, choose_columns

_VALIDATION = ("validation", "valid", "val", "dev", "test")


def read_datasets(path: str, spec: DataSpec) -> tuple[ItemSource, ItemSource | None]:
    """A saved Dataset, or a DatasetDict with the split `train` and perhaps `validation` or `test`.

    Raises:
        RecipeError: no training split, or columns that do not fit.
        DamagedFileError: the folder is no saved data set, or an item has no picture.
    """
    folder = Path(path).expanduser()
    training, held_out = open_saved(path)
    train = _read(training, folder, spec)
    return train, None if held_out is None else _read(held_out, folder, spec, train)


def open_saved(path: str) -> tuple[Any, Any | None]:
    """The `Dataset` of a folder that `save_to_disk` wrote, and the one that is held out where the folder has splits.

    Raises:
        RecipeError: there are splits, but none is called `train`.
        DamagedFileError: the folder is no saved data set.
    """
    from datasets import Dataset, load_from_disk

    folder = Path(path).expanduser()
    try:
        loaded: Any = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DamagedFileError(folder, f"no saved data set ({error})") from error
    if isinstance(loaded, Dataset):
        return loaded, None
    if "train" not in loaded:
        raise RecipeError("data.name", f"'{path}' has no split 'train'", f"splits: {', '.join(loaded)}")
    held_out = next((name for name in _VALIDATION if name in loaded), None)
    return loaded["train"], None if held_out is None else loaded[held_out]


def _read(rows: Any, folder: Path, spec: DataSpec, train: ItemSource | None = None) -> ItemSource:
    chosen = choose_columns(_columns(rows.features), spec)
    names = train.class_names if train is not None else chosen.class_names
    values = list(rows[chosen.label]) if chosen.label else [None] * len(rows)
    labels, names = as_labels(values, names)
    classes = train.classes if train is not None else len(names) if names else None
    check_captions(rows.column_names, spec)
    captions = as_captions(list(rows[spec.caption_column])) if spec.caption_column else None
    return ItemSource(
        _reader(rows, folder, chosen),
        labels,
        image_size=spec.image_size,
        classes=classes,
        class_names=names,
        captions=captions,
    )


def _reader(rows: Any, folder: Path, chosen: Chosen) -> Any:
    from datasets import Image

    stored = rows.select_columns([chosen.image]).cast_column(chosen.image, Image(decode=False))

    def read(row: int) -> tuple[bytes, str]:
        name = f"{folder}, item {row}"
        value = stored[row][chosen.image]
        if value.get("bytes"):
            return value["bytes"], name
        raise DamagedFileError(name, "it holds no picture (only a path, perhaps)")

    return read


def _columns(features: Any) -> dict[str, Column]:
    from datasets import ClassLabel, Image, Value

    columns = {}
    for name, feature in features.items():
        if isinstance(feature, Image):
            columns[name] = Column("image")
        elif isinstance(feature, ClassLabel):
            columns[name] = Column("label", feature.names)
        elif isinstance(feature, Value) and feature.dtype in ("int64", "int32", "int16", "int8", "string"):
            columns[name] = Column("label")
        else:
            columns[name] = Column("other")
    return columns

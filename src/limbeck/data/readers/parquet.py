"""Reader of parquet files with a column of pictures, as `datasets` and the Hugging Face hub write them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.core.errors import DamagedFileError
from limbeck.core.specs import DataSpec
from limbeck.data.items import ItemSource
from limbeck.data.readers.columns import Column, as_captions, as_labels, check_captions, choose_columns
from limbeck.data.readers.splits import split_files


def read_parquet(path: str, spec: DataSpec) -> tuple[ItemSource, ItemSource | None]:
    """A parquet file, or a folder of them.

    In a folder a file's name says its split (`train`, `validation`, `valid`, `val`, `dev`, `test`); the validation
    files are held out, or else the test files. Pictures are a column of bytes, or of `datasets`' Image type.

    Raises:
        RecipeError: no files, no column of pictures, or columns that do not fit.
        DamagedFileError: a file is no parquet, or an item has no picture.
    """
    training, held_out = split_files(path, ("*.parquet",))
    train = _read(training, spec)
    return train, None if held_out is None else _read(held_out, spec, train)


def _read(files: Sequence[Path], spec: DataSpec, train: ItemSource | None = None) -> ItemSource:
    table = read_table(files)
    chosen = choose_columns(_columns(table.schema), spec)
    names = train.class_names if train is not None else chosen.class_names
    values = table.column(chosen.label).to_pylist() if chosen.label else [None] * table.num_rows
    labels, names = as_labels(values, names)
    pictures = table.column(chosen.image)
    check_captions(table.column_names, spec)
    captions = as_captions(table.column(spec.caption_column).to_pylist()) if spec.caption_column else None

    def read(row: int) -> tuple[bytes, str]:
        name = f"{files[0].parent}, item {row}"
        value = pictures[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise DamagedFileError(name, "it holds no picture (only a path, perhaps)")
        return content, name

    classes = train.classes if train is not None else len(names) if names else None
    return ItemSource(read, labels, image_size=spec.image_size, classes=classes, class_names=names, captions=captions)


def read_table(files: Sequence[Path]) -> Any:
    """The rows of parquet files as one pyarrow table; a file that is no parquet raises `DamagedFileError`."""
    import pyarrow
    import pyarrow.parquet

    tables = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file))
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedFileError(file, str(error).splitlines()[0]) from error
    return pyarrow.concat_tables(tables)


def _columns(schema: Any) -> dict[str, Column]:
    from pyarrow import types

    noted = _noted_features(schema)
    columns = {}
    for field in schema:
        feature = noted.get(field.name, {})
        is_struct = types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if is_struct or types.is_binary(field.type) or types.is_large_binary(field.type):
            columns[field.name] = Column("image" if feature.get("_type", "Image") == "Image" else "other")
        elif types.is_integer(field.type) or types.is_string(field.type) or types.is_large_string(field.type):
            columns[field.name] = Column("label", feature.get("names"))
        else:
            columns[field.name] = Column("other")
    return columns


def _noted_features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` noted about the columns in the file; nothing where that is absent or of another form."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}

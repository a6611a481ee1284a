"""Which column of a table holds the picture and which the label."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import RecipeError, did_you_mean
from limbeck.core.specs import DataSpec

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "y")


class Column(NamedTuple):
    """What is known of a column: what it can serve as, and the names of its classes where they are noted."""

    kind: Literal["image", "label", "other"]
    class_names: Sequence[str] | None = None


class Chosen(NamedTuple):
    """The columns to read; no label where the table has none."""

    image: str
    label: str | None
    class_names: Sequence[str] | None


def choose_columns(columns: Mapping[str, Column], spec: DataSpec) -> Chosen:
    """The columns that the spec names, or else those that can serve: the first picture, and the likeliest label.

    Raises:
        RecipeError: a named column is missing or of the wrong type, or no column holds pictures.
    """
    image = spec.image_column or next((name for name, column in columns.items() if column.kind == "image"), None)
    if image is None:
        raise RecipeError("data.image_column", "no column holds pictures", f"columns: {', '.join(columns)}")
    _check(columns, image, "image", "data.image_column")
    label = spec.label_column or _likely_label(columns, named_alone=spec.caption_column is None)
    if label is None:
        return Chosen(image, None, None)
    _check(columns, label, "label", "data.label_column")
    return Chosen(image, label, columns[label].class_names)


def as_captions(values: Sequence[object]) -> list[str]:
    """The texts of a column of captions.

    Raises:
        RecipeError: a value that is no text.
    """
    for item, value in enumerate(values):
        if not isinstance(value, str):
            raise RecipeError(
                "data.caption_column",
                f"item {item} has no text there but {type(value).__name__}",
                "name another column",
            )
    return [str(value) for value in values]


def check_captions(names: Sequence[str], spec: DataSpec) -> None:
    """Refuses a named column of captions that is not there, as a `RecipeError`."""
    if spec.caption_column is not None and spec.caption_column not in names:
        hint = did_you_mean(spec.caption_column, names)
        raise RecipeError("data.caption_column", f"there is no column '{spec.caption_column}'", hint)


def as_labels(
    values: Sequence[int | str | None], class_names: Sequence[str] | None
) -> tuple[Tensor, Sequence[str] | None]:
    """Class numbers (items,) and names of a column of numbers or names; a missing value or -1 becomes -100."""
    if any(isinstance(value, str) for value in values):
        names = class_names or sorted({value for value in values if isinstance(value, str)})
        numbers = {name: number for number, name in enumerate(names)}
        try:
            return torch.tensor([-100 if value is None else numbers[str(value)] for value in values]), names
        except KeyError as error:
            raise RecipeError("data.label_column", f"the label {error} is not among the training labels") from None
    found = [-100 if value is None or int(value) == -1 else int(value) for value in values]
    return torch.tensor(found, dtype=torch.int64), class_names


def _likely_label(columns: Mapping[str, Column], named_alone: bool) -> str | None:
    """The likeliest column of labels; `named_alone`: a single one of another name counts, and is not further text."""
    labels = [name for name, column in columns.items() if column.kind == "label"]
    noted = [name for name in labels if columns[name].class_names]
    usual = [name for name in _LABEL_NAMES if name in labels]
    return next(iter([*noted, *usual]), labels[0] if named_alone and len(labels) == 1 else None)


def _check(columns: Mapping[str, Column], name: str, kind: str, key: str) -> None:
    if name not in columns:
        raise RecipeError(key, f"there is no column '{name}'", did_you_mean(name, columns))
    if columns[name].kind != kind:
        fitting = [other for other, column in columns.items() if column.kind == kind]
        raise RecipeError(key, f"the column '{name}' is no {kind}", f"columns that are: {', '.join(fitting) or 'none'}")

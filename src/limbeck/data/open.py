"""From a recipe's description of data to a training and a validation source."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from limbeck.core.specs import DataSpec
from limbeck.data.names import check_data, is_text, parse_data_name
from limbeck.data.source import ImageSource, Source
from limbeck.data.split import stratified_split

Reader = Callable[[str, DataSpec], tuple[ImageSource, ImageSource | None]]

_READERS = {
    "digits": "arrays:read_digits",
    "mnist": "arrays:read_mnist",
    "npz": "arrays:read_npz",
    "folder": "folder:read_folder",
    "parquet": "parquet:read_parquet",
    "datasets": "saved_datasets:read_datasets",
}


@dataclass(frozen=True, slots=True)
class DataSplit:
    """What is trained on, and what results are measured on."""

    train: Source
    validation: Source


def open_data(spec: DataSpec, seed: int = 0) -> DataSplit:
    """Opens the data that a recipe names.

    Both sources are normalised with the training images' mean and deviation (or those of the spec); only the
    training source is augmented. Data that bring no split of their own are split by class, as a function of `seed`;
    the embedded digits are always split in the same way.

    Args:
        spec: the data.
        seed: which items are held out where the data bring no split.

    Raises:
        UnknownNameError, MissingExtraError, RecipeError: nothing by this name, a missing package, or a wrong value.
        DamagedFileError: a file is truncated or not what its name says.
    """
    check_data(spec)
    kind, path = parse_data_name(spec.name)
    if is_text(spec):
        from limbeck.data.text.open import open_text

        return DataSplit(*open_text(kind, path, spec, seed))
    if kind == "pairs":
        from limbeck.data.pairs import open_pairs

        return DataSplit(*open_pairs(path, spec.validation, seed, spec.limit))
    train, validation = open_pictures(spec, seed)
    if spec.encoding is not None:
        from limbeck.data.encoded import encode

        encoded = encode(train, spec.encoding), encode(validation, spec.encoding, "validation")
        return DataSplit(*encoded)
    train.augmentations = tuple(spec.augment)
    if spec.whiten is not None:
        from limbeck.data.whitened import WhitenedSource, Whitening

        whitening = Whitening(train, spec.whiten)
        return DataSplit(WhitenedSource(train, whitening), WhitenedSource(validation, whitening))
    _normalise(spec, train, validation)
    return DataSplit(train, validation)


def open_pictures(spec: DataSpec, seed: int = 0) -> tuple[ImageSource, ImageSource]:
    """The images and captions of data, to train and to validate on, as they are before they are encoded or normalised.

    See `open_data`, which has checked the spec.
    """
    kind, path = parse_data_name(spec.name)
    train, validation = _reader(kind)(path, spec)
    if validation is None:
        kept, held = stratified_split(train.labels, spec.validation, 0 if kind == "digits" else seed)
        train, validation = train.select(kept), train.select(held)
    if spec.limit is not None and spec.limit < len(train):
        train = train.select(torch.arange(spec.limit))
    return train, validation


def _reader(kind: str) -> Reader:
    module, _, function = _READERS[kind].partition(":")
    return getattr(import_module(f"limbeck.data.readers.{module}"), function)


def _normalise(spec: DataSpec, train: ImageSource, validation: ImageSource) -> None:
    if spec.mean is not None or spec.std is not None:
        mean, std = train.normalisation
        train.set_normalisation(spec.mean or mean, spec.std or std)
    validation.set_normalisation(*train.normalisation)

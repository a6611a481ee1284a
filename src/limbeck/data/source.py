"""Sources: data sets that hand out batches by item number, without any state."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.randomness import generator
from limbeck.data.augment import augment

Normalisation = tuple[list[float], list[float]]
"""Mean and deviation of each channel, of images in [0, 1]."""


class Source(ABC):
    """Items of any kind by number; what `fetch` returns is a function of its arguments alone.

    Attributes:
        labels: class of each item (items,), int64; -100 where there is none.
        classes: number of classes, 0 where there are none.
    """

    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def varied(self) -> bool:
        """Whether an item looks different with each seed: it is augmented, or masked."""
        return False

    @abstractmethod
    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        """The items at `indices` (items,) as a batch with `index` (int64); a varied item is a function of `seed`."""

    @abstractmethod
    def select(self, rows: Tensor) -> "Source":
        """A source of the items at `rows`, renumbered from 0; it shares the storage where it can."""

    def info(self) -> DataInfo:
        """Number of items and classes, and two items as an example (one twice if there is only one)."""
        example = self.fetch(torch.arange(2) % len(self))
        return DataInfo(len(self), self.classes, example, labels=self.labels if self.classes else None)


class ImageSource(Source):
    """Labelled images by number.

    Subclasses call `_describe` once and implement `images` and `select`.

    Attributes:
        labels: class of each item (items,), int64; -100 where there is none.
        classes: number of classes.
        class_names: one name a class.
        augmentations: names of `data.augment.AUGMENTATIONS`, applied by `fetch` in this order when it gets a seed.
        captions: a text an item, for encoders; None where there are none.
    """

    class_names: tuple[str, ...]
    augmentations: tuple[str, ...]
    captions: tuple[str, ...] | None = None

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Images (items, channels, height, width) as they are stored: uint8, or float32 in [0, 1]."""

    @abstractmethod
    def select(self, rows: Tensor) -> "ImageSource":
        """See `Source.select`."""

    @property
    def varied(self) -> bool:
        """Whether items are augmented."""
        return bool(self.augmentations)

    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        """The items at `indices` as a batch with `image` (float32, normalised), `label` and `index` (int64).

        Args:
            indices: item numbers (items,), int64.
            seed: None leaves the images as they are; with a seed an item's augmentation is a function of the seed
                and the item's number, so it is the same in any batch, rank or worker.
        """
        affine = self._affine or self._measured()
        images = self.images(indices)
        scale = affine.byte_scale if images.dtype == torch.uint8 else affine.scale
        if seed is not None and self.augmentations:
            images = images.float() / 255 if images.dtype == torch.uint8 else images
            images, scale = augment(images, self.augmentations, seed, indices, affine.mean), affine.scale
        image = torch.addcmul(affine.shift, images.float(), scale)  # (x - mean) / std in one operation
        return Batch({"image": image, "label": self.labels.index_select(0, indices), "index": indices})

    def info(self) -> DataInfo:
        """See `Source.info`; with the normalisation."""
        return replace(super().info(), normalisation=self.normalisation)

    def _describe(
        self,
        labels: Tensor,
        classes: int | None,
        class_names: Sequence[str] | None,
        normalisation: Normalisation | None,
        augmentations: Sequence[str],
    ) -> None:
        check_not_empty(labels)
        self.labels = labels.to(torch.int64)
        highest = int(self.labels.max())
        self.classes = classes if classes is not None else max(highest + 1, len(class_names or ()))
        _check_labels(self.labels, self.classes)
        self.class_names = tuple(class_names or (str(label) for label in range(self.classes)))
        self.augmentations = tuple(augmentations)
        self._affine: _Affine | None = None  # measured when first needed: a split of this source may never need it
        if normalisation is not None:
            self.set_normalisation(*normalisation)

    @property
    def normalisation(self) -> Normalisation:
        """Per-channel (mean, deviation), of images in [0, 1], that `fetch` normalises with."""
        affine = self._affine or self._measured()
        return affine.mean.flatten().tolist(), affine.std.flatten().tolist()

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets what `fetch` normalises with: one number a channel, of images in [0, 1]; deviations above 0.

        Raises:
            IncompatibleError: the wrong number of channels, or a deviation that is not above 0.
        """
        channels = self.images(torch.zeros(1, dtype=torch.int64)).shape[1]
        if not len(mean) == len(std) == channels:
            raise IncompatibleError(
                f"the images have {channels} channels, but mean and std have {len(mean)} and {len(std)}",
                "give one number a channel in data.mean and data.std",
            )
        if min(std) <= 0:
            raise IncompatibleError(f"a standard deviation must be above 0, not {min(std)}")
        self._affine = _Affine.of(mean, std)

    def _chosen_normalisation(self) -> Normalisation | None:
        return None if self._affine is None else self.normalisation

    def _measured(self, most: int = 2000) -> "_Affine":
        # A sample settles mean and deviation to a percent. It is drawn, and always in the same way: evenly spaced items
        # of data in which the classes take turns would all be of one class.
        rows = torch.randperm(len(self), generator=generator(0, "normalisation"))[:most].sort().values
        images = self.images(rows)
        images = images.double() / 255 if images.dtype == torch.uint8 else images.double()
        std = images.std((0, 2, 3), correction=0)
        std = torch.where(std > 1e-6, std, 1.0)  # a constant channel is only centred
        self._affine = _Affine.of(images.mean((0, 2, 3)).tolist(), std.tolist())
        return self._affine


class _Affine(NamedTuple):
    """A normalisation as tensors (channels, 1, 1): image * scale + shift, with byte_scale for bytes."""

    mean: Tensor
    std: Tensor
    scale: Tensor
    byte_scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> "_Affine":
        centre, spread = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        return cls(centre, spread, 1 / spread, 1 / (255 * spread), -centre / spread)


class ArraySource(ImageSource):
    """Images held in memory.

    Args:
        images: (items, channels, height, width); uint8, or floats in [0, 1] (kept as float32).
        labels: class of each item (items,), -100 for none; None leaves all items without a label.
        classes: number of classes; the highest label + 1 if absent.
        class_names: one name a class; their numbers if absent.
        normalisation: per-channel (mean, deviation) of images in [0, 1]; measured if absent.
        augmentations: names of `data.augment.AUGMENTATIONS`.

    Raises:
        IncompatibleError: shapes that do not fit, labels out of range, or values that are not finite.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        *,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
        normalisation: Normalisation | None = None,
        augmentations: Sequence[str] = (),
    ) -> None:
        self._images = _as_images(images)
        rows = torch.full((len(self._images),), -100) if labels is None else torch.as_tensor(labels)
        if rows.shape != (len(self._images),):
            raise IncompatibleError(f"{len(self._images)} images, but labels of shape {tuple(rows.shape)}")
        self._describe(rows, classes, class_names, normalisation, augmentations)

    def images(self, indices: Tensor) -> Tensor:
        """See `ImageSource.images`."""
        return self._images.index_select(0, indices)

    def select(self, rows: Tensor) -> "ArraySource":
        """See `Source.select`; the images are copied."""
        return ArraySource(
            self._images[rows],
            self.labels[rows],
            classes=self.classes,
            class_names=self.class_names,
            normalisation=self._chosen_normalisation(),
            augmentations=self.augmentations,
        )


def check_not_empty(labels: Tensor) -> None:
    """Refuses a data set without items, as an `IncompatibleError`."""
    if not len(labels):
        raise IncompatibleError("a data set needs at least one item")


def _as_images(images: Any) -> Tensor:
    tensor = torch.as_tensor(images)
    if tensor.ndim != 4:
        raise IncompatibleError(
            f"images must be (items, channels, height, width), not {tuple(tensor.shape)}",
            "add the channel dimension of gray images with images[:, None]",
        )
    if tensor.dtype == torch.uint8:
        return tensor.contiguous()
    tensor = tensor.float().contiguous()
    if not tensor.isfinite().all():
        raise IncompatibleError("the images hold NaN or infinity")
    return tensor


def _check_labels(labels: Tensor, classes: int) -> None:
    wrong = (labels != -100) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        item = int(wrong.nonzero()[0])
        raise IncompatibleError(
            f"item {item} has the label {int(labels[item])}, outside 0 to {classes - 1}", "use -100 for 'no label'"
        )

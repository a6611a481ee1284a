"""A source whose pictures are decoded when they are asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.errors import IncompatibleError
from limbeck.data.decode import decode_picture
from limbeck.data.source import ImageSource, Normalisation, check_not_empty

CACHE_BYTES = 512 << 20
"""Decoded pictures are kept when all of a source's take no more than this, in bytes."""


class ItemSource(ImageSource):
    """Stored pictures; the first one settles the number of channels.

    Args:
        read: gives a picture's file (bytes or path) and its name in messages, by key.
        labels: class of each item (items,), -100 for none.
        keys: key of each item (items,), int64; 0, 1, 2 and so on if absent.
        image_size: side in pixels of the square that pictures are scaled to; None where all have one size.
        classes: number of classes; the highest label + 1 if absent.
        class_names: one name a class; their numbers if absent.
        normalisation: per-channel (mean, deviation) of images in [0, 1]; measured if absent.
        augmentations: names of `data.augment.AUGMENTATIONS`.
        captions: a text an item, for encoders.
        cache_bytes: see `CACHE_BYTES`.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[bytes | Path, object]],
        labels: Tensor,
        *,
        keys: Tensor | None = None,
        image_size: int | None = None,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
        normalisation: Normalisation | None = None,
        augmentations: Sequence[str] = (),
        captions: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.read, self.image_size, self.cache_bytes = read, image_size, cache_bytes
        self.captions = None if captions is None else tuple(captions)
        self.keys = torch.arange(len(labels)) if keys is None else keys
        check_not_empty(labels)
        self.shape = self._decode(0, channels=None).shape
        self._cache = self._empty_cache()
        self._decoded = torch.zeros(len(self.keys), dtype=torch.bool)
        self._describe(labels, classes, class_names, normalisation, augmentations)

    def images(self, indices: Tensor) -> Tensor:
        """See `ImageSource.images`.

        Raises:
            DamagedFileError: a picture cannot be decoded.
            IncompatibleError: a picture has another size than the first one.
        """
        if self._cache is None:
            return torch.stack([self._decode(item, self.shape[0]) for item in indices.tolist()])
        for item in indices[~self._decoded[indices]].unique().tolist():
            self._cache[item] = self._decode(item, self.shape[0])
            self._decoded[item] = True
        return self._cache.index_select(0, indices)

    def select(self, rows: Tensor) -> "ItemSource":
        """See `Source.select`."""
        return ItemSource(
            self.read,
            self.labels[rows],
            keys=self.keys[rows],
            image_size=self.image_size,
            classes=self.classes,
            class_names=self.class_names,
            normalisation=self._chosen_normalisation(),
            augmentations=self.augmentations,
            captions=None if self.captions is None else [self.captions[row] for row in rows.tolist()],
            cache_bytes=self.cache_bytes,
        )

    def _empty_cache(self) -> Tensor | None:
        if len(self.keys) * self.shape.numel() > self.cache_bytes:
            return None
        return torch.empty(len(self.keys), *self.shape, dtype=torch.uint8)  # memory is taken up as it is written to

    def _decode(self, item: int, channels: int | None) -> Tensor:
        stored, name = self.read(int(self.keys[item]))
        picture = decode_picture(stored, channels, self.image_size, name)
        if channels is not None and picture.shape != self.shape:
            size, expected = "x".join(map(str, picture.shape[1:])), "x".join(map(str, self.shape[1:]))
            raise IncompatibleError(f"{name} has {size} pixels and not {expected}", "set data.image_size")
        return picture

"""Whitened images: a source whose pixels are decorrelated as those of the training images ask for."""

from functools import cached_property

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.data.source import ImageSource, Source
from limbeck.synthesis.whitening import ZCA

_AT_ONCE = 1024


class Whitening:
    """The whitening of a source's images, found when it is first asked for.

    Args:
        source: the training images; they are fitted as they are, without augmentation.
        epsilon: see `ZCA.fit`.
    """

    def __init__(self, source: ImageSource, epsilon: float) -> None:
        self.source, self.epsilon = source, epsilon

    @cached_property
    def zca(self) -> ZCA:
        """The transform; a pass over all images and an eigendecomposition, the first time."""
        rows = torch.arange(len(self.source)).split(_AT_ONCE)
        return ZCA.fit((self.source.fetch(part)["image"] for part in rows), self.epsilon)


class WhitenedSource(Source):
    """Images in [0, 1], then whitened.

    Args:
        source: the images; its normalisation is set to none at all.
        whitening: shared by the training and the validation source.
    """

    def __init__(self, source: ImageSource, whitening: Whitening) -> None:
        channels = source.images(torch.zeros(1, dtype=torch.int64)).shape[1]
        source.set_normalisation([0.0] * channels, [1.0] * channels)
        self.source, self.whitening = source, whitening
        self.labels, self.classes = source.labels, source.classes

    @property
    def varied(self) -> bool:
        """Whether items are augmented, before they are whitened."""
        return self.source.varied

    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        """See `Source.fetch`."""
        batch = self.source.fetch(indices, seed)
        return batch.replace(image=self.whitening.zca(batch["image"]))

    def select(self, rows: Tensor) -> "WhitenedSource":
        """See `Source.select`; the whitening stays that of all items."""
        return WhitenedSource(self.source.select(rows), self.whitening)

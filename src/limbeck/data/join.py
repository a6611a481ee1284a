"""Several sources of images as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.errors import IncompatibleError
from limbeck.data.source import ImageSource, Normalisation


class JoinedSource(ImageSource):
    """The items of several sources, one source after the other; classes, normalisation and augmentations of the first.

    Args:
        parts: at least one source; images of one shape and one type.
        labels: class of each item (items,) in place of the parts' own, -100 for none.
        rows: which items of all (items,), int64, in which order; all of them if absent.
        normalisation: per-channel (mean, deviation); the first part's if absent.
        augmentations: names of `data.augment.AUGMENTATIONS`; the first part's if absent.

    Raises:
        IncompatibleError: nothing to join, or images of the parts differ in shape or type.
    """

    def __init__(
        self,
        parts: Sequence[ImageSource],
        labels: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        normalisation: Normalisation | None = None,
        augmentations: Sequence[str] | None = None,
    ) -> None:
        if not parts:
            raise IncompatibleError("there is no source to join")
        self.parts = list(parts)
        self._check_images()
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._rows = torch.arange(int(self._ends[-1])) if rows is None else rows
        own = torch.cat([part.labels for part in parts])[self._rows] if labels is None else labels
        if own.shape != self._rows.shape:
            raise IncompatibleError(f"{len(self._rows)} items, but labels of shape {tuple(own.shape)}")
        first = parts[0]
        self._describe(
            own,
            first.classes,
            first.class_names,
            normalisation or first.normalisation,
            first.augmentations if augmentations is None else augmentations,
        )

    def images(self, indices: Tensor) -> Tensor:
        """See `ImageSource.images`."""
        rows = self._rows[indices]
        owner = torch.searchsorted(self._ends, rows, right=True)
        pieces, places = [], []
        for number, part in enumerate(self.parts):
            mine = (owner == number).nonzero().flatten()
            if len(mine):
                pieces.append(part.images(rows[mine] - (self._ends[number] - len(part))))
                places.append(mine)
        return torch.cat(pieces)[torch.cat(places).argsort()]

    def select(self, rows: Tensor) -> "JoinedSource":
        """See `Source.select`; no image is copied."""
        return JoinedSource(
            self.parts,
            self.labels[rows],
            rows=self._rows[rows],
            normalisation=self._chosen_normalisation(),
            augmentations=self.augmentations,
        )

    def _check_images(self) -> None:
        samples = [part.images(torch.zeros(1, dtype=torch.int64))[0] for part in self.parts]
        kinds = {f"{tuple(sample.shape)} {sample.dtype}" for sample in samples}
        if len(kinds) > 1:
            raise IncompatibleError(
                f"images to join differ in shape or type: {', '.join(sorted(kinds))}", "bring them to one size first"
            )

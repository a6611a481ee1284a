"""The rows of a cache: every item once, or, where items look different in each epoch, once for every epoch."""

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.data.cache.errors import ForeignCacheError
from limbeck.data.loader import concatenate, fetch_view
from limbeck.data.source import Source


class Views:
    """What the teacher is shown, row by row.

    Row v · items + i is item i as epoch v shows it. Data that always look the same have one epoch. Varied data have
    two more rows at the end: their first two items as they are, which methods take for an example.

    Args:
        source: the data.
        seed: the loader's, of augmentation.
        epochs: epochs of varied data to hold.
    """

    def __init__(self, source: Source, seed: int = 0, epochs: int = 1) -> None:
        self.source, self.seed = source, seed
        self.epochs = epochs if source.varied else 1
        self.numbering = Numbering(len(source), self.epochs, source.varied)

    def __len__(self) -> int:
        return self.numbering.rows

    def fetch(self, rows: Tensor) -> Batch:
        """The batch at ascending `rows` (rows,), which may hold several epochs."""
        epochs, items = rows // len(self.source), rows % len(self.source)
        parts = []
        for epoch in epochs.unique_consecutive().tolist():
            chosen = items[epochs == epoch]
            if not self.source.varied:
                parts.append(self.source.fetch(chosen))
            elif epoch == self.epochs:
                parts.append(self.source.fetch(chosen).replace(view=torch.full_like(chosen, epoch)))
            else:
                parts.append(fetch_view(self.source, chosen, self.seed, epoch))
        return parts[0] if len(parts) == 1 else concatenate(parts)


class Numbering:
    """Which row of a cache a batch's items have; see `Views`.

    Args:
        items: items of the source.
        epochs: epochs held.
        varied: whether items look different in each epoch.
    """

    def __init__(self, items: int, epochs: int, varied: bool) -> None:
        self.items, self.epochs, self.varied = items, epochs, varied
        self.examples = min(2, items) if varied else 0

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.items * self.epochs + self.examples

    def of(self, batch: Batch) -> Tensor:
        """Rows (items,) int64, on the CPU, of a batch with `index` and, from an augmenting loader, `view`.

        Raises:
            ForeignCacheError: the items are not among those that the cache holds.
        """
        if "index" not in batch:
            raise ForeignCacheError("a batch without index cannot be looked up in a cache", "take a live teacher")
        index = batch["index"].cpu()
        if int(index.max()) >= self.items or int(index.min()) < 0:
            raise ForeignCacheError(
                f"item {int(index.max())} is not among the {self.items:,} of the cache",
                "these are other data",
                ("data",),
            )
        view = batch["view"].cpu() if "view" in batch else None
        if self.varied == (view is not None):
            return index if view is None else self._augmented(view) * self.items + index
        if view is None and int(index.max()) < self.examples:
            return self.epochs * self.items + index
        raise ForeignCacheError(
            f"the cache holds items {'as epochs of training show them' if self.varied else 'as they are'}, and not as "
            f"this batch does",
            "take a live teacher for it",
            ("augmentation",),
        )

    def _augmented(self, view: Tensor) -> Tensor:
        if int(view.max()) >= self.epochs:
            raise ForeignCacheError(
                f"epoch {int(view.max()) + 1} of augmented items is asked for, and the cache holds {self.epochs}",
                "raise cache.epochs and make the cache again",
                ("epochs",),
            )
        return view

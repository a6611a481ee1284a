"""The loader: which batches each rank sees at each step, a pure function of (seed, step)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limbeck.core.batch import Batch
from limbeck.core.errors import RecipeError
from limbeck.core.randomness import ItemOrder, derive
from limbeck.data.source import Source


class Loader:
    """Micro-batches of one rank, step by step.

    The items of a step are the same whatever `world`, `accumulate` and `workers` are: the global batch is cut into
    one contiguous part a rank, and each part into `accumulate` contiguous micro-batches. Nothing is drawn from the
    process's random streams.

    Args:
        source: the data.
        batch_size: items a step, over all ranks and micro-batches.
        seed: seed of order and augmentation.
        rank: number of this process, from 0.
        world: number of processes.
        accumulate: micro-batches a step in each process.
        workers: loader processes; 0 loads in the calling process.
        augment: augment or mask items as the source does, anew in each epoch; batches then tell the epoch as `view`.

    Raises:
        RecipeError: `batch_size` is not divisible by `world * accumulate`.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        augment: bool = True,
    ) -> None:
        if batch_size % (world * accumulate):
            raise RecipeError(
                "train.batch_size",
                f"{batch_size} items cannot be shared by {world} processes with {accumulate} micro-batches each",
                f"use a multiple of {world * accumulate}",
            )
        self.source, self.seed, self.workers = source, seed, workers
        self.augment = augment and source.varied
        self.batch_size, self.micro = batch_size, batch_size // (world * accumulate)
        self.share = range(rank * self.micro * accumulate, (rank + 1) * self.micro * accumulate)
        self._order = ItemOrder(len(source), batch_size, seed)

    def at(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, counted from 0, loaded in the calling process."""
        indices = self._order.at(step)[self.share.start : self.share.stop]
        batch = self._fetch(indices, step * self.batch_size + self.share.start)
        if len(indices) == self.micro:
            return [batch]
        return [batch.select(slice(start, start + self.micro)) for start in range(0, len(indices), self.micro)]

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of steps `start` to `stop - 1` in order."""
        if not self.workers or start >= stop:
            return (self.at(step) for step in range(start, stop))
        return iter(
            DataLoader(
                _Steps(self),
                sampler=range(start, stop),
                batch_size=None,
                num_workers=min(self.workers, stop - start),
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # else the iterator draws a number from the global stream
            )
        )

    def _fetch(self, indices: Tensor, position: int) -> Batch:
        if not self.augment:
            return self.source.fetch(indices)
        parts, epoch = [], position // len(self.source)
        while len(indices):
            within = (epoch + 1) * len(self.source) - position  # items left of this epoch
            parts.append(fetch_view(self.source, indices[:within], self.seed, epoch))
            indices, position, epoch = indices[within:], position + within, epoch + 1
        return parts[0] if len(parts) == 1 else concatenate(parts)


def fetch_view(source: Source, indices: Tensor, seed: int, epoch: int) -> Batch:
    """The items at `indices` as an epoch of training shows them, with the epoch's number as `view` (items,) int64.

    Args:
        source: the data.
        indices: item numbers (items,), int64.
        seed: the loader's.
        epoch: from 0.
    """
    batch = source.fetch(indices, derive(seed, "augment", epoch))
    return batch.replace(view=torch.full_like(indices, epoch))


class _Steps(Dataset[list[Batch]]):
    """The loader as a data set whose items are steps, for torch's worker processes."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, step: int) -> list[Batch]:
        return self.loader.at(step)


def _as_it_is(value: Any) -> Any:
    return value


def concatenate(parts: Sequence[Batch]) -> Batch:
    """Batches with the same fields as one."""
    return Batch({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

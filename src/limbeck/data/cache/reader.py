"""Reading a cache: any rows in any order, from memory-mapped shards, each checked when it is first opened."""

from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from limbeck.data.cache.errors import DamagedCacheError
from limbeck.data.cache.folder import SHARED, CacheFolder, check_file
from limbeck.data.cache.writer import OFFSETS

OPEN_SHARDS = 256
"""How many shards stay mapped at a time."""


class Rows(NamedTuple):
    """What is stored of some rows, on the CPU.

    Attributes:
        tensors: by name; one row an item, or, where the cache is of tokens, one row a token, item by item.
        counts: tokens an item (items,) int64; None where the cache is of items.
    """

    tensors: dict[str, Tensor]
    counts: Tensor | None


class CacheReader:
    """The stored tensors of a complete cache.

    Nothing is held in memory: what is read comes out of the system's page cache or from the disk.

    Args:
        folder: of the cache.
        open_shards: see `OPEN_SHARDS`.

    Raises:
        MissingCacheError: there is no cache, or it is not complete.
        DamagedCacheError: its description or its seal were altered.
    """

    def __init__(self, folder: Path | str, open_shards: int = OPEN_SHARDS) -> None:
        self.folder = CacheFolder(folder)
        self.description, self._entries = self.folder.opened()
        self._most = open_shards
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._checked: set[int] = set()

    def read(self, rows: Tensor) -> Rows:
        """What is stored of `rows` (items,) int64, in their order.

        Raises:
            DamagedCacheError: naming a shard that was altered since it was written.
        """
        numbers, place = torch.unique(rows // self.description.rows_per_shard, return_inverse=True)
        local = rows % self.description.rows_per_shard
        shards = [self._shard(number) for number in numbers.tolist()]
        items = [(place == order).nonzero().squeeze(1) for order in range(len(shards))]
        if OFFSETS not in shards[0]:
            places = [(chosen, local[chosen]) for chosen in items]
            return Rows(_gathered(shards, places, list(shards[0]), len(rows)), None)
        return self._read_tokens(shards, items, local)

    def _read_tokens(self, shards: list[dict[str, Tensor]], items: list[Tensor], local: Tensor) -> Rows:
        starts, counts = torch.empty_like(local), torch.empty_like(local)
        for shard, chosen in zip(shards, items, strict=True):
            offsets, rows = shard[OFFSETS], local[chosen]
            starts[chosen] = offsets[rows]
            counts[chosen] = offsets[rows + 1] - offsets[rows]
        ends = counts.cumsum(0)
        by_token = [
            (_ranges(ends[chosen] - counts[chosen], counts[chosen]), _ranges(starts[chosen], counts[chosen]))
            for chosen in items
        ]
        by_item = [(chosen, local[chosen]) for chosen in items]
        marks = [name for name in shards[0] if name.startswith("marks.")]
        names = [name for name in shards[0] if name not in (*marks, OFFSETS)]
        found = _gathered(shards, by_item, marks, len(local)) | _gathered(shards, by_token, names, int(counts.sum()))
        return Rows(found, counts)

    @cached_property
    def shared(self) -> dict[str, Tensor]:
        """What all items share: `weight` and `bias` of an output head.

        Raises:
            DamagedCacheError: the file was altered since it was written.
        """
        if self.description.shared is None:
            return {}
        path = self.folder.path / SHARED
        check_file(path, self.description.shared)
        return load_file(path)

    def _shard(self, number: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped and not read; the one that was not used for longest is let go for a new one."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder.shard(number)
        if number not in self._checked:
            check_file(path, self._entries[number])
            self._checked.add(number)
        self._open[number] = _mapped(path)
        if len(self._open) > self._most:
            self._open.popitem(last=False)
        return self._open[number]


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise DamagedCacheError(path, str(error)) from error


def _ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """The numbers `start` to `start + count - 1` of every pair, one after the other."""
    ends = counts.cumsum(0)
    return torch.arange(int(counts.sum())) + (starts - ends + counts).repeat_interleave(counts)


def _gathered(
    shards: list[dict[str, Tensor]], places: list[tuple[Tensor, Tensor]], names: list[str], rows: int
) -> dict[str, Tensor]:
    """Tensors of `rows` rows, put together from (rows here, rows there) of each shard."""
    found = {}
    for name in names:
        parts = [shard[name] for shard in shards]
        whole = torch.empty(rows, *parts[0].shape[1:], dtype=parts[0].dtype)
        for part, (here, there) in zip(parts, places, strict=True):
            whole[here] = part[there]
        found[name] = whole
    return found

"""Filling a cache: shard by shard, resumable after any end, by as many processes as like."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.specs import CacheSpec
from limbeck.core.teacher import Teacher
from limbeck.data.cache.errors import DamagedCacheError
from limbeck.data.cache.folder import DESCRIPTION, SEAL, SHARED, CacheFolder, Description
from limbeck.data.cache.key import CacheKey
from limbeck.data.cache.signals import Content, Recorder
from limbeck.data.cache.views import Views

SHARD_BYTES = 128 << 20
"""About how large a shard grows, in bytes; what a crash can cost at most."""

OFFSETS = "offsets"
"""Name of the tensor (rows + 1,) int64 that says where each row's tokens begin in a shard."""

_POLL = 0.1  # seconds between looks at what another process is doing


def fill_cache(
    folder: Path | str,
    teacher: Teacher,
    views: Views,
    spec: CacheSpec,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int, int], None] = lambda done, rows: None,
    pause: Callable[[], None] = lambda: None,
) -> Description:
    """Runs a teacher over all rows that are not stored yet, and returns what the cache holds.

    A shard is claimed by a lock that dies with its holder, so processes and machines that share the folder can work at
    once. Finished shards are read again, and made again where a byte of them changed.

    Args:
        folder: created if need be.
        teacher: who is asked.
        views: what the teacher is shown.
        spec: what is kept.
        batch_size: items at a time. A training step of as many items per micro-batch gives the same bits when it runs
            the teacher itself; other shapes may differ in the last one.
        device: where the teacher runs.
        shard_bytes: see `SHARD_BYTES`.
        report: receives (rows there, rows in all) after every shard.
        pause: called between batches; raises `Interrupted` when the work was asked to stop.

    Raises:
        ForeignCacheError: the folder holds a cache of something else.
        UsageError: the folder holds something else, or the teacher does not give what is to be stored.
        DiskFullError: there is no room; what is there is whole.
    """
    return _Writer(CacheFolder(folder), teacher, views, spec, batch_size, torch.device(device), report, pause).fill(
        shard_bytes
    )


class _Writer:
    """One process's part of the work."""

    def __init__(
        self,
        folder: CacheFolder,
        teacher: Teacher,
        views: Views,
        spec: CacheSpec,
        batch_size: int,
        device: torch.device,
        report: Callable[[int, int], None],
        pause: Callable[[], None],
    ) -> None:
        self.folder, self.views, self.batch_size, self.device = folder, views, batch_size, device
        self.report, self.pause = report, pause
        self.key = CacheKey.of(spec, views, teacher)
        self.recorder = Recorder(teacher, spec, views.source)
        teacher.to(device)

    def fill(self, shard_bytes: int) -> Description:
        """All shards, then the seal."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with self.folder.holding("cache"):
            self.folder.clear_leftovers(DESCRIPTION, SHARED, SEAL)
            description = self._description(shard_bytes)
        left = list(range(description.shards))
        while left:
            busy = [shard for shard in left if not self._make(description, shard)]
            self.report(description.rows - sum(_length(description, shard) for shard in busy), description.rows)
            if len(busy) == len(left):
                self.pause()
                time.sleep(_POLL)
            left = busy
        with self.folder.holding("cache"):
            self.folder.seal(description)
        return description

    def _description(self, shard_bytes: int) -> Description:
        """That of the cache in the folder, or of a new one, whose sizes are read off a first batch."""
        try:
            found = self.folder.describe()
            if found is not None:
                self.key.check(found.key, self.folder.path)
                return found
            self.folder.refuse_foreign_files()
        except DamagedCacheError as error:
            warnings.warn(f"{error.message}; describing the cache anew", stacklevel=4)
        return self._begin(shard_bytes)

    def _begin(self, shard_bytes: int) -> Description:
        content = self._ask(0)
        row = max(1, sum(tensor.nbytes for tensor in (content.items | content.tokens).values()) // self.batch_size)
        most = -(-len(self.views) // self.batch_size)
        batches = min(max(1, shard_bytes // (row * self.batch_size)), most)
        description = Description(
            key=self.key,
            rows=len(self.views),
            rows_per_shard=batches * self.batch_size,
            items=len(self.views.source),
            shift=self.recorder.shift,
            given=content.given,
            shared=None,
        )
        return self.folder.begin(description, content.shared)

    def _make(self, description: Description, shard: int) -> bool:
        """Makes a shard if need be; returns False where another process is at it."""
        with self.folder.holding(self.folder.shard(shard).stem, wait=False) as mine:
            if not mine:
                return False
            if not self.folder.is_whole(description, shard):
                self.folder.clear_leftovers(self.folder.shard(shard).stem)
                self.folder.write_shard(description, shard, self._tensors(*description.stretch(shard)))
        self.report(description.stretch(shard)[1], description.rows)
        return True

    def _tensors(self, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of a stretch of rows."""
        parts = []
        for first in range(start, stop, self.batch_size):
            self.pause()
            parts.append(self._ask(first).first(stop - first))
        return _joined(parts)

    def _ask(self, first: int) -> Content:
        """What the teacher says of a whole batch from row `first` on; the last row fills up the last batch."""
        rows = torch.arange(first, first + self.batch_size).clamp_max(len(self.views) - 1)
        return self.recorder(self.views.fetch(rows).to(self.device))


def _joined(parts: list[Content]) -> dict[str, Tensor]:
    tensors = {name: torch.cat([part.items[name] for part in parts]) for name in parts[0].items}
    if parts[0].counts is not None:
        counts = torch.cat([part.counts for part in parts if part.counts is not None])
        tensors[OFFSETS] = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        tensors |= {name: torch.cat([part.tokens[name] for part in parts]) for name in parts[0].tokens}
    return tensors


def _length(description: Description, shard: int) -> int:
    start, stop = description.stretch(shard)
    return stop - start

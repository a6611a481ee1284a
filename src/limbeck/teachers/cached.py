"""A teacher whose answers are read from a cache."""

import fnmatch
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError, did_you_mean
from limbeck.core.teacher import TeacherSignal
from limbeck.data.cache.codec import TopK, TopKCodec
from limbeck.data.cache.items import check_marks, marks_of
from limbeck.data.cache.key import CacheKey
from limbeck.data.cache.reader import CacheReader, Rows
from limbeck.data.cache.signals import CODEC, FEATURE, HIDDEN, LOGITS, RECORDS
from limbeck.data.cache.views import Numbering
from limbeck.language.predictions import TokenSignal
from limbeck.objectives.fused_head import DenseTeacher, HiddenTeacher, TopKTeacher
from limbeck.objectives.topk import spread_uniformly


class CachedTeacher:
    """What a teacher said about the training data, from the disk; a `Teacher`.

    Stored in float32 the answers are bit by bit those of the teacher itself. Batches are looked up by `index`, and
    `view` where the loader augments; each item is compared with what the teacher was shown.

    Args:
        folder: of a complete cache.
        key: what the cache has to be of; anything if absent.

    Attributes:
        layers: paths of the layers whose outputs are stored.

    Raises:
        MissingCacheError: there is no cache, or it is not complete.
        ForeignCacheError: it is a cache of something else; the message says what differs.
        DamagedCacheError: a file of it was altered; shards are checked when they are first read.
    """

    def __init__(self, folder: Path | str, key: CacheKey | None = None) -> None:
        self.reader = CacheReader(folder)
        self.description = self.reader.description
        stored = self.description.key
        if key is not None:
            key.check(stored, folder)
        self.numbering = Numbering(self.description.items, stored.epochs or 1, stored.epochs is not None)
        given = self.description.given
        self.layers = tuple(name.removeprefix(FEATURE) for name in given if name.startswith(FEATURE))
        shared = self.reader.shared
        self.codec = TopKCodec.of_header(shared[CODEC]) if CODEC in shared else None
        self.head: tuple[Tensor, Tensor | None] | None = None
        if HIDDEN in given:
            self.head = shared["weight"], shared.get("bias")

    def signal(self, batch: Batch, layers: Sequence[str] = ()) -> TeacherSignal:
        """Stored logits (items, classes) and outputs of `layers` (paths or globs); see `Teacher`.

        Of a top-k cache the classes that are not stored share the probability that is left evenly.

        Raises:
            IncompatibleError: a layer that is not stored, or a cache of tokens.
            ForeignCacheError: an item that the teacher was not shown.
        """
        wanted = self._matched(layers)
        rows = self._rows(batch)
        if rows.counts is not None:
            raise IncompatibleError(
                "this cache holds what a teacher says about tokens", "use a method for language models"
            )
        device = next(iter(batch.values())).device
        logits = self._tensor(rows, LOGITS, device) if LOGITS in rows.tensors else None
        if self.codec is not None:
            found = self._top_k(rows, device)
            logits = spread_uniformly(found.ids, found.log_probs, self.codec.vocab)
        return TeacherSignal(logits, {path: self._tensor(rows, f"{FEATURE}{path}", device) for path in wanted})

    def tokens(self, batch: Batch) -> TokenSignal:
        """Hidden states with the head, logits, or the most probable tokens, of the tokens that count.

        Raises:
            IncompatibleError: a cache that is not of tokens.
            ForeignCacheError: an item that the teacher was not shown, or of which other tokens count.
        """
        rows = self._rows(batch)
        if rows.counts is None:
            raise IncompatibleError("this cache does not hold what a teacher says about tokens", "make another cache")
        device = next(iter(batch.values())).device
        if self.codec is not None:
            found = self._top_k(rows, device)
            return TopKTeacher(found.ids, found.log_probs)
        if self.head is not None:
            weight, bias = self.head
            return HiddenTeacher(self._tensor(rows, HIDDEN, device), weight, bias)
        return DenseTeacher(self._tensor(rows, LOGITS, device))

    def to(self, device: torch.device) -> None:
        """Moves the head, where there is one; all else follows the batches."""
        if self.head is not None:
            weight, bias = self.head
            self.head = weight.to(device), None if bias is None else bias.to(device)

    @property
    def fingerprint(self) -> str:
        """The teacher's own hash where the cache says what it says, else one of that and of what was left out."""
        key = self.description.key
        exact = key.dtype == "float32"
        return str(key.teacher) if exact else hashlib.sha256(f"{key.teacher}:{key.dtype}:{key.k}".encode()).hexdigest()

    def _rows(self, batch: Batch) -> Rows:
        rows = self.reader.read(self.numbering.of(batch))
        check_marks(batch, marks_of(batch, self.description.shift), rows.tensors)
        return rows

    def _tensor(self, rows: Rows, name: str, device: torch.device) -> Tensor:
        """A stored tensor in the precision in which the teacher gave it."""
        return rows.tensors[name].to(device).to(getattr(torch, self.description.given[name]))

    def _top_k(self, rows: Rows, device: torch.device) -> TopK:
        assert self.codec is not None
        return self.codec.decode(rows.tensors[RECORDS].to(device))

    def _matched(self, patterns: Sequence[str]) -> list[str]:
        """Stored layers that match, each pattern's in the order in which they are stored."""
        found: list[str] = []
        for pattern in patterns:
            matches = [pattern] if pattern in self.layers else fnmatch.filter(self.layers, pattern)
            if not matches:
                raise IncompatibleError(f"the cache holds no layer '{pattern}'", did_you_mean(pattern, self.layers))
            found += [path for path in matches if path not in found]
        return found

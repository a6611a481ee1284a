"""One micro-batch: named tensors whose first dimension runs over the items."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Batch(Mapping[str, Tensor]):
    """Named tensors of one micro-batch, read by name or as attributes; the first dimension of each is the items.

    Names used throughout: `image` (items, channels, height, width), `input_ids` and `attention_mask` (items, length),
    `labels` (items, length) token targets with -100 for none, `label` (items,) with -100 for "no label", `index`
    (items,) the position of each item in its data set, `view` (items,) the epoch whose augmentation an item shows.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise ValueError("a batch needs at least one tensor")
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __getattr__(self, name: str) -> Any:
        # `_tensors` is looked up through the instance dictionary so that unpickling, which calls this before
        # __init__, does not recurse.
        tensors = self.__dict__.get("_tensors", {})
        if name in tensors:
            return tensors[name]
        raise AttributeError(f"this batch has no '{name}'; it holds {', '.join(tensors)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def size(self) -> int:
        """How many items the batch holds."""
        return next(iter(self._tensors.values())).shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device (non-blocking); itself when it is there already."""
        if all(tensor.device == torch.device(device) for tensor in self._tensors.values()):
            return self
        return Batch({name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors.items()})

    def replace(self, **tensors: Tensor) -> "Batch":
        """A batch with some tensors exchanged or added."""
        return Batch({**self._tensors, **tensors})

    def select(self, rows: Tensor | slice) -> "Batch":
        """The items at `rows` (indices, mask or slice)."""
        return Batch({name: tensor[rows] for name, tensor in self._tensors.items()})

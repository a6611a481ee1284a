"""Peak memory of a piece of code: what its tensors hold, not what the process holds."""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory:
    """Context manager that measures the most memory alive at once in tensors created inside it.

    On the CPU it follows every storage that an operation returns, from creation to release; what a kernel allocates for
    itself in between is not seen. On a GPU it asks the allocator, which sees that too.

    Attributes:
        peak_bytes: the most bytes alive at once so far, beyond those alive at entry.

    Example::

        with PeakMemory() as memory:
            loss = head(hidden).log_softmax(-1).sum()
            loss.backward()
        print(memory.peak_bytes / 2**20, "MiB")
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._storages = _Storages()
        self._at_entry = 0

    @property
    def peak_bytes(self) -> int:
        if self.device.type == "cpu":
            return self._storages.peak
        return torch.cuda.max_memory_allocated(self.device) - self._at_entry

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cpu":
            self._storages.__enter__()
        else:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._at_entry = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cpu":
            self._storages.__exit__(kind, error, trace)
        else:
            torch.cuda.synchronize(self.device)


class _Storages(TorchDispatchMode):
    """Counts the bytes of living storages that operations under this mode have created."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_identity(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            # A view or an in-place result lives in a storage that was there before.
            if isinstance(leaf, Tensor) and _identity(leaf) not in given:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

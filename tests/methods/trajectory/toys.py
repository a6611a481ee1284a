"""Linear networks, batches and builders for the tests of trajectory methods."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import Clock, DataInfo, Method, Update
from limbeck.core.registry import method_class
from limbeck.core.teacher import LiveTeacher
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Process, note_process


class Linear(nn.Module):
    """F(x, time) = a x + b time, the toy of the recorded losses."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The prediction."""
        return self.a * x + self.b * time.reshape(-1, *[1] * (x.ndim - 1))


class Given(ItemNoise):
    """Draws that were recorded, by key; any other key is drawn as usual."""

    def __init__(self, items: int, **recorded: Tensor) -> None:
        super().__init__(0, torch.arange(items))
        self.recorded = recorded

    def uniform(self, key: str) -> Tensor:
        """See `ItemNoise.uniform`."""
        return self.recorded.get(key, super().uniform(key))

    def normal(self, key: str, like: Tensor) -> Tensor:
        """See `ItemNoise.normal`."""
        return self.recorded[key] if key in self.recorded else super().normal(key, like)


def images(x0: Tensor, labels: Tensor | None = None) -> Batch:
    """A batch of items with their numbers, and labels where given."""
    fields = {"image": x0, "index": torch.arange(len(x0))}
    return Batch(fields if labels is None else {**fields, "label": labels})


def info(x0: Tensor, classes: int = 0) -> DataInfo:
    """What a method knows of such data."""
    return DataInfo(len(x0), classes, images(x0[:2]))


def build(
    slug: str, student: nn.Module, x0: Tensor, *, teacher: nn.Module | None = None, classes: int = 0, **options: Any
) -> Any:
    """A method on given data."""
    kind = method_class(slug)
    speaking = None if teacher is None else LiveTeacher(teacher)
    method = kind(kind.Options(**options), student=student, teacher=speaking, data=info(x0, classes))
    assert isinstance(method, Method)
    method.clock = Clock(0, 100, 0.0, 7)
    return method


def with_process(network: nn.Module, process: Process) -> nn.Module:
    """The network with its process noted."""
    return note_process(network, process)


def only_update(method: Method, batch: Batch) -> Update:
    """The one update of a step."""
    (update,) = method.step(batch)
    return update

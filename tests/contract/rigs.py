"""Tiny data, teachers and students, one rig a task: what the contract suite trains every method on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.method import Method
from limbeck.core.randomness import reseed
from limbeck.core.registry import MethodClass
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Row, Trainer
from limbeck.data.loader import Loader
from limbeck.data.source import ArraySource, Source
from limbeck.models.convnet import ConvNet


class Rig(ABC):
    """What the methods of one task are tried on; a new task adds a subclass to `RIGS`.

    Attributes:
        source: a few dozen items.
    """

    source: Source

    @abstractmethod
    def student(self, per_item: bool) -> nn.Module:
        """A fresh student from torch's stream; `per_item` without layers that tie the items of a batch together."""

    @abstractmethod
    def teacher(self) -> nn.Module:
        """A fresh teacher from torch's stream, with buffers that a train mode would move."""

    def method(self, kind: MethodClass, seed: int = 0, per_item: bool = False) -> Method:
        """A method with the tiny options of its card, everything fresh from the seed."""
        card = kind.card
        reseed(seed, "models")
        teacher = LiveTeacher(self.teacher()) if "teacher" in card.needs else None
        student = self.student(per_item)
        made = kind(kind.Options(**card.tiny), student=student, teacher=teacher, data=self.source.info())
        assert isinstance(made, Method)
        return made

    def trainer(
        self,
        method: Method,
        seed: int = 0,
        *,
        steps: int = 3,
        accumulate: int = 1,
        rows: list[Row] | None = None,
        folder: Path | None = None,
        **spec: Any,
    ) -> Trainer:
        """A trainer with batches of eight that logs every step."""
        precise = next(method.student.parameters()).dtype
        return Trainer(
            method,
            Cast(Loader(self.source, 8, seed, accumulate=accumulate), precise),
            TrainSpec(steps=steps, batch_size=8, accumulate=accumulate, log_every=1, checkpoint_every=2, **spec),
            steps=steps,
            items=len(self.source),
            seed=seed,
            record=(rows if rows is not None else []).append,
            checkpoints=None if folder is None else Checkpoints(folder),
        )

    def outputs(self, model: nn.Module) -> Tensor:
        """What a result makes of the data, in eval mode."""
        with torch.no_grad():
            return model.eval()(self.source.fetch(torch.arange(8)).image)


class Cast:
    """A loader whose floating-point tensors come in another precision."""

    def __init__(self, loader: Loader, dtype: torch.dtype) -> None:
        self.loader, self.dtype = loader, dtype

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """See `Loader.steps`."""
        for micro_batches in self.loader.steps(start, stop):
            yield [Batch({name: self._cast(value) for name, value in batch.items()}) for batch in micro_batches]

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


class Classification(Rig):
    """Digits-like images and convolutional networks."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        images = torch.rand(40, 1, 8, 8, generator=draws)
        self.source = ArraySource(images, torch.arange(40) % 10)

    def student(self, per_item: bool) -> nn.Module:
        return ConvNet(width=4, depth=3, norm="none" if per_item else "batch")

    def teacher(self) -> nn.Module:
        return ConvNet(width=6, depth=3)


RIGS: dict[str, Rig] = {"classification": Classification()}
"""One rig by `Card.task`."""

SGD = OptimizerSpec(name="sgd", lr=1e-3, momentum=0.9, schedule="constant")


def rig_of(kind: MethodClass) -> Rig:
    """The rig of a method's task."""
    assert kind.card.task in RIGS, f"task '{kind.card.task}' of '{kind.card.slug}' has no rig yet: add one to RIGS"
    return RIGS[kind.card.task]

"""Small data and teachers, and a cache of them in many shards."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.specs import CacheSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.data.cache.folder import Description
from limbeck.data.cache.views import Views
from limbeck.data.cache.writer import fill_cache
from limbeck.data.source import ArraySource
from limbeck.models.shipped import build_shipped

ITEMS, CLASSES, BATCH = 50, 5, 8


def source(*augmentations: str, seed: int = 0, items: int = ITEMS) -> ArraySource:
    """Random images with labels."""
    draws = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (items, 1, 8, 8), generator=draws, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (items,), generator=draws)
    return ArraySource(images, labels, classes=CLASSES, augmentations=augmentations)


def teacher(seed: int = 1) -> LiveTeacher:
    """A small convolutional network, the same for the same seed."""
    torch.manual_seed(seed)
    return LiveTeacher(build_shipped("convnet", {"width": 4, "depth": 2, "classes": CLASSES, "channels": 1}))


def spec(**changes: Any) -> CacheSpec:
    """What to store; the folder's name plays no part here."""
    return CacheSpec(folder="unused", **changes)


def fill(folder: Path, data: Any = None, live: Any = None, seed: int = 0, epochs: int = 1, **more: Any) -> Description:
    """A cache of shards of 16 rows or so, by default of logits."""
    options = {"batch_size": BATCH, "shard_bytes": 2000, **more}
    wanted = options.pop("spec", spec())
    data = source() if data is None else data
    return fill_cache(folder, live or teacher(), Views(data, seed, epochs), wanted, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a cache by name, locks left out."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


class Slow(nn.Module):
    """Takes its time, so that there is time to kill who asks; notes in a file how often it was asked."""

    def __init__(self, inner: nn.Module, seconds: float, log: Path | None = None) -> None:
        super().__init__()
        self.inner, self.seconds, self.log = inner, seconds, log

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()}\n")
        return self.inner(image)


def batch(rows: list[int], data: Any = None) -> Batch:
    """Items as they are."""
    return (source() if data is None else data).fetch(torch.tensor(rows))

"""What the tests of models tell them about their data."""

import torch

from limbeck.core.batch import Batch
from limbeck.core.method import DataInfo


def information(channels: int = 1, size: int = 8, classes: int = 10) -> DataInfo:
    """Two random images of the given shape, always the same."""
    image = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    example = Batch({"image": image, "label": torch.tensor([0, 1]), "index": torch.tensor([0, 1])})
    return DataInfo(items=100, classes=classes, example=example)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models hold the same tensors under the same names."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

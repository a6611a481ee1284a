"""Watches for a generator that has collapsed, and for a discriminator that has nothing left to learn."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_WORDS = {
    "variance": "the samples vary less than a tenth as much as the data",
    "coverage": "the samples lie next to less than a tenth of the data",
    "accuracy": "the discriminator tells nearly all samples from data",
}
_ADVICE = "raise critic_updates, or lower the student's learning rate"
_EVERY = 100


@torch.no_grad()
def spread(samples: Tensor, data: Tensor) -> dict[str, Tensor]:
    """How a batch of samples (items, ...) compares with data of the same shape.

    `variance` is the samples' variance over that of the data; `coverage` the share of data that are nearest to some
    sample (about .6 for equal distributions, 1 / modes of that where all samples are in one of several). A single item
    says nothing of either, and counts as healthy.
    """
    samples, data = samples.flatten(1).float(), data.flatten(1).float()
    if len(data) < 2:
        return {"variance": data.new_ones(()), "coverage": data.new_ones(())}
    ratio = samples.var(0).sum() / data.var(0).sum().clamp(min=1e-12)
    nearest = torch.cdist(samples, data).argmin(1)
    covered = data.new_zeros(len(data)).index_fill(0, nearest, 1.0)
    return {"variance": ratio, "coverage": covered.mean()}


@torch.no_grad()
def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share of a discriminator's logits on the right side; each kind counts half."""
    return ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2


class CollapseMonitor(nn.Module):
    """Moving averages of what is recorded, from a healthy start; warns once of each that stays bad.

    The device is asked only at every hundredth update.
    """

    average: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("average", torch.tensor([1.0, 1.0, 0.5]))
        self._warned: set[str] = set()

    def watch(self, logs: Mapping[str, Tensor], step: int) -> None:
        """Takes in the logs of one update; warns where an average has become bad."""
        if not logs.keys() & _WORDS.keys():
            return
        for place, name in enumerate(_WORDS):
            if name in logs:
                self.average[place].lerp_(logs[name].detach().to(self.average), 1 - self.decay)
        if step % _EVERY == 0:
            self._judge()

    def _judge(self) -> None:
        bad = torch.cat([self.average[:2] < 0.1, self.average[2:] > 0.99])
        for name, is_bad in zip(_WORDS, map(bool, bad.cpu()), strict=True):
            if is_bad and name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"collapse: {_WORDS[name]}; {_ADVICE}", stacklevel=2)

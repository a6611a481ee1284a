"""Random numbers as a function of (seed, item, place): the same for an item whatever batch, rank or worker it is in."""

import math

import torch
from torch import Tensor

from limbeck.core.randomness import derive

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # constants of SplitMix64 (Steele et al. 2014), as signed 64-bit integers
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def uniforms(seed: int, items: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), shape (items, count), float32; row i depends on `seed` and `items[i]` alone.

    Args:
        seed: 63 bits, as from `core.randomness.derive`.
        items: item numbers (items,), int64.
        count: how many numbers an item.
    """
    rows = _mix(items * _GOLDEN + seed)
    places = torch.arange(1, count + 1, device=items.device) * _GOLDEN
    bits = _mix(rows[:, None] + places)
    return _shift(bits, 40).float() / (1 << 24)  # 24 bits: all that float32 holds exactly


class ItemNoise:
    """What a training step draws for the items of a batch, each its own, whatever micro-batch or rank it is in.

    So gradient accumulation and the number of processes change nothing about what is learned.

    Args:
        seed: of the step, shared by all ranks: `Clock.seed`.
        items: item numbers (items,), int64.
    """

    def __init__(self, seed: int, items: Tensor) -> None:
        self.seed, self.items = seed, items

    def uniform(self, key: str) -> Tensor:
        """One uniform number in [0, 1) an item (items,), float32; another for each key."""
        return uniforms(derive(self.seed, key), self.items, 1)[:, 0]

    def integers(self, key: str, high: int | Tensor) -> Tensor:
        """One whole number an item in [0, high), int64; `high` is one number, or one an item."""
        return (self.uniform(key).double() * high).long()

    def normal(self, key: str, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape (items, ...) and precision of `like`, by Box and Muller's transform."""
        count = like[0].numel()
        half = (count + 1) // 2
        draws = uniforms(derive(self.seed, key), self.items, 2 * half)
        radius = (-2 * torch.log1p(-draws[:, :half])).sqrt_()
        angle = draws[:, half:] * (2 * math.pi)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :count].reshape(like.shape).to(like.dtype)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: Tensor, places: int) -> Tensor:
    # int64 shifts carry the sign; the mask makes the shift a logical one.
    return (value >> places) & ((1 << (64 - places)) - 1)

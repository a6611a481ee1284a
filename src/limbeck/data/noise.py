"""Random numbers as a function of (seed, item, place): the same for an item whatever batch, rank or worker it is in."""

import torch
from torch import Tensor

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
    places = torch.arange(1, count + 1) * _GOLDEN
    bits = _mix(rows[:, None] + places)
    return _shift(bits, 40).float() / (1 << 24)  # 24 bits: all that float32 holds exactly


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: Tensor, places: int) -> Tensor:
    # int64 shifts carry the sign; the mask makes the shift a logical one.
    return (value >> places) & ((1 << (64 - places)) - 1)

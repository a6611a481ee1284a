"""Integers in as few bits as they need: rows of fields of one width."""

import torch
from torch import Tensor


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` fields of `width` bits take."""
    return -(-count * width // 8)


def pack(values: Tensor, width: int) -> Tensor:
    """Rows of fields (rows, count), each below 2^width, as bytes (rows, bytes), least significant bit first.

    Args:
        values: integers, not negative.
        width: bits of a field, 0 to 24.
    """
    rows, count = values.shape
    words = torch.zeros(rows, packed_bytes(count, width) + 4, dtype=torch.int32, device=values.device)
    first, shift = _places(count, width, values.device)
    shifted = values.to(torch.int64) << shift  # at most 24 + 7 bits
    for byte in range(_spanned(width)):
        # Fields share bytes but no bits, so a sum is an or.
        part = ((shifted >> (8 * byte)) & 255).to(torch.int32)
        words.scatter_add_(1, (first + byte).expand(rows, -1), part)
    return words[:, : packed_bytes(count, width)].to(torch.uint8)


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """The inverse of `pack`: fields (rows, count) as int32."""
    if width == 0:
        return torch.zeros(len(packed), count, dtype=torch.int32, device=packed.device)
    first, shift = _places(count, width, packed.device)
    last = packed.shape[1] - 1
    word = torch.zeros(len(packed), count, dtype=torch.int32, device=packed.device)
    for byte in range(_spanned(width)):
        # Beyond the last byte there are no bits of any field: what is read there is masked away.
        word |= packed.index_select(1, (first + byte).clamp_max(last)).to(torch.int32) << (8 * byte)
    return (word >> shift.to(torch.int32)) & ((1 << width) - 1)


def _places(count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The byte in which each field begins, and the bit within it, both (count,) int64."""
    start = torch.arange(count, device=device) * width
    return start >> 3, start & 7


def _spanned(width: int) -> int:
    """Bytes over which a field may spread."""
    return (width + 7 + 7) // 8

"""Sorted sets in as few bits as they need, in Elias and Fano's form."""

import torch
from torch import Tensor

from limbeck.compression.packing import pack, packed_bytes, unpack


class SortedSets:
    """Sets of `count` distinct integers below `universe`, each in the same number of bytes (Elias 1974, Fano 1971).

    The low bits of each member are stored as they are. The high bits become a row of bits in which member i, of high
    part h, sets bit h + i: as members are sorted, each sets its own. Together that is at most two bits a member more
    than any code must spend.

    Args:
        count: members of a set, at least 1.
        universe: members are 0 to universe - 1; at least `count`.
    """

    def __init__(self, count: int, universe: int) -> None:
        self.count, self.universe = count, universe
        self.low = max(0, (universe // count).bit_length() - 1)
        self.unary = count + ((universe - 1) >> self.low)  # bits of the high part
        self.low_bytes, self.unary_bytes = packed_bytes(count, self.low), packed_bytes(self.unary, 1)

    @property
    def size(self) -> int:
        """Bytes of a set."""
        return self.low_bytes + self.unary_bytes

    def encode(self, members: Tensor) -> Tensor:
        """Bytes (sets, size) of sets (sets, count), each ascending."""
        device, members = members.device, members.to(torch.int64)
        places = (members >> self.low) + torch.arange(self.count, device=device)
        bits = torch.zeros(len(members), 8 * self.unary_bytes, dtype=torch.uint8, device=device)
        bits.scatter_(1, places, 1)
        weights = (1 << torch.arange(8, device=device)).to(torch.uint8)
        high = (bits.view(len(members), self.unary_bytes, 8) * weights).sum(-1, dtype=torch.uint8)
        return torch.cat([pack(members & ((1 << self.low) - 1), self.low), high], 1)

    def decode(self, stored: Tensor) -> Tensor:
        """The inverse of `encode`: (sets, count) as int64, ascending.

        Raises:
            ValueError: the bytes hold no such sets.
        """
        low = unpack(stored[:, : self.low_bytes], self.count, self.low)
        high = stored[:, self.low_bytes :]
        bits = (high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=stored.device)) & 1
        places = bits.flatten(1).nonzero()[:, 1]
        if len(places) != len(stored) * self.count:
            raise ValueError(f"these bytes hold no sets of {self.count}")
        upper = places.view(len(stored), self.count) - torch.arange(self.count, device=stored.device)
        return (upper << self.low) | low

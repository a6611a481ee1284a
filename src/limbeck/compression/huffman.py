"""Lengths of Huffman codes."""

import heapq
from collections.abc import Sequence


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """Bits of each symbol's code word in a shortest prefix code; 0 for symbols that do not occur, and for a lone one.

    Args:
        counts: how often each symbol occurs.

    Source: Huffman, *A Method for the Construction of Minimum-Redundancy Codes*, 1952.
    """
    lengths = [0] * len(counts)
    heap = [(count, [symbol]) for symbol, count in enumerate(counts) if count]
    heapq.heapify(heap)
    while len(heap) > 1:
        (rarest, below), (next_rarest, also_below) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in (joined := below + also_below):
            lengths[symbol] += 1
        heapq.heappush(heap, (rarest + next_rarest, joined))
    return lengths


def mean_code_length(counts: Sequence[int]) -> float:
    """Mean bits a symbol of a Huffman code made for these counts, within one bit of their entropy; 0 without any."""
    total = sum(counts)
    spent = sum(count * length for count, length in zip(counts, huffman_lengths(counts), strict=True))
    return spent / total if total else 0.0

"""A compact code for a teacher's k most probable tokens: about 2.5 bytes an entry, tail mass and partition included.

One token's record, of the same size for every token of a cache:

====================  =========================================================================================
bytes                 content
====================  =========================================================================================
2, float16            log of the tail: the probability outside the k tokens
2, float16            the span: log-probability of the least of the k tokens minus that of the most probable one
2, float16            log-partition, so that a logit is its log-probability plus this; NaN where it is not known
k·l/8 + (k+V/2^l)/8   the ids, ascending, as `bits.SortedSets` of k out of V; l is the integer part of log2(V/k)
k·bits/8              for each id a code c of `bits` bits, see below
====================  =========================================================================================

With d the log-probability relative to the most probable token and s the span, c is exp(d/3) mapped linearly from
[exp(s/3), 1] to whole numbers [0, 2^bits - 1]. The cube root is the companding that minimises the KL divergence: an
error e in a log-probability costs p·e²/2, and entries lie about evenly in d. Decoded probabilities are normalised
so that the k tokens and the tail sum to one, which also makes good what the codes have lost in common.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.compression.packing import pack, packed_bytes, unpack
from limbeck.data.cache.bits import SortedSets

VERSION = 1
_HEAD_BYTES = 6
_BUDGET = 2.6  # bytes an entry: 130 for 50
_LEAST_BITS, _MOST_BITS = 6, 8


class TopK(NamedTuple):
    """The k most probable tokens of some positions.

    Attributes:
        ids: (tokens, k) int64, distinct in each row.
        log_probs: (tokens, k) float32, over the whole vocabulary, at temperature 1; -inf for what is impossible.
        log_partition: (tokens,) float32, logsumexp of the logits; NaN where it is not known.
    """

    ids: Tensor
    log_probs: Tensor
    log_partition: Tensor


def top_k(logits: Tensor, k: int) -> TopK:
    """The k most probable tokens of logits (tokens, vocab), all of them where there are fewer."""
    logits = logits.float()
    log_partition = logits.logsumexp(-1)
    values, ids = logits.topk(min(k, logits.shape[-1]), -1)
    return TopK(ids, values - log_partition.unsqueeze(-1), log_partition)


class TopKCodec:
    """Encodes and decodes records; whole batches at a time, on any device.

    Args:
        k: tokens a position, 1 to 65535.
        vocab: number of token ids, at least k and below 2^32.
        bits: of a log-probability's code, 1 to 8; by default 6 to 8, as many as 2.6 bytes an entry leave room for.
    """

    def __init__(self, k: int, vocab: int, bits: int | None = None) -> None:
        if not 1 <= k <= min(vocab, 0xFFFF) or vocab >= 1 << 32:
            raise ValueError(f"no code for {k} of {vocab} tokens")
        self.k, self.vocab, self.sets = k, vocab, SortedSets(k, vocab)
        room = int(_BUDGET * k) - _HEAD_BYTES - self.sets.size
        self.bits = bits or min(_MOST_BITS, max(_LEAST_BITS, 8 * room // k))

    @property
    def record_bytes(self) -> int:
        """Bytes a token."""
        return _HEAD_BYTES + self.sets.size + packed_bytes(self.k, self.bits)

    @property
    def header(self) -> Tensor:
        """(8,) uint8 that stand before the records of a file: version, bits, k and vocab, little-endian."""
        return torch.tensor(
            [VERSION, self.bits, *self.k.to_bytes(2, "little"), *self.vocab.to_bytes(4, "little")]
        ).byte()

    @classmethod
    def of_header(cls, header: Tensor) -> "TopKCodec":
        """The codec that wrote a header.

        Raises:
            ValueError: no header, or one of a later version.
        """
        version, bits, *rest = bytes(header.tolist())
        if version != VERSION or len(rest) != 6 or not 1 <= bits <= _MOST_BITS:
            raise ValueError(f"top-k records of version {version}, and this limbeck reads version {VERSION}")
        return cls(int.from_bytes(rest[:2], "little"), int.from_bytes(rest[2:], "little"), bits)

    def encode(self, found: TopK) -> Tensor:
        """Records (tokens, record_bytes) uint8.

        Args:
            found: k entries a token; ids outside the vocabulary are a ValueError.
        """
        if found.ids.numel() and not 0 <= int(found.ids.min()) <= int(found.ids.max()) < self.vocab:
            raise ValueError(f"an id outside the vocabulary of {self.vocab}")
        ids, order = found.ids.sort(-1)
        log_probs = found.log_probs.float().gather(-1, order)
        top = log_probs.amax(-1, keepdim=True)
        # As decoding will read it: rounding to half precision must not shift the scale between the two.
        span = (log_probs.amin(-1, keepdim=True) - top).half()
        low = (span.float() / 3).exp()
        level = ((log_probs - top) / 3).exp()
        share = (level - low) / (1 - low).clamp_min(1e-12)
        codes = (share.clamp(0, 1) * (2**self.bits - 1)).round().to(torch.int32)
        head = torch.cat([self._log_tail(log_probs), span, found.log_partition.half().unsqueeze(-1)], -1)
        return torch.cat([head.view(torch.uint8), self.sets.encode(ids), pack(codes, self.bits)], -1)

    def decode(self, records: Tensor) -> TopK:
        """The inverse of `encode`: ids exactly, in ascending order; their probabilities and the tail's sum to one.

        Raises:
            ValueError: the bytes are no records of this codec.
        """
        if records.ndim != 2 or records.shape[1] != self.record_bytes:
            raise ValueError(f"records of {self.record_bytes} bytes expected, not {tuple(records.shape)}")
        sizes = [_HEAD_BYTES, self.sets.size, packed_bytes(self.k, self.bits)]
        head, sets, packed = records.split(sizes, 1)
        log_tail, span, log_partition = (
            head.clone(memory_format=torch.contiguous_format).view(torch.float16).float().split(1, 1)
        )
        low = (span / 3).exp()
        codes = unpack(packed, self.k, self.bits).float()
        relative = 3 * torch.log(torch.addcmul(low, codes, (1 - low) / (2**self.bits - 1)))
        log_mass = torch.log1p(-log_tail.exp().clamp_max(1.0))  # of the k tokens together
        log_probs = relative - relative.logsumexp(-1, keepdim=True) + log_mass
        return TopK(self.sets.decode(sets), log_probs, log_partition.squeeze(1))

    def _log_tail(self, log_probs: Tensor) -> Tensor:
        """log of what the k tokens leave over (tokens, 1) float16, -inf where they are the whole vocabulary."""
        if self.k == self.vocab:
            return torch.full_like(log_probs[:, :1], -torch.inf, dtype=torch.float16)
        # In float64: one minus a sum loses the digits of a small tail. The limits are what float16 still tells apart.
        tail = 1 - log_probs.double().exp().sum(-1, keepdim=True)
        return tail.clamp(1e-8, 1 - 2.0**-23).log().half()

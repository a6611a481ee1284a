"""From encoded documents to rows of one length."""

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from limbeck.core.errors import IncompatibleError
from limbeck.data.text.encoding import Encoded

_FEWEST = 2  # with a single token there is nothing to predict


class Rows(NamedTuple):
    """Token sequences, padded on the right.

    Attributes:
        ids: (items, length) int32.
        lengths: (items,) int64, tokens before the padding.
        targets: (items, length) bool, True where a token is to be predicted; None where all before the padding are.
        kept: (items,) int64, which document each row is; None where rows hold several.
    """

    ids: Tensor
    lengths: Tensor
    targets: Tensor | None
    kept: Tensor | None


def pack(encoded: Sequence[Encoded], length: int, fill: int = 0) -> Rows:
    """All documents one after the other, cut every `length` tokens; only the last row may be shorter.

    A document may begin in the middle of a row and sees what stands before it: attention is not cut at documents, and
    positions run on. Tokens that are no targets stay none wherever they land. `fill` stands in the padding.

    Raises:
        IncompatibleError: hardly any tokens at all.
    """
    ids = _joined([document.ids for document in encoded])
    if len(ids) < _FEWEST:
        raise IncompatibleError(f"the text has {len(ids)} tokens")
    targets = None
    if any(document.prompt for document in encoded):
        prompts = itertools.chain.from_iterable((document.prompt, len(document.ids)) for document in encoded)
        counts = numpy.array([*prompts]).reshape(-1, 2)
        pairs = numpy.stack([counts[:, 0], counts[:, 1] - counts[:, 0]], 1).ravel()
        targets = _rows(numpy.repeat(numpy.tile([False, True], len(counts)), pairs), length)
    rows = _rows(ids, length, fill)
    lengths = torch.full((len(rows),), length)
    lengths[-1] = len(ids) - (len(rows) - 1) * length
    kept = len(rows) - int(lengths[-1] < _FEWEST)
    return Rows(rows[:kept], lengths[:kept], None if targets is None else targets[:kept], None)


def pad(encoded: Sequence[Encoded], length: int, fill: int = 0) -> Rows:
    """One document a row, cut after `length` tokens, all as wide as the longest.

    Documents of whose targets nothing is left are dropped, with a warning. `fill` stands in the padding.

    Raises:
        IncompatibleError: no document is left.
    """
    kept = [number for number, document in enumerate(encoded) if _fits(document, length)]
    if not kept:
        raise IncompatibleError(f"no text has a target within its first {length} tokens", "set data.text.length higher")
    if len(kept) < len(encoded):
        lost = len(encoded) - len(kept)
        warnings.warn(f"{lost} of {len(encoded)} texts are left out: no target in {length} tokens", stacklevel=2)
    lengths = torch.tensor([min(len(encoded[number].ids), length) for number in kept])
    places = torch.arange(int(lengths.max()))
    ids = torch.full((len(kept), len(places)), fill, dtype=torch.int32)
    ids[places < lengths[:, None]] = torch.from_numpy(_joined([encoded[number].ids[:length] for number in kept]))
    prompts = torch.tensor([encoded[number].prompt for number in kept])
    targets = places >= prompts[:, None] if prompts.any() else None
    return Rows(ids, lengths, targets, torch.tensor(kept))


def _fits(document: Encoded, length: int) -> bool:
    return min(len(document.ids), length) > max(document.prompt, _FEWEST - 1)


def _joined(parts: Sequence[list[int]]) -> numpy.ndarray:
    count = sum(map(len, parts))
    return numpy.fromiter(itertools.chain.from_iterable(parts), numpy.int32, count)


def _rows(values: numpy.ndarray, length: int, fill: int = 0) -> Tensor:
    padded = numpy.full(-(-len(values) // length) * length, fill, values.dtype)
    padded[: len(values)] = values
    return torch.from_numpy(padded.reshape(-1, length))

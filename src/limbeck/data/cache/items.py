"""What an item looked like when the teacher was asked: enough to refuse another one that has its number.

Item numbers alone do not tell training from validation data, masked text from plain, or mixed images from their own.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.randomness import generator
from limbeck.data.cache.errors import ForeignCacheError
from limbeck.language.predictions import kept_tokens

_POINTS = 32  # of an image that are looked at
_TOLERANCE = 0.02  # deviations: rounding, float16, and the arithmetic of another machine
_FLAT = 1e-3  # a deviation below this is rounding


def marks_of(batch: Batch, shift: int | None) -> dict[str, Tensor]:
    """Marks of each item, on the batch's device.

    For text `marks.tokens` (items,) and `marks.kept` (items,) int64, exact hashes of the tokens and of which of them
    count. For images `marks.image` (items, 32) float16: some points of the first channel, standardised, so that neither
    another normalisation nor a rounding error matters.

    Args:
        batch: with `input_ids` or `image`.
        shift: how far the target lies behind the token that predicts it; None where there are no targets.
    """
    if "input_ids" in batch:
        present = batch.get("attention_mask")
        ids = batch["input_ids"] + 1
        found = {"marks.tokens": _hash(ids if present is None else ids * present)}
        return found if shift is None else found | {"marks.kept": _hash(kept_tokens(batch, shift).long())}
    points = _looked_at(batch["image"]).float()
    points = points - points.mean(1, keepdim=True)
    spread = points.std(1, correction=0, keepdim=True)
    return {"marks.image": torch.where(spread > _FLAT, points / spread.clamp_min(_FLAT), 0.0).half()}


def check_marks(batch: Batch, found: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Refuses items that are not those that the teacher was shown.

    Raises:
        ForeignCacheError: naming the first such item.
    """
    for name, marks in found.items():
        here, there = marks.cpu(), stored[name]
        if name == "marks.image":
            wrong = ((here.float() - there.float()).abs() > _TOLERANCE).any(1)
        else:
            wrong = here != there
        if wrong.any():
            item = int(batch["index"][int(wrong.nonzero()[0])])
            what = {"marks.kept": "counts other tokens", "marks.tokens": "has other tokens"}.get(
                name, "is another image"
            )
            raise ForeignCacheError(
                f"item {item} {what} than the teacher was shown when the cache was made",
                "take a live teacher for other data, and for methods that change what they are given",
                ("targets" if name == "marks.kept" else "data",),
            )


def _hash(values: Tensor) -> Tensor:
    """Hashes (items,) of integers (items, length): sums with odd factors modulo 2^64, exact on every device."""
    return (values.long() * _factors(values.shape[1]).to(values.device)).sum(1)


@cache
def _factors(length: int) -> Tensor:
    return 2 * torch.randint(-(2**62), 2**62, (length,), generator=generator(0, "marks")) + 1


def _looked_at(image: Tensor) -> Tensor:
    """Up to 32 points (items, points) of the first channel, or of whatever an item is made of."""
    if image.ndim != 4:
        image = image.flatten(1)[:, None, None]
    height, width = image.shape[-2:]
    points = _points(height * width).to(image.device)
    return image[:, 0, points // width, points % width]


@cache
def _points(count: int) -> Tensor:
    return torch.randperm(count, generator=generator(0, "points", count))[:_POINTS]

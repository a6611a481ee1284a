"""Splitting one data set in two, so that each class keeps its share."""

import torch
from torch import Tensor

from limbeck.core.randomness import generator


def stratified_split(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to keep and rows to hold out, each in ascending order; a function of the labels, the share and the seed.

    Args:
        labels: class of each item (items,); -100 (no label) counts as a class of its own.
        share: share of each class to hold out, in (0, 1); a class of two or more items gives and keeps at least one.
        seed: which items are held out.
    """
    draws = generator(seed, "split")
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=draws)]
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held[rows[:count]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()

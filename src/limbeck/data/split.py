"""Splitting one data set: in two, so that each class keeps its share; or into what is labelled and what is not."""

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import IncompatibleError
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


class Pool(NamedTuple):
    """Item numbers of a partly labelled data set, each ascending and int64.

    Attributes:
        labelled: items whose labels are trained on.
        holdout: labelled items that are kept for measuring.
        unlabelled: all others; their labels, if they have any, are not to be read.
    """

    labelled: Tensor
    holdout: Tensor
    unlabelled: Tensor


def split_pool(labels: Tensor, labelled: int | None, holdout: int, seed: int = 0) -> Pool:
    """Draws the items whose labels may be used, as a function of which items have one and of the seed.

    Args:
        labels: class of each item (items,), -100 for none.
        labelled: how many labelled items to train on; None for all of them but the hold-out.
        holdout: how many labelled items to hold out.
        seed: which items.

    Raises:
        IncompatibleError: there are not so many labelled items, or none is left to train on or to ask about.
    """
    known = (labels != -100).nonzero().flatten()
    known = known[torch.randperm(len(known), generator=generator(seed, "pool"))]
    end = len(known) if labelled is None else holdout + labelled
    if not holdout < end <= len(known):
        raise IncompatibleError(
            f"{len(known)} items have a label; {holdout} are to be held out and {labelled or 'the rest'} trained on",
            "lower holdout or labelled, or bring more labels",
        )
    free = torch.ones(len(labels), dtype=torch.bool)
    free[known[:end]] = False
    if not free.any():
        raise IncompatibleError("every item is labelled: there is no pool", "set labelled, or bring unlabelled items")
    return Pool(known[holdout:end].sort().values, known[:holdout].sort().values, free.nonzero().flatten())

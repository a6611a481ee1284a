"""Mining an unlabelled pool for training images: no image of the evaluation, and the clearest ones of every class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import IncompatibleError
from limbeck.core.teacher import Teacher
from limbeck.data.duplicates import Descriptor, near_duplicates, thumbnail
from limbeck.data.source import ImageSource


@dataclass(frozen=True, slots=True)
class Mined:
    """What was found in a pool.

    Attributes:
        rows: numbers in the pool (mined,) of what was kept, ascending.
        classes: the labeller's class of each (mined,).
        scores: the labeller's probability of that class (mined,).
        duplicates: numbers in the pool of what was left out as near-duplicates of evaluation images, ascending.
        source: the pool's items at `rows`.
    """

    rows: Tensor
    classes: Tensor
    scores: Tensor
    duplicates: Tensor
    source: ImageSource


def mine(
    pool: ImageSource,
    evaluation: ImageSource,
    labeller: Teacher,
    per_class: int,
    *,
    descriptor: Descriptor = thumbnail,
    cosine: float = 0.97,
    bits: int | None = 12,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Mined:
    """Selects training images from an unlabelled pool, as SSLD did (Cui et al., 2021, arXiv 2103.05959).

    Near-duplicates of evaluation images go first; then, of the images that a strong labeller takes for a class, the
    `per_class` of the highest score stay. Labels of the pool are never read. Train on the base set and what was mined
    with `JoinedSource([base, mined.source])`.

    Args:
        pool: images without labels, normalised as the labeller expects.
        evaluation: images on which the result will be measured; near-duplicates are sought against these.
        labeller: tells the classes apart, as `LiveTeacher(network)`.
        per_class: most images of a class, at least 1.
        descriptor, cosine, bits: what counts as a duplicate; see `near_duplicates`.
        batch_size: images at a time.
        device: where the labeller runs.

    Raises:
        IncompatibleError: the labeller gives no logits, or nothing is left of the pool.
    """
    twins = near_duplicates(pool, evaluation, descriptor=descriptor, cosine=cosine, bits=bits, batch_size=batch_size)
    rest = (~twins).nonzero().flatten()
    if not len(rest):
        raise IncompatibleError("every image of the pool is a near-duplicate of an evaluation image", "raise cosine")
    classes, scores = label_images(pool, rest, labeller, batch_size, device)
    kept = top_k_per_class(classes, scores, per_class)
    rows = rest[kept]
    return Mined(rows, classes[kept], scores[kept], twins.nonzero().flatten(), pool.select(rows))


def label_images(
    source: ImageSource, rows: Tensor, labeller: Teacher, batch_size: int = 256, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The most probable class of each item and its probability, by a labeller; both (rows,), on the CPU.

    Raises:
        IncompatibleError: the labeller gives no logits.
    """
    device = torch.device(device)
    labeller.to(device)
    classes, scores = [], []
    for part in rows.split(batch_size):
        logits = labeller.signal(source.fetch(part).to(device)).logits
        if logits is None:
            raise IncompatibleError("the labeller gives no logits", "use one with a classification head")
        score, label = logits.float().softmax(1).max(1)
        classes.append(label.cpu())
        scores.append(score.cpu())
    return torch.cat(classes), torch.cat(scores)


def top_k_per_class(classes: Tensor, scores: Tensor, k: int) -> Tensor:
    """Places of the `k` highest scores of each class, ascending; of equal scores the first ones.

    Args:
        classes: class of each item (items,), at least 0.
        scores: (items,).
        k: most items of a class, at least 1; a smaller class stays whole.

    Returns:
        (kept,) int64.
    """
    if k < 1:
        raise IncompatibleError(f"{k} images a class are none", "give per_class of at least 1")
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[classes[by_score].argsort(stable=True)]  # by class, and within a class by score
    sizes = torch.bincount(classes)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order)) - starts[classes[order]]
    return order[rank < k].sort().values

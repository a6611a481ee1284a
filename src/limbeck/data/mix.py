"""Mixing images in pairs: one image and one soft label for teacher and student alike."""

import torch
from torch import Tensor
from torch.nn import functional

from limbeck.core.batch import Batch


def mixup(batch: Batch, classes: int, alpha: float = 0.2) -> Batch:
    """Blends each image with another of the batch (Zhang et al., arXiv 1710.09412).

    Draws from torch's random stream, which the trainer seeds at each step.

    Args:
        batch: with `image` (items, channels, height, width) and `label` (items,), -100 for none.
        classes: number of classes.
        alpha: parameter of the Beta(alpha, alpha) distribution of the share kept, above 0; one share a batch.

    Returns:
        The batch with mixed `image` and a `soft_label` (items, classes): rows sum to one, less by the share of
        images without a label.
    """
    share = _share(alpha)
    partner = torch.randperm(batch.size, device=batch["image"].device)
    image = torch.lerp(batch["image"][partner], batch["image"], share)
    return batch.replace(image=image, soft_label=_soft(batch["label"], partner, share, classes))


def cutmix(batch: Batch, classes: int, alpha: float = 1.0) -> Batch:
    """Pastes a rectangle of another image of the batch into each image (Yun et al., arXiv 1905.04899).

    Draws from torch's random stream, which the trainer seeds at each step.

    Args:
        batch: with `image` (items, channels, height, width) and `label` (items,), -100 for none.
        classes: number of classes.
        alpha: parameter of the Beta(alpha, alpha) distribution of the area kept, above 0; one rectangle a batch.

    Returns:
        The batch with mixed `image` and a `soft_label` (items, classes) weighted by the area that was really pasted.
    """
    image = batch["image"]
    height, width = image.shape[2:]
    side = (1 - _share(alpha)) ** 0.5  # of the rectangle, as a share of the image's
    rows, columns = _span(height, side), _span(width, side)
    partner = torch.randperm(batch.size, device=image.device)
    mixed = image.clone()
    mixed[:, :, rows, columns] = image[partner][:, :, rows, columns]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    share = 1 - pasted / (height * width)
    return batch.replace(image=mixed, soft_label=_soft(batch["label"], partner, share, classes))


def _span(length: int, share: float) -> slice:
    """A stretch around a random centre, cut off at the border."""
    centre, half = float(torch.rand(())) * length, share * length / 2
    return slice(max(0, round(centre - half)), min(length, round(centre + half)))


def _share(alpha: float) -> float:
    return float(torch.distributions.Beta(alpha, alpha).sample())


def _soft(labels: Tensor, partner: Tensor, share: float, classes: int) -> Tensor:
    known = (labels != -100)[:, None]
    hot = functional.one_hot(labels.clamp(min=0), classes).float() * known
    return torch.lerp(hot[partner], hot, share)

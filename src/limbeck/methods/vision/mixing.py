"""Images mixed in pairs within a step, for methods whose papers train on mixed images."""

import torch

from limbeck.core.batch import Batch
from limbeck.data.mix import cutmix, mixup


def mixed(batch: Batch, classes: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> Batch:
    """A batch blended by mixup or pasted by CutMix, one of the two at random where both are on, or as it is.

    Draws from torch's random stream, which the trainer seeds at each step. Partners come from the same micro-batch.
    A teacher's cache refuses mixed images, of which it knows nothing.

    Args:
        batch: with `image` (items, channels, height, width); `label` (items,) may be absent.
        classes: number of classes.
        mixup_alpha: parameter of mixup's Beta distribution; 0 leaves mixup out.
        cutmix_alpha: parameter of CutMix's Beta distribution; 0 leaves CutMix out.

    Returns:
        The batch with mixed `image` and a soft `label` (items, classes), rows of zeros for items without a label; the
        batch itself where both are left out.
    """
    if not mixup_alpha and not cutmix_alpha:
        return batch
    labels = batch["label"] if "label" in batch else torch.full((batch.size,), -100, device=batch["image"].device)
    labelled = batch.replace(label=labels)
    pastes = not mixup_alpha or (cutmix_alpha > 0 and bool(torch.rand(()) < 0.5))
    made = cutmix(labelled, classes, cutmix_alpha) if pastes else mixup(labelled, classes, mixup_alpha)
    return made.replace(label=made["soft_label"])

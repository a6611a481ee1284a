"""Asking a teacher, or looking through a student's eyes, at chosen items of a source."""

import torch
from torch import Tensor, nn

from limbeck.core.call import logits_of
from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import Taps
from limbeck.core.teacher import Teacher
from limbeck.data.source import Source


def ask(
    teacher: Teacher, source: Source, rows: Tensor, *, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Tensor:
    """A teacher's class probabilities of each item, asked once and without augmentation: (rows, classes) on the CPU.

    Args:
        teacher: is moved to the device.
        source: the data.
        rows: item numbers (rows,), int64, at least one.
        batch_size: items at a time.
        device: where the teacher runs.

    Raises:
        IncompatibleError: the teacher gives no logits.
    """
    device = torch.device(device)
    teacher.to(device)
    answers = []
    for part in rows.split(batch_size):
        logits = teacher.signal(source.fetch(part).to(device)).logits
        if logits is None:
            raise IncompatibleError("the teacher gives no logits", "use a teacher with a classification head")
        answers.append(logits.float().softmax(1).cpu())
    return torch.cat(answers)


@torch.no_grad()
def look(
    model: nn.Module,
    source: Source,
    rows: Tensor,
    layer: str | None = None,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A model's logits (rows, classes) and the features (rows, dim) of one layer, in eval mode, on the CPU.

    Args:
        model: is left in eval mode, and has to be on the device.
        source: the data.
        rows: item numbers (rows,), int64, at least one.
        layer: module path of the features; they are the logits if absent. Maps (channels, height, width) are averaged
            over their pixels, sequences (length, dim) over their tokens.
        batch_size: items at a time.
        device: where the model is.
    """
    model.eval()
    logits, features = [], []
    with Taps(model, [] if layer is None else [layer]) as taps:
        for part in rows.split(batch_size):
            found = logits_of(taps.run(source.fetch(part).to(torch.device(device)))).float()
            logits.append(found.cpu())
            features.append(found.cpu() if layer is None else _pooled(taps.values()[0]).float().cpu())
    return torch.cat(logits), torch.cat(features)


def _pooled(feature: Tensor) -> Tensor:
    """One vector an item."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature.flatten(1)

"""Networks that say what was recorded, and predictions of it."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.denoiser import Process
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import Schedule

NULL = 1


class Recorded(nn.Module):
    """Says `conditional` for items with the label 0 and `unconditional` for those with the null label 1."""

    def __init__(self, conditional: Tensor, unconditional: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.conditional = conditional
        self.unconditional = conditional if unconditional is None else unconditional

    def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        """What was recorded for each of the items, which may come several times over."""
        times = len(x) // len(self.conditional)
        both = [said.repeat(times, *[1] * (said.ndim - 1)) for said in (self.conditional, self.unconditional)]
        if "label" not in condition:
            return both[0]
        return torch.where(condition["label"].view(-1, *[1] * (x.ndim - 1)) == NULL, both[1], both[0])


def direct(schedule: Schedule, kind: Any, **options: Any) -> Process:
    """A process of a network that says `kind` as it is."""
    from limbeck.diffusion.parameterisations import Direct

    return Process(schedule, Direct(kind), **options)


def data_prediction(x0: Tensor, schedule: Schedule) -> Prediction:
    """A prediction of data, wherever it was made."""
    return Prediction(x0, "x0", torch.zeros_like(x0), torch.ones(len(x0)), schedule)


def drawing(place: Tensor, first: int, last: int) -> Tensor:
    """Uniform numbers that draw these whole numbers from first to last."""
    return (place - first + 0.5) / (last - first + 1)

"""Two networks as one of twice the size: InstaFlow's stacked U-Net."""

import copy
from typing import Literal

from torch import Tensor, nn

from limbeck.diffusion.ports import Condition, call_network, is_own
from limbeck.diffusion.schedules import along

Wiring = Literal["steps", "plain"]


class Stacked(nn.Module):
    """Two copies of a velocity network, wired one after the other.

    With "steps" the second network sees what half an Euler step by the first makes of the items, at half the time, and
    the velocities are averaged: one step of the whole is at first two steps of the network that was copied. With
    "plain" the second network sees the first one's output at the same time. The paper says no more than that the
    networks follow each other.

    Args:
        first: predicts the velocity u at flow-matching times.
        second: of the same shape; a copy of the first if absent.
        wiring: see above.
        time_scale: what the networks are told is `time_scale` t; what is usual for them if absent.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module | None = None,
        wiring: Wiring = "steps",
        time_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.first = first
        self.second = copy.deepcopy(first) if second is None else second
        self.wiring: Wiring = wiring
        self.time_scale = time_scale or (1.0 if is_own(first) else 1000.0)

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The velocity at items x (items, ...) and told times (items,)."""
        before = call_network(self.first, x, time, condition)
        if self.wiring == "plain":
            return call_network(self.second, before, time, condition)
        middle = x - along(time / self.time_scale / 2, x) * before
        return (before + call_network(self.second, middle, time / 2, condition)) / 2

"""Running means of logged scalars, kept on the device until a row of metrics is due."""

import torch
from torch import Tensor


class Meter:
    """Weighted means of named scalars since the last row; holds tensors, so reading is the only synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Adds a scalar that is a mean over `weight` items."""
        value = value.detach().float()
        weight = torch.as_tensor(weight, dtype=torch.float32, device=value.device)
        if name in self._sums:
            self._sums[name] = self._sums[name] + value * weight
            self._weights[name] = self._weights[name] + weight
        else:
            self._sums[name], self._weights[name] = value * weight, weight

    def read(self) -> dict[str, float]:
        """The means by name; starts a new window. One transfer from the device."""
        if not self._sums:
            return {}
        means = torch.stack([self._sums[name] / self._weights[name].clamp_min(1e-12) for name in self._sums]).tolist()
        row = dict(zip(self._sums, means, strict=True))
        self._sums, self._weights = {}, {}
        return row

    def state_dict(self) -> dict[str, Tensor]:
        """The open window, for a checkpoint between two rows."""
        sums = {f"sum/{name}": value for name, value in self._sums.items()}
        return sums | {f"weight/{name}": value for name, value in self._weights.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores an open window."""
        self._sums = {name.removeprefix("sum/"): value for name, value in state.items() if name.startswith("sum/")}
        self._weights = {name.removeprefix("weight/"): v for name, v in state.items() if name.startswith("weight/")}

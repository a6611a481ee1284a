"""Running means of logged scalars, kept on the device until a row of metrics is due."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Meter:
    """Weighted means of named scalars since the last row.

    Adding keeps references and computes nothing; reading stacks them, which is the only synchronisation.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._weights: dict[str, list[Tensor | float]] = {}

    def add(self, values: Mapping[str, Tensor], weight: Tensor | float) -> None:
        """Adds detached scalars that are means over `weight` items."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
            self._weights.setdefault(name, []).append(weight)

    def read(self) -> dict[str, float]:
        """The means by name; starts a new window. One transfer from the device."""
        window = self.state_dict()
        self._values, self._weights = {}, {}
        names = [name.removeprefix("values/") for name in window if name.startswith("values/")]
        if not names:
            return {}
        means = []
        for name in names:
            values, weights = window[f"values/{name}"], window[f"weights/{name}"]
            means.append((values * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny))
        return dict(zip(names, torch.stack(means).tolist(), strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """The open window, for a checkpoint between two rows."""
        window = {}
        for name, values in self._values.items():
            window[f"values/{name}"] = torch.stack(values).float()
            weights = [torch.as_tensor(weight, dtype=torch.float32) for weight in self._weights[name]]
            window[f"weights/{name}"] = torch.stack([weight.to(values[0].device) for weight in weights])
        return window

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores an open window, in place of the present one."""
        self._values, self._weights = {}, {}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            (self._values if kind == "values" else self._weights)[name] = list(tensor)

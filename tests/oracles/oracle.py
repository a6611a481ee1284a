"""Reads the oracles: inputs and outputs recorded from the original code, `<name>.safetensors` with a `<name>.json`.

A sidecar holds either a list of cases (tensors `<case>/in/<name>` and `<case>/out/<name>`) or describes one flat set of
tensors; the latter becomes a single case.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One recorded computation."""

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    hyperparameters: Any
    tolerance: Any
    """As the sidecar states it: a number, words such as "rtol 1e-4, atol 1e-5", or several by name."""
    tensors: dict[str, Tensor]
    """All tensors under their recorded names, for sidecars whose description of the inputs is not literal."""

    @property
    def rtol(self) -> float:
        return self._number("rtol")

    @property
    def atol(self) -> float:
        return self._number("atol")

    def check(self, name: str, actual: Tensor | float, *, of_largest: bool = False, **tolerance: float) -> None:
        """Assert that a value equals the recorded output, entry by entry within the sidecar's tolerance.

        `of_largest` measures errors in units of the largest recorded entry and ignores the absolute tolerance, which
        would hide any error of a tiny gradient. `rtol` and `atol` overrule the sidecar.
        """
        expected = self.outputs[name]
        rtol, atol = tolerance.get("rtol", self.rtol), tolerance.get("atol", self.atol)
        if of_largest:
            rtol, atol = 0.0, rtol * expected.abs().max().item()
        actual = torch.as_tensor(actual).detach().to(expected.dtype)
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{self.name}/{name}: {text}"
        )

    def _number(self, kind: str) -> float:
        if isinstance(self.tolerance, int | float):
            return float(self.tolerance) if kind == "rtol" else 0.0
        found = re.search(rf"{kind} ([0-9.]+(?:e-?[0-9]+)?)", str(self.tolerance))
        return float(found[1]) if found else 0.0


def load(name: str, folder: Path = FOLDER) -> list[Case]:
    """All cases of an oracle, in the order of its sidecar."""
    sidecar = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    if "cases" in sidecar:
        return [_case(entry, tensors) for entry in sidecar["cases"]]
    return [_flat(sidecar, tensors)]


def _case(entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Case:
    name = entry["case"]
    inputs, outputs = (_below(tensors, f"{name}/{side}/") for side in ("in", "out"))
    return Case(name, inputs, outputs, entry["hyperparameters"], entry.get("tolerance"), _below(tensors, f"{name}/"))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _flat(sidecar: Mapping[str, Any], tensors: dict[str, Tensor]) -> Case:
    """Inputs are the tensors that the sidecar lists as such, by name or by a pattern with `*` or `<word>`."""
    listed = sidecar["inputs"]
    names = listed if isinstance(listed, Mapping) else re.findall(r"[\w.<>*]+", listed)
    patterns = [re.sub(r"<\w+>", "*", entry) for entry in names]
    inputs = {key: value for key, value in tensors.items() if any(fnmatchcase(key, entry) for entry in patterns)}
    outputs = {key: value for key, value in tensors.items() if key not in inputs}
    return Case(sidecar["system"], inputs, outputs, sidecar["hyperparameters"], sidecar.get("tolerance"), tensors)

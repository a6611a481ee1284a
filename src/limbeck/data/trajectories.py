"""Experts' trajectories on disk: one sealed folder an expert, so that processes can make them side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.checkpoint import storable
from limbeck.core.durable import commit_folder, read_json, remove_leftovers, verify_folder
from limbeck.core.errors import DamagedFileError, IncompatibleError


class TrajectoryBuffer:
    """The trajectories of several experts: folders `expert-N`, each whole or absent and sealed with checksums.

    A process that makes an expert saves it once it is whole; one that is interrupted loses the expert at hand. Several
    processes may save different experts at once.

    Args:
        folder: where they lie; created at the first save.
        about: what the experts were made from, as plain data; it is stored with each, and experts that were made from
            something else are refused.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads(json.dumps(about, allow_nan=False))  # as it will be read

    def save(self, number: int, way: Mapping[str, Tensor]) -> Path:
        """Writes one expert's snapshots and returns its folder.

        Args:
            number: the expert, from 0.
            way: for each parameter its snapshots (snapshots, *shape), before the first epoch and after each.

        Raises:
            DiskFullError: there is no room; other experts are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self._path(number)
        commit_folder(target, lambda folder: _fill(folder, way, self.about), sum(t.nbytes for t in way.values()))
        return target

    def load(self, number: int) -> dict[str, Tensor]:
        """One expert's snapshots by parameter name, after checking every byte of them.

        Raises:
            DamagedFileError: naming the file that is missing, truncated or altered.
            IncompatibleError: it was made from something else.
        """
        path = self._path(number)
        verify_folder(path)
        found = read_json(path / "about.json")
        if found != self.about:
            known = found if isinstance(found, dict) else {}
            other = sorted(key for key in {*known, *self.about} if known.get(key) != self.about.get(key))
            raise IncompatibleError(
                f"{path} holds an expert made with another {', '.join(other)}", "remove the folder, or take another one"
            )
        try:
            return load_file(path / "snapshots.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise DamagedFileError(path / "snapshots.safetensors", str(error)) from error

    def is_whole(self, number: int) -> bool:
        """Whether an expert is there, undamaged.

        Raises:
            IncompatibleError: it was made from something else.
        """
        try:
            self.load(number)
        except DamagedFileError:
            return False
        return True

    def missing(self, count: int) -> list[int]:
        """Which of the experts from 0 to `count` - 1 have yet to be made, or made again because they are damaged.

        It clears away what interrupted writes left: call it while nobody else is writing.
        """
        if self.folder.is_dir():
            remove_leftovers(self.folder)
        return [number for number in range(count) if not self.is_whole(number)]

    def _path(self, number: int) -> Path:
        return self.folder / f"expert-{number:05d}"


def _fill(folder: Path, way: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    save_file(storable(dict(way)), folder / "snapshots.safetensors")
    (folder / "about.json").write_text(json.dumps(about, allow_nan=False))

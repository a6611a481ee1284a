"""Checkpoints: whole or absent, sealed with checksums, with the previous one to fall back on."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.durable import commit_folder, remove_leftovers, sha256_of, verify_folder, write_json
from limbeck.core.errors import DamagedFileError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved moment: groups of named tensors and plain state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage: folders `step-N` and a pointer `latest.json`.

    A crash at any instant leaves the previous whole checkpoint or the new one: a save fills a temporary folder, seals
    it with a manifest of sizes and SHA-256, renames it, and only then moves the pointer.

    Args:
        folder: where they live; created at the first save.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint and returns its folder; an existing one of the same step is kept as it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        target = self._path(checkpoint.step)
        if not self._whole(target):
            commit_folder(target, lambda folder: _fill(folder, checkpoint))
        seal = sha256_of(target / "manifest.json")
        write_json(self.folder / "latest.json", {"checkpoint": target.name, "manifest": seal})
        self._prune()
        return target

    def load(self) -> Checkpoint | None:
        """The latest whole checkpoint, None when there is none at all.

        A damaged one is named in a warning and passed over.

        Raises:
            DamagedFileError: there are checkpoints, and none is whole.
        """
        damage: DamagedFileError | None = None
        for path in self._candidates():
            try:
                return read_checkpoint(path)
            except DamagedFileError as error:
                damage = damage or error
                warnings.warn(f"{error.message}; falling back to the checkpoint before it", stacklevel=2)
        if damage is not None:
            raise damage
        return None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(step) for step in found if step.isdigit())

    def check_pointer(self) -> Path:
        """The folder `latest.json` points at.

        Raises:
            DamagedFileError: the pointer is unreadable, or names no folder, or the folder's seal is another one.
        """
        pointer = self.folder / "latest.json"
        try:
            latest = json.loads(pointer.read_bytes())
            path = self._path(int(latest["checkpoint"].removeprefix("step-")))
            if latest["checkpoint"] != path.name or set(latest) != {"checkpoint", "manifest"}:
                raise ValueError("not a checkpoint's name")
            seal = latest["manifest"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedFileError(pointer, f"unreadable ({type(error).__name__})") from error
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise DamagedFileError(pointer if not path.is_dir() else manifest, "missing")
        if sha256_of(manifest) != seal:
            raise DamagedFileError(manifest, f"its checksum is not the one in {pointer.name}")
        return path

    def _candidates(self) -> list[Path]:
        newest_first = [self._path(step) for step in reversed(self.steps())]
        if not newest_first:
            return []
        try:
            first = self.check_pointer()
        except DamagedFileError as error:
            warnings.warn(f"{error.message}; looking at the checkpoints themselves", stacklevel=3)
            return newest_first
        return [first, *(path for path in newest_first if path != first)]

    def _whole(self, path: Path) -> bool:
        try:
            verify_folder(path)
        except DamagedFileError:
            return False
        return True

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint folder after checking every byte of it.

    Raises:
        DamagedFileError: naming the file that is missing, truncated or altered.
    """
    verify_folder(path)
    try:
        state = json.loads((path / "state.json").read_bytes())
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedFileError(path, str(error)) from error
    return Checkpoint(int(path.name.removeprefix("step-")), tensors, state)


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them (tied weights are written twice)."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return stored


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    for group, tensors in checkpoint.tensors.items():
        save_file(storable(tensors), folder / f"{group}.safetensors")
    (folder / "state.json").write_text(json.dumps(checkpoint.state, allow_nan=False))

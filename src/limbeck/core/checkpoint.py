"""Checkpoints: whole or absent, sealed with checksums, with the previous one to fall back on."""

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.durable import (
    MANIFEST,
    commit_folder,
    read_json,
    read_manifest,
    remove_leftovers,
    sha256_of,
    verify_folder,
    write_json,
)
from limbeck.core.errors import DamagedFileError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved moment: groups of named tensors and plain state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for group in self.tensors.values() for tensor in group.values())


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
        """Writes a checkpoint and returns its folder; a whole one of the same step is kept as it is.

        Older ones stay as far as `keep` allows. Later ones, which a fallback or a rewind made void, go.

        Raises:
            DiskFullError: there is no room; the previous checkpoint is untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        target = self._path(checkpoint.step)
        if not self._whole(target):
            commit_folder(target, lambda folder: _fill(folder, checkpoint), checkpoint.size)
        seal = sha256_of(target / MANIFEST)
        write_json(self.folder / "latest.json", {"checkpoint": target.name, "manifest": seal})
        self._prune(checkpoint.step)
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
        names = (path.name for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-[0-9]{9,18}", name))

    def check_pointer(self) -> Path:
        """The folder `latest.json` points at.

        Raises:
            DamagedFileError: the pointer or the manifest it vouches for is missing or altered; the error names which.
        """
        pointer = self.folder / "latest.json"
        match read_json(pointer):
            case {"checkpoint": str() as name, "manifest": str() as seal, **rest} if not rest:
                path = self.folder / name
            case _:
                raise DamagedFileError(pointer, "it names no checkpoint")
        if path not in [self._path(step) for step in self.steps()]:
            raise DamagedFileError(pointer, f"there is no checkpoint {name[:40]!r}")
        read_manifest(path)  # it vouches for itself, so that if the two do not fit the pointer is to blame
        if sha256_of(path / MANIFEST) != seal:
            raise DamagedFileError(pointer, f"it does not fit the manifest of {name}")
        return path

    def _candidates(self) -> list[Path]:
        newest_first = [self._path(step) for step in reversed(self.steps())]
        pointed = (self.folder / "latest.json").exists()
        if not pointed and len(newest_first) <= 1:
            return newest_first  # no checkpoint yet, or a crash came between the first one and its pointer
        try:
            first = self.check_pointer()
        except DamagedFileError as error:
            if not newest_first:
                raise  # there were checkpoints: starting from scratch would hide their loss
            warnings.warn(f"{error.message}; looking at the checkpoints themselves", stacklevel=3)
            return newest_first
        return [first, *(path for path in newest_first if path != first)]

    def _whole(self, path: Path) -> bool:
        try:
            verify_folder(path)
        except DamagedFileError:
            return False
        return True

    def _prune(self, newest: int) -> None:
        steps = self.steps()
        older = [step for step in steps if step <= newest]
        for step in {*older[: -self.keep], *(step for step in steps if step > newest)}:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint folder after checking every byte of it.

    Raises:
        DamagedFileError: naming the file that is missing, truncated or altered.
    """
    files = [path / name for name in verify_folder(path)]
    state = read_json(path / "state.json")
    if not isinstance(state, dict):
        raise DamagedFileError(path / "state.json", "it is no JSON object")
    tensors = {file.stem: _tensors(file) for file in files if file.suffix == ".safetensors"}
    return Checkpoint(int(path.name.removeprefix("step-")), tensors, state)


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them (tied weights are written twice)."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage()
        shared = memory.data_ptr() in seen or memory.nbytes() != plain.nbytes
        stored[name] = plain.clone() if shared else plain
        seen.add(memory.data_ptr())
    return stored


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedFileError(file, str(error)) from error


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    for group, tensors in checkpoint.tensors.items():
        save_file(storable(tensors), folder / f"{group}.safetensors")
    (folder / "state.json").write_text(json.dumps(checkpoint.state, allow_nan=False))

"""Soft labels of crops on disk: a file for each batch of each step, with how its images were cropped."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from limbeck.core.durable import read_json, write_bytes, write_json
from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.core.randomness import derive

_ABOUT = "crop_labels.json"


class CropLabels:
    """A folder of soft labels.

    Args:
        folder: made when the first batch is stored.
        about: what the labels depend on, as plain data: the teacher's hash, how crops are drawn.

    Raises:
        IncompatibleError: the folder holds labels that depend on something else.
    """

    def __init__(self, folder: Path | str, about: Mapping[str, Any]) -> None:
        self.folder, self.about = Path(folder), dict(about)
        path = self.folder / _ABOUT
        if path.exists() and read_json(path) != self.about:
            raise IncompatibleError(
                f"{self.folder} holds labels of another teacher or of other crops", "name another folder"
            )

    def read(self, step: int, index: Tensor) -> dict[str, Tensor] | None:
        """What was stored for the items `index` (items,) at a step; None where nothing was.

        Raises:
            DamagedFileError: the file is not what was written.
        """
        path = self._path(step, index)
        try:
            tensors = load(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            raise DamagedFileError(path, f"unreadable ({type(error).__name__})") from error
        seal = tensors.pop("seal", None)
        if seal is None or not torch.equal(seal, _seal(tensors)):
            raise DamagedFileError(path, "its content is not what was written")
        return {name: tensor.to(index.device) for name, tensor in tensors.items()}

    def write(self, step: int, index: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Stores the tensors of the items `index` at a step, as a whole or not at all."""
        if not (self.folder / _ABOUT).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / _ABOUT, self.about)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(self._path(step, index), save({**kept, "seal": _seal(kept)}))

    def _path(self, step: int, index: Tensor) -> Path:
        return self.folder / f"step-{step:09d}-{derive(0, *index.tolist()):016x}.safetensors"


def _seal(tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of names, shapes and bytes, (32,) uint8."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)

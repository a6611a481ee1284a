"""Reading and writing a model's files: safetensors and JSON, checked before anything is made of them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from limbeck.core.checkpoint import storable
from limbeck.core.durable import write_bytes
from limbeck.core.errors import DamagedFileError, UsageError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LARGEST_CONFIG = 16 << 20


def check_folder(folder: Path) -> None:
    """Refuses a folder whose files lie elsewhere or would run code when loaded.

    Raises:
        UsageError: no such folder; a link that leaves it; weights as a pickle and not as safetensors.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder '{folder}'", "give the folder that holds config.json")
    home = folder.resolve()
    for path in folder.rglob("*"):
        target = path.resolve()
        if path.is_symlink() and not target.is_relative_to(home) and not _is_hub_blob(home, target):
            raise UsageError(f"{path} is a link that leaves its folder", "copy the file itself into the folder")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"the weights in {folder} are a pickle ({pickles[0]}), which can run code when loaded",
            "save them again as safetensors",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `config.json`.

    Raises:
        DamagedFileError: the file is missing, larger than 16 MiB, or no JSON object.
    """
    return read_object(folder / CONFIG)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedFileError: the file is missing, larger than 16 MiB, or no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise DamagedFileError(path, "too large for a configuration")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedFileError(path, "missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"not readable as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise DamagedFileError(path, "not a JSON object")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, on the CPU.

    Raises:
        DamagedFileError: the file is missing, truncated or no safetensors.
    """
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DamagedFileError(path, "missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(path, str(error)) from error


def write_weights(model: nn.Module, folder: Path) -> None:
    """Writes a model's weights and buffers as `model.safetensors`, atomically; tied weights are written out."""
    write_bytes(folder / WEIGHTS, save(storable(model.state_dict()), metadata={"format": "pt"}))


def _is_hub_blob(home: Path, target: Path) -> bool:
    """Whether a link is one of those by which the Hugging Face cache shares files between snapshots."""
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"

"""Quantised models on disk: indices in as few bits as they need, in one file beside or in place of the weights."""

import json
import tempfile
from pathlib import Path
from shutil import copy2
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from limbeck.compression.quantized import QuantizedStateDict, note_quantization, quantization_of
from limbeck.compression.storage import compact, digest, expand
from limbeck.core.durable import MANIFEST, write_bytes
from limbeck.core.errors import DamagedFileError, IncompatibleError
from limbeck.models.adapters.diffusers_classes import COMPONENTS
from limbeck.models.files import CONFIG, WEIGHTS

QUANTIZED = "quantized.safetensors"
"""Name of the file; it lies where the weights do, which of a pipeline is the folder of its network."""

_LARGEST_DESCRIPTION = 64 << 20


def save_note(model: nn.Module, folder: Path) -> None:
    """Writes how a model's weights are quantised, beside the weights; nothing for models that are not.

    A model that was trained on since it was quantised is no longer quantised.
    """
    state = quantization_of(model)
    if state is not None:
        write_bytes(compact_file(folder), quantized_bytes(state))


def load_note(model: nn.Module, folder: Path) -> None:
    """Notes on a loaded model what the file beside its weights says, where there is one.

    Raises:
        DamagedFileError: the file is altered, or does not describe these very weights.
    """
    path = compact_file(folder)
    if not path.is_file():
        return
    state, _ = read_quantized(path)
    if not state.describes(model):
        raise DamagedFileError(path, "it describes other weights than those beside it")
    note_quantization(model, state)


def quantized_bytes(state: QuantizedStateDict, plain: nn.Module | None = None) -> bytes:
    """The content of the file; with `plain`, the model, also what is not quantised of it."""
    tensors, metadata = compact(state, plain)
    return save(tensors, metadata)


def export_quantized(model: nn.Module, folder: Path) -> None:
    """Writes a folder with the model's configuration and, in place of its weights, the compact file.

    `limbeck.load` reads it, to the same bits; the libraries of the model's own ecosystem do not. The other
    components of a pipeline are copied as they are.

    Raises:
        IncompatibleError: the model is not quantised.
    """
    from limbeck.models.saved import save_model

    state = quantization_of(model)
    if state is None:
        raise IncompatibleError(
            "the model's weights are not quantised", "quantise it: quantized-distillation, differentiable-quantization"
        )
    save_model(model, folder, compact=False)
    file = compact_file(folder)
    for path in [*file.parent.glob("*.safetensors"), *file.parent.glob("*.safetensors.index.json")]:
        path.unlink()
    write_bytes(file, quantized_bytes(state, model))


def compact_file(folder: Path) -> Path:
    """Where the compact file of a model's folder lies, whether there is one or not."""
    homes = [folder / part for part in COMPONENTS if (folder / part / CONFIG).is_file()]
    return (homes[0] if homes else folder) / QUANTIZED


def is_compact(folder: Path) -> bool:
    """Whether a folder holds the compact file in place of weights."""
    file = compact_file(folder)
    return file.is_file() and not any(path.name != QUANTIZED for path in file.parent.glob("*.safetensors"))


def load_compact(folder: Path) -> nn.Module:
    """Loads what `export_quantized` wrote of any model but one of diffusers: the very weights, to the bit.

    The weights are written out into a temporary folder, so that each ecosystem's own reader builds the model.

    Raises:
        DamagedFileError: the file is altered, truncated or incomplete.
        IncompatibleError: the weights do not fit the configuration.
    """
    from limbeck.models.saved import load_model

    state, weights = read_quantized(folder / QUANTIZED)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name)
        for path in folder.iterdir():
            if path.is_file() and path.name not in (QUANTIZED, MANIFEST):
                copy2(path, whole)
        cloned = {name: value.clone() for name, value in weights.items()}  # tied ones are stored apart
        save_file(cloned, whole / WEIGHTS, metadata={"format": "pt"})
        model: Any = load_model(whole)
    if not state.describes(model):
        raise DamagedFileError(folder / QUANTIZED, "it is not of the model that config.json describes")
    if getattr(getattr(model, "config", None), "_name_or_path", ""):
        model.config._name_or_path = str(folder)
    return note_quantization(model, state)


def fill_compact(model: nn.Module, folder: Path) -> nn.Module:
    """Fills a model from a folder's compact file, to the bit, and notes on it how its weights are quantised.

    Raises:
        DamagedFileError: the file is altered, truncated or incomplete.
        IncompatibleError: the weights do not fit the model.
    """
    state, weights = read_quantized(compact_file(folder))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise IncompatibleError(f"the weights in {folder} do not fit its configuration: {reason[0].strip()}") from error
    return note_quantization(model, state)


def read_quantized(path: Path) -> tuple[QuantizedStateDict, dict[str, Tensor]]:
    """The quantised parameters of a file, and with them the whole state dict where it holds one.

    Raises:
        DamagedFileError: the file is missing, truncated, altered, or not what its name says.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        content = metadata["quantized"]
        if len(content) > _LARGEST_DESCRIPTION or digest(content, tensors) != metadata["sha256"]:
            raise DamagedFileError(path, "its checksum does not match")
        return expand(tensors, json.loads(content))
    except FileNotFoundError:
        raise DamagedFileError(path, "missing") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise DamagedFileError(path, f"it holds no quantised weights ({error})") from error

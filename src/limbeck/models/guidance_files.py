"""Guidance adapters on disk: files of their own, beside a copy of their base model or without one."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from limbeck.core.checkpoint import storable
from limbeck.core.durable import write_bytes, write_json
from limbeck.core.errors import DamagedFileError, IncompatibleError, UsageError
from limbeck.diffusion.guidance_adapted import GuidanceAdapted
from limbeck.diffusion.guidance_adapters import AdapterConfig
from limbeck.models.process_file import load_process, save_process

CONFIG = "guidance_adapters.json"
WEIGHTS = "guidance_adapters.safetensors"
BASE = "base"
"""Subfolder with the base model."""


def save_adapted(model: GuidanceAdapted, folder: Path) -> None:
    """Writes adapters and, in `base`, the network that they stand on, as stock libraries load it."""
    from limbeck.models.saved import save_model

    save_model(model.network, folder / BASE)
    save_guidance_adapters(model, folder)


def save_guidance_adapters(model: GuidanceAdapted, folder: Path) -> None:
    """Writes the adapters alone: their weights by the module paths of their blocks, their configuration, the process.

    `load_model(folder, model=base)` puts them on any network with the same blocks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, save(storable(model.adapters.state_dict()), metadata={"format": "pt"}))
    write_json(folder / CONFIG, model.config.config())
    save_process(model, folder)


def load_adapted(folder: Path, base: nn.Module | None = None) -> GuidanceAdapted:
    """Puts stored adapters on a network, which is frozen.

    Args:
        folder: written by one of the functions above.
        base: the network; the stored copy if absent.

    Raises:
        UsageError: the folder holds no base model, and none is given.
        IncompatibleError: the adapters do not fit the network.
        DamagedFileError: a file is missing or not what its name says.
    """
    from limbeck.models.saved import load_model

    if base is None and not (folder / BASE).is_dir():
        raise UsageError(f"{folder} holds guidance adapters without their base model", "load it with model=…")
    config, weights = _read(folder)
    base = load_model(folder / BASE) if base is None else base
    try:
        model = GuidanceAdapted(base, config)
        model.adapters.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise IncompatibleError(f"the adapters in {folder} do not fit {type(base).__name__}: {reason}") from error
    load_process(model, folder)
    return model


def _read(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    try:
        config = AdapterConfig.from_config(json.loads((folder / CONFIG).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(folder / CONFIG, f"it describes no guidance adapters ({error})") from error
    try:
        return config, load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedFileError(folder / WEIGHTS, str(error)) from error

"""The file in which a model's folder says how a network denoises, where the format of its weights cannot."""

import json
from pathlib import Path

from torch import nn

from limbeck.core.durable import write_json
from limbeck.core.errors import DamagedFileError
from limbeck.diffusion.denoiser import Process, note_process, process_of
from limbeck.models.normalisation import normalisation_of, set_normalisation

PROCESS = "limbeck_process.json"
"""Name of the file; it counts for more than a scheduler's configuration."""


def save_process(model: nn.Module, folder: Path) -> None:
    """Writes the process noted on a model, with what its images are normalised with; nothing for other models."""
    process, normalisation = process_of(model), normalisation_of(model)
    if process is None:
        return
    content = {"process": process.config(), "normalisation": None}
    if normalisation is not None:
        content["normalisation"] = {"mean": normalisation[0], "std": normalisation[1]}
    write_json(folder / PROCESS, content)


def load_process(model: nn.Module, folder: Path) -> None:
    """Notes on a model what the file in its folder says, where there is one.

    Raises:
        DamagedFileError: it describes no process.
    """
    path = folder / PROCESS
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        note_process(model, Process.from_config(content["process"]))
        if content["normalisation"] is not None:
            set_normalisation(model, content["normalisation"]["mean"], content["normalisation"]["std"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedFileError(path, f"it describes no diffusion process ({error})") from error

"""Networks of diffusers on their way back into pipeline folders that stock diffusers loads."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from limbeck.core.durable import write_bytes, write_json
from limbeck.diffusion.denoiser import process_of
from limbeck.diffusion.ports import NULL_PROMPT
from limbeck.models.adapters.diffusers_classes import (
    COMPONENTS,
    EMPTY,
    INDEX,
    components_of,
    may_be_copied,
    pipeline_class,
    pipeline_of,
    stored_scheduler,
)
from limbeck.models.adapters.diffusers_encoders import NullPrompt
from limbeck.models.adapters.diffusers_samplers import scheduler_for
from limbeck.models.files import read_object
from limbeck.models.process_file import save_process

_OF_PIXELS = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")


def save_diffusers(network: nn.Module, folder: Path) -> None:
    """Writes a network so that stock diffusers loads and samples it.

    Where it came out of a pipeline the folder is a whole one again, with the other components as copies; else it is
    one where a stock pipeline needs nothing else, and otherwise the network in `unet` or `transformer` with its
    `scheduler`. The scheduler samples as the network's process says; what it cannot say (the guidance scale, the
    number of steps) is in limbeck's own file.
    """
    saved: Any = network
    part = "unet" if "UNet" in type(network).__name__ else "transformer"
    saved.save_pretrained(folder / part, safe_serialization=True)
    _forget_origin(folder / part / "config.json")
    process, origin = process_of(network), pipeline_of(network)
    index: dict[str, Any] = read_object(origin / INDEX) if origin is not None else {}
    scheduler = None
    if process is not None:
        stored = stored_scheduler(origin) if origin is not None else None
        scheduler = scheduler_for(process, network, stored, pipeline_class(index))
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    _save_notes(network, folder)
    pipeline = _fitting_pipeline(network, scheduler, index)
    if pipeline is not None:
        if origin is not None:
            _copy_components(origin, index, folder)
        _write_index(folder, pipeline, index, {part: network, "scheduler": scheduler})


def _save_notes(network: nn.Module, folder: Path) -> None:
    save_process(network, folder)
    empty = getattr(network, NULL_PROMPT, None)
    known = empty.known if isinstance(empty, NullPrompt) else empty
    if known:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in known.items()}
        write_bytes(folder / EMPTY, save(tensors))


def _fitting_pipeline(network: Any, scheduler: Any, index: dict[str, Any]) -> str | None:
    """Name of the stock pipeline that samples a network with a scheduler; None where there is none."""
    name, origin = type(scheduler).__name__, index.get("_class_name")
    if type(network).__name__ != "UNet2DModel" or origin not in (None, *_OF_PIXELS):
        return "SanaSprintPipeline" if origin == "SanaPipeline" and name == "SCMScheduler" else origin
    if name == "CMStochasticIterativeScheduler":
        return "ConsistencyModelPipeline"
    if network.class_embedding is not None:
        return None  # the two below give the network no class
    if name == "DDIMScheduler":
        return "DDIMPipeline"
    return "DDPMPipeline" if name in ("DDPMScheduler", "LCMScheduler", "TCDScheduler") else None


def _copy_components(origin: Path, index: dict[str, Any], folder: Path) -> None:
    for name, (_, kind) in components_of(index).items():
        if kind is None or name in (*COMPONENTS, "scheduler") or not (origin / name).is_dir():
            continue
        for path in sorted((origin / name).rglob("*")):
            if path.is_file() and may_be_copied(path):
                target = folder / name / path.relative_to(origin / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)  # the file behind a link of the hub's cache


def _write_index(folder: Path, pipeline: str, index: dict[str, Any], parts: dict[str, Any]) -> None:
    import diffusers

    written = {name: value for name, value in index.items() if name != "_name_or_path"}
    written |= {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        if part is not None:
            written[name] = ["diffusers", type(part).__name__]
    write_json(folder / INDEX, written)


def _forget_origin(path: Path) -> None:
    """Paths of the machine that trained a network are no business of those who use it."""
    config = read_object(path)
    if config.pop("_name_or_path", None) is not None:
        write_json(path, config)

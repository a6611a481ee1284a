"""diffusers' denoising networks: out of pipeline folders and back into them, with what is known of how they denoise."""

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from limbeck.core.durable import write_bytes, write_json
from limbeck.core.errors import DamagedFileError, IncompatibleError, RecipeError, UsageError, did_you_mean
from limbeck.core.method import DataInfo
from limbeck.diffusion.denoiser import Process, note_process, process_of
from limbeck.diffusion.ports import NULL_PROMPT, is_own
from limbeck.models.adapters.diffusers_classes import (
    COMPONENTS,
    INDEX,
    components_of,
    local_folder,
    may_be_copied,
    named_class,
    read_object,
)
from limbeck.models.adapters.diffusers_encoders import NullPrompt, has_text
from limbeck.models.adapters.diffusers_schedulers import null_label_of, process_from_scheduler, scheduler_for
from limbeck.models.process_file import PROCESS, load_process, save_process

EMPTY = "limbeck_null_prompt.safetensors"
"""File with the condition of the empty prompt, where it is known."""

_PIPELINE = "limbeck_pipeline"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, SafetensorError)
_OF_PIXELS = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")


def load_diffusers(
    origin: str | Path, arguments: Mapping[str, Any] | None = None, classes: int = 0, key: str = "model"
) -> nn.Module:
    """The denoising network of a pipeline folder, or of a bare model's, in float32, with its process noted on it.

    What the folder says of the process in limbeck's own file comes first, then its scheduler; of a bare model nothing
    may be known. The other components stay in their folder, which is noted too, and are copied when the network is
    saved.

    Args:
        origin: folder with model_index.json or with a model's config.json, or a pipeline's id on the hub.
        arguments: `pretrained: false` gives fresh weights, and then any field of the configuration may be changed.
        classes: of the data; a network whose class embeddings all belong to classes has no null label.
        key: dotted path of the model in its recipe, for messages.

    Raises:
        UsageError: no such folder or pipeline, or files that would run code.
        IncompatibleError: a network or scheduler that is not known here, or weights that do not fit.
        DamagedFileError: a file is not what its name says.
    """
    folder = local_folder(origin)
    index = read_object(folder / INDEX) if (folder / INDEX).is_file() else {}
    where = _network_folder(folder, index)
    given = dict(arguments or {})
    pretrained = given.pop("pretrained", True)
    if given and pretrained:
        raise RecipeError(f"{key}.arguments", "stored weights take no arguments", "fresh ones need pretrained: false")
    network = _read_network(where) if pretrained else _fresh_network(where, given, key)
    _prepare(network)
    process = _read_process(folder, where, network, _pipeline_class(index))
    if process is not None:
        own = (folder / PROCESS).is_file()
        note_process(network, process if own else _for_classes(process, network, classes))
    if index:
        setattr(network, _PIPELINE, str(folder))
    if (folder / EMPTY).is_file():
        setattr(network, NULL_PROMPT, _read_tensors(folder / EMPTY))
    elif has_text(index):
        setattr(network, NULL_PROMPT, NullPrompt(folder))
    return network


def build_diffusers(class_name: str, arguments: Mapping[str, Any], data: DataInfo, key: str = "model") -> nn.Module:
    """A network of diffusers with fresh weights, by the name of its class.

    What `arguments` leave open is read from the data (channels, size, classes with one more for no class, widths of
    the prompt's embeddings), and else the class's own default.

    Raises:
        RecipeError: no such class, or an argument that it does not take.
        IncompatibleError: the data hold no images or latents.
    """
    from diffusers import ModelMixin

    kind = named_class(class_name, ModelMixin)
    if kind is None:
        raise RecipeError(f"{key}.name", f"diffusers has no network '{class_name}'")
    known = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    _check_arguments(arguments, known, class_name, key)
    found = {name: value for name, value in _fields(class_name, data).items() if name in known}
    try:
        network = kind(**(found | _as_tuples(arguments)))
    except _DAMAGE as error:
        raise RecipeError(f"{key}.arguments", f"no {class_name} can be built: {_reason(error)}") from error
    return _prepare(network)


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
        scheduler = scheduler_for(process, network, stored, _pipeline_class(index))
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    _save_notes(network, folder)
    pipeline = _fitting_pipeline(network, scheduler, index)
    if pipeline is not None:
        if origin is not None:
            _copy_components(origin, index, folder)
        _write_index(folder, pipeline, index, {part: network, "scheduler": scheduler})


def note_pipeline(network: nn.Module, folder: Path | str) -> nn.Module:
    """Notes on a network the pipeline whose other components it goes with. Returns the network."""
    setattr(network, _PIPELINE, str(Path(folder).expanduser().resolve()))
    return network


def pipeline_of(network: nn.Module) -> Path | None:
    """The folder of the pipeline that a network goes with; None where there is none, or none any more."""
    noted = getattr(network, _PIPELINE, None)
    return Path(noted) if noted is not None and (Path(noted) / INDEX).is_file() else None


def _network_folder(folder: Path, index: dict[str, Any]) -> Path:
    parts = components_of(index)
    found = [name for name in COMPONENTS if parts.get(name, (None, None))[1] is not None]
    if index and not found:
        raise IncompatibleError(f"the pipeline in {folder} has neither a unet nor a transformer", "take another one")
    if found:
        return folder / found[0]
    return next((folder / part for part in COMPONENTS if (folder / part / "config.json").is_file()), folder)


def _network_class(where: Path) -> tuple[Any, dict[str, Any]]:
    from diffusers import ModelMixin

    config = read_object(where / "config.json")
    kind = named_class(config.get("_class_name"), ModelMixin)
    if kind is None:
        raise UsageError(f"{where / 'config.json'} names no network of diffusers", "set its '_class_name'")
    return kind, config


def _read_network(where: Path) -> nn.Module:
    kind, _ = _network_class(where)
    try:
        network, report = kind.from_pretrained(
            str(where),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except _DAMAGE as error:
        raise DamagedFileError(where, f"no {kind.__name__} ({_reason(error)})") from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise IncompatibleError(f"the weights in {where} are not those of its config.json: {wrong[0]}")
    return network.requires_grad_(True)


def _fresh_network(where: Path, changes: dict[str, Any], key: str) -> nn.Module:
    kind, config = _network_class(where)
    _check_arguments(changes, [name for name in config if not name.startswith("_")], kind.__name__, key)
    stored = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        return kind.from_config(stored | _as_tuples(changes))
    except _DAMAGE as error:
        raise RecipeError(f"{key}.arguments", f"no {kind.__name__} can be built: {_reason(error)}") from error


def _prepare(network: Any) -> nn.Module:
    """Refuses networks that cannot be called here; leaves it to the methods which conditions are dropped."""
    if is_own(network):
        raise IncompatibleError(
            f"a {type(network).__name__} cannot be called here", "limbeck.diffusion.ports lists the networks that can"
        )
    for module in network.modules():
        if type(module).__name__ == "LabelEmbedding":  # DiT's drops labels by itself, whatever item they belong to
            module.dropout_prob = 0.0
    return network


def stored_scheduler(folder: Path) -> dict[str, Any] | None:
    """The configuration of the scheduler in a pipeline's or model's folder; None where there is none."""
    places = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    return next((read_object(place) for place in places if place.is_file()), None)


def _read_process(folder: Path, where: Path, network: nn.Module, pipeline: type | None) -> Process | None:
    load_process(network, folder)
    if process_of(network) is not None:
        return process_of(network)
    config = stored_scheduler(folder) or stored_scheduler(where)
    return None if config is None else process_from_scheduler(config, network, pipeline)


def _for_classes(process: Process, network: nn.Module, classes: int) -> Process:
    return Process(
        process.schedule,
        process.parameterisation,
        process.sampling,
        null_label_of(network, classes),
        process.guidance_input,
    )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(path, str(error)) from error


def _save_notes(network: nn.Module, folder: Path) -> None:
    save_process(network, folder)
    empty = getattr(network, NULL_PROMPT, None)
    known = empty.known if isinstance(empty, NullPrompt) else empty
    if known:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in known.items()}
        write_bytes(folder / EMPTY, save(tensors))


def _pipeline_class(index: dict[str, Any]) -> Any:
    from diffusers import DiffusionPipeline

    return named_class(index.get("_class_name"), DiffusionPipeline)


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


def _check_arguments(arguments: Mapping[str, Any], known: list[str], class_name: str, key: str) -> None:
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known)
            raise RecipeError(f"{key}.arguments.{name}", f"not in the configuration of {class_name}", hint)


def _as_tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


def _fields(class_name: str, data: DataInfo) -> dict[str, Any]:
    """Fields of a configuration that the data settle."""
    if "image" not in data.example:
        raise IncompatibleError(f"'{class_name}' takes images or latents, and the data hold {', '.join(data.example)}")
    channels, height, width = data.example["image"].shape[1:]
    packed = 4 * channels if class_name.startswith("Flux") else channels
    size = height if height == width or class_name != "UNet2DModel" else (height, width)
    found: dict[str, Any] = {"sample_size": size, "in_channels": packed, "out_channels": channels}
    if class_name.startswith("Flux"):
        found["out_channels"] = packed
    if data.classes and "prompt" not in data.example:
        found |= {"num_class_embeds": data.classes + 1, "num_embeds_ada_norm": data.classes}
    if "prompt" in data.example:
        wide = data.example["prompt"].shape[-1]
        found |= {"joint_attention_dim": wide, "caption_channels": wide}
        if class_name.startswith("UNet"):
            found["cross_attention_dim"] = wide
    if "pooled" in data.example:
        wide = data.example["pooled"].shape[-1]
        found["pooled_projection_dim"] = wide
        if "time_ids" in data.example:
            found |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
            found["projection_class_embeddings_input_dim"] = wide + 256 * data.example["time_ids"].shape[-1]
    return found


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.200}" if lines else type(error).__name__

"""diffusers' denoising networks: out of pipeline folders or fresh, with what is known of how they denoise."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from limbeck.core.errors import DamagedFileError, IncompatibleError, RecipeError, UsageError, did_you_mean
from limbeck.core.method import DataInfo
from limbeck.diffusion.denoiser import Process, note_process, process_of
from limbeck.diffusion.ports import NULL_PROMPT, is_own
from limbeck.models.adapters.diffusers_classes import (
    COMPONENTS,
    EMPTY,
    INDEX,
    PIPELINE,
    components_of,
    local_folder,
    named_class,
    pipeline_class,
    stored_scheduler,
)
from limbeck.models.adapters.diffusers_encoders import NullPrompt, has_text
from limbeck.models.adapters.diffusers_schedulers import null_label_of, process_from_scheduler
from limbeck.models.files import read_object
from limbeck.models.process_file import PROCESS, load_process
from limbeck.models.quantized_files import fill_compact, is_compact

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, SafetensorError)


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
    process = _read_process(folder, where, network, pipeline_class(index))
    if process is not None:
        own = (folder / PROCESS).is_file()
        note_process(network, process if own else _for_classes(process, network, classes))
    if index:
        setattr(network, PIPELINE, str(folder))
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
    kind, config = _network_class(where)
    try:
        if is_compact(where):
            return fill_compact(kind.from_config(_fields_of(config)), where).requires_grad_(True).eval()
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
    _check_arguments(changes, list(_fields_of(config)), kind.__name__, key)
    try:
        return kind.from_config(_fields_of(config) | _as_tuples(changes))
    except _DAMAGE as error:
        raise RecipeError(f"{key}.arguments", f"no {kind.__name__} can be built: {_reason(error)}") from error


def _fields_of(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


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

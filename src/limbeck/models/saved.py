"""Models on disk: the ecosystem's own format where there is one, and nothing that runs code when it is loaded."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from limbeck.core.durable import MANIFEST, verify_folder, write_json
from limbeck.core.errors import DamagedFileError, IncompatibleError, UsageError
from limbeck.diffusion.denoiser import Process, note_process, process_of
from limbeck.diffusion.guidance_adapted import GuidanceAdapted
from limbeck.models.files import CONFIG, check_folder, read_config, read_weights, write_weights
from limbeck.models.normalisation import normalisation_of, set_normalisation
from limbeck.models.quantized_files import fill_compact, is_compact, load_compact, load_note, save_note
from limbeck.models.shipped import build_shipped, shipped_name

FORMAT = "limbeck"
"""Value of `format` in the config.json of shipped networks and of models of no known ecosystem."""


def save_model(model: nn.Module, folder: Path, *, compact: bool = True) -> None:
    """Writes a model into a folder, which is created if it is missing.

    Shipped networks become `config.json` and `model.safetensors`; timm models what `timm.create_model("local-dir:…")`
    loads; transformers models what `from_pretrained` loads; networks of diffusers a pipeline, or the part of one that
    its stock classes load; models with an adapter what `PeftModel.from_pretrained` loads. Guidance adapters are
    files of their own beside their base model. Of any other model the weights and the name of its class are kept: it
    is loaded into an object of that class.

    Beside the weights of a quantised model `quantized.safetensors` keeps how they are quantised, unless `compact` is
    false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = ecosystem(model)
    if isinstance(model, GuidanceAdapted):
        from limbeck.models.guidance_files import save_adapted

        save_adapted(model, folder)
    elif kind == "peft":
        from limbeck.models.adapters.peft import save_adapter

        save_adapter(model, folder)
    elif kind == "timm":
        from limbeck.models.adapters.timm import save_timm

        save_timm(model, folder)
    elif kind == "transformers":
        from limbeck.models.adapters.transformers import save_transformers

        save_transformers(model, folder)
    elif kind == "diffusers":
        from limbeck.models.adapters.diffusers_saving import save_diffusers

        save_diffusers(model, folder)
    else:
        write_weights(model, folder)
        write_json(folder / "config.json", _own_config(model))
    if compact and kind != "peft":
        save_note(model, folder)


def load_model(folder: Path, model: nn.Module | None = None) -> nn.Module:
    """Loads what `save_model` wrote, or a folder that timm, transformers or diffusers wrote, on the CPU.

    Args:
        folder: holds `config.json` and `model.safetensors`, an adapter of peft, or a pipeline's `model_index.json`.
        model: what to load the weights into; needed for models of no known ecosystem, ignored by none. To an adapter
            it is the base model.

    Raises:
        UsageError: no such folder, a pickle instead of safetensors, or a link that leaves the folder.
        IncompatibleError: the weights do not fit `model`, or `model` is needed and absent.
        DamagedFileError: a file is missing, truncated or not what its name says, or describes other weights.
    """
    check_folder(folder)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    if is_compact(folder) and not _is_of_diffusers(folder):
        return load_compact(folder) if model is None else fill_compact(model, folder)
    loaded = _load(folder, model)
    load_note(loaded, folder)
    return loaded


def _load(folder: Path, model: nn.Module | None) -> nn.Module:
    if (folder / "guidance_adapters.json").is_file():
        from limbeck.models.guidance_files import load_adapted

        return load_adapted(folder, model)
    if (folder / "adapter_config.json").is_file():
        from limbeck.models.adapters.peft import load_adapter

        return load_adapter(folder, model)
    if _is_of_diffusers(folder):
        from limbeck.models.adapters.diffusers import load_diffusers

        stored = load_diffusers(folder)
        return stored if model is None else _fill(model, stored.state_dict(), folder)
    config = read_config(folder)
    if model is not None:
        return load_weights(model, folder)
    if config.get("format") == FORMAT:
        return _load_own(folder, config)
    if "architecture" in config:
        from limbeck.models.adapters.timm import load_timm

        return load_timm(folder)
    if "architectures" in config or "model_type" in config:
        from limbeck.models.adapters.transformers import load_transformers

        return load_transformers(folder)
    raise UsageError(
        f"{folder / 'config.json'} names no known kind of model",
        "give a folder written by limbeck, timm, transformers or diffusers",
    )


def load_weights(model: nn.Module, folder: Path) -> nn.Module:
    """Fills a model from `model.safetensors` and returns it.

    Raises:
        IncompatibleError: a tensor is missing, left over, or of another shape.
    """
    return _fill(model, read_weights(folder), folder)


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else lines[0]
        raise IncompatibleError(f"the weights in {folder} do not fit {type(model).__name__}: {reason}") from error
    return model


def ecosystem(model: nn.Module) -> str:
    """Whose model this is: "peft" (with an adapter), "timm", "transformers", "diffusers", or "limbeck" for all else."""
    origin = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "peft" in origin:
        return "peft"
    if "timm" in origin or hasattr(model, "pretrained_cfg"):
        return "timm"
    if "transformers" in origin:
        return "transformers"
    return "diffusers" if "diffusers" in origin else "limbeck"


def _is_of_diffusers(folder: Path) -> bool:
    marks = ("model_index.json", "unet/config.json", "transformer/config.json")
    if any((folder / name).is_file() for name in marks):
        return True
    return (folder / CONFIG).is_file() and "_class_name" in read_config(folder)


def _own_config(model: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = {"format": FORMAT, "version": 1}
    name = shipped_name(model)
    if name is not None:
        config |= {"model": name, "arguments": model.config}
    else:
        config["class"] = f"{type(model).__module__}.{type(model).__qualname__}"
    normalisation = normalisation_of(model)
    if normalisation is not None:
        config["normalisation"] = {"mean": normalisation[0], "std": normalisation[1]}
    process = process_of(model)
    if process is not None:
        config["process"] = process.config()
    return config


def _load_own(folder: Path, config: dict[str, Any]) -> nn.Module:
    if "model" not in config:
        raise IncompatibleError(
            f"{folder} holds the weights of a {config.get('class', 'model')} but not how it is built",
            "load it with limbeck.load(folder, model=…), giving an object of that class",
        )
    try:
        model = build_shipped(config["model"], config["arguments"])
        normalisation = config.get("normalisation")
        if normalisation is not None:
            set_normalisation(model, normalisation["mean"], normalisation["std"])
        if "process" in config:
            note_process(model, Process.from_config(config["process"]))
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise DamagedFileError(folder / "config.json", f"it describes no shipped network ({error})") from error
    return load_weights(model, folder)

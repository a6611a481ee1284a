"""timm's models: built without download, saved and loaded in timm's own folder format."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.durable import write_json
from limbeck.core.errors import DamagedFileError, IncompatibleError, RecipeError, UnknownNameError, UsageError
from limbeck.core.method import DataInfo
from limbeck.models.files import read_config, read_weights, write_weights
from limbeck.models.normalisation import normalisation_of
from limbeck.models.seeding import seeded

# Where timm would fetch weights from: never taken from a recipe or a stored configuration.
_ORIGINS = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict")
_FORGOTTEN = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset")


def build_timm(name: str, arguments: dict[str, Any], data: DataInfo, key: str = "model") -> nn.Module:
    """A timm model; weights are downloaded only where `arguments` say `pretrained: true`.

    Classes, channels and, for models of one fixed size, the image size come from the data unless given.

    Raises:
        UnknownNameError: timm has no such model.
        RecipeError: an argument that the model does not take.
        IncompatibleError: the model cannot be built for the data's image size.
    """
    import timm

    if not timm.is_model(name):
        raise UnknownNameError("timm model", name, timm.list_models())
    _refuse_origins(arguments, key)
    pretrained = bool(arguments.get("pretrained", False))
    given = {name: value for name, value in arguments.items() if name != "pretrained"}
    try:
        model = _create(name, pretrained, {**_defaults(name, data), **given})
    except TypeError as error:
        raise RecipeError(f"{key}.arguments", str(error), f"see the arguments of timm's {name}") from error
    except (AssertionError, ValueError) as error:
        raise IncompatibleError(f"timm's {name} cannot be built: {error}", "set data.image_size or img_size") from error
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"no weights for timm's {name}: {error}", "check the network, or leave out pretrained"
        ) from error
    if not pretrained:
        _forget_pretraining(model, list(data.example["image"].shape[1:]))
    return model


def save_timm(model: nn.Module, folder: Path) -> None:
    """Writes the folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    Raises:
        IncompatibleError: the model was changed after timm built it, so that its configuration cannot rebuild it.
    """
    config = timm_config(model)
    _check_rebuilds(model, config)
    write_weights(model, folder)
    write_json(folder / "config.json", config)


def load_timm(folder: Path) -> nn.Module:
    """Loads a folder in timm's format from its safetensors alone.

    Raises:
        DamagedFileError: the configuration or the weights are not what timm writes.
        IncompatibleError: the weights do not fit the configuration.
    """
    config = read_config(folder)
    try:
        model = _rebuild(config)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, UsageError) as error:
        raise DamagedFileError(folder / "config.json", f"it describes no timm model ({error})") from error
    try:
        model.load_state_dict(read_weights(folder))
    except RuntimeError as error:
        raise IncompatibleError(f"the weights in {folder} are not those of its config.json", str(error)) from error
    return model


def timm_config(model: nn.Module) -> dict[str, Any]:
    """The `config.json` that describes a timm model: architecture, arguments, and how images are prepared."""
    known: Any = model
    settings = {
        name: value for name, value in known.pretrained_cfg.items() if name not in _FORGOTTEN and value is not None
    }
    architecture = settings.pop("architecture")
    arguments = dict(getattr(model, "_model_args", {}))
    arguments.pop("num_classes", None)  # the head may have been reset since
    arguments.setdefault("in_chans", _input_channels(model, settings))
    settings["input_size"] = [arguments["in_chans"], *_side(arguments, settings)]
    settings["num_classes"] = known.num_classes
    normalisation = normalisation_of(model)
    if normalisation is not None:
        settings["mean"], settings["std"] = normalisation
    config = {
        "architecture": architecture,
        "num_classes": known.num_classes,
        "num_features": known.num_features,
        "model_args": arguments,
        "pretrained_cfg": settings,
    }
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise IncompatibleError(
            f"timm's {architecture} was built with arguments that JSON cannot hold: {error}"
        ) from error


def _defaults(name: str, data: DataInfo) -> dict[str, Any]:
    import timm

    if "image" not in data.example:
        raise IncompatibleError(f"'timm:{name}' takes images, and the data hold {', '.join(data.example)}")
    channels, *size = data.example["image"].shape[1:]
    defaults: dict[str, Any] = {"in_chans": channels, "num_classes": data.classes}
    settings = timm.get_pretrained_cfg(name)
    if settings is not None and settings.fixed_input_size and tuple(settings.input_size[1:]) != tuple(size):
        defaults["img_size"] = tuple(size)
    return defaults


def _forget_pretraining(model: Any, size: list[int]) -> None:
    """Fresh weights go with the data at hand, not with the images that the published weights were trained on."""
    for name in ("mean", "std", "test_input_size", "min_input_size", "crop_pct", "test_crop_pct"):
        model.pretrained_cfg.pop(name, None)
    model.pretrained_cfg |= {"input_size": size, "crop_pct": 1.0, "pool_size": None}


def _refuse_origins(arguments: dict[str, Any], key: str) -> None:
    for name in _ORIGINS:
        if name in arguments:
            raise RecipeError(f"{key}.arguments.{name}", "weights are not taken from here", "use a folder as the model")


def _rebuild(config: dict[str, Any]) -> nn.Module:
    import timm

    arguments = dict(config.get("model_args") or {})
    _refuse_origins(arguments, "model_args")
    arguments.pop("pretrained", None)
    if not timm.is_model(config["architecture"]):
        raise UnknownNameError("timm model", config["architecture"], timm.list_models())
    arguments["num_classes"] = config["num_classes"]
    with seeded(0):
        model: Any = _create(config["architecture"], False, arguments)
    described = {name: value for name, value in config["pretrained_cfg"].items() if name not in _FORGOTTEN}
    model.pretrained_cfg = {"architecture": config["architecture"], **described}
    return model


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    import timm

    model: Any = timm.create_model(name, pretrained=pretrained, **arguments)
    model._model_args = arguments  # as newer versions of timm note them too
    return model


def _check_rebuilds(model: nn.Module, config: dict[str, Any]) -> None:
    ours, again = model.state_dict(), _rebuild(config).state_dict()
    changed = [name for name in ours if name not in again or again[name].shape != ours[name].shape]
    changed += [name for name in again if name not in ours]
    if changed:
        raise IncompatibleError(
            f"timm's {config['architecture']} was changed after it was built ({changed[0]})",
            "save it as a model of your own: wrap it in an nn.Module",
        )


def _input_channels(model: nn.Module, settings: dict[str, Any]) -> int:
    """Channels of the images, read from the first convolution for models that did not note their arguments."""
    first = settings.get("first_conv")
    name = first[0] if isinstance(first, (tuple, list)) else first
    weight = getattr(model.get_submodule(name), "weight", None) if name else None
    return settings["input_size"][0] if weight is None else weight.shape[1]


def _side(arguments: dict[str, Any], settings: dict[str, Any]) -> list[int]:
    size = arguments.get("img_size") or settings["input_size"][1:]
    return [size, size] if isinstance(size, int) else list(size)

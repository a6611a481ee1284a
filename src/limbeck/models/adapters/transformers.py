"""transformers' models: from a local folder, or from the hub where its cache or the network has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from limbeck.core.durable import write_json
from limbeck.core.errors import DamagedFileError, IncompatibleError, RecipeError, UsageError, did_you_mean
from limbeck.core.method import DataInfo
from limbeck.models.adapters.text import (
    build_fresh,
    check_vocabulary,
    fresh_fields,
    note_tokenizer,
    save_tokenizer,
    text_class,
)
from limbeck.models.files import check_folder
from limbeck.models.normalisation import normalisation_of, set_normalisation

_OWN = ("pretrained", "architecture", "ignore_mismatched_sizes")


def build_transformers(name: str, arguments: dict[str, Any], data: DataInfo, key: str = "model") -> nn.Module:
    """A transformers model, with the stored weights where there are any and fresh ones otherwise.

    Arguments change the configuration, apart from three: `pretrained` (false takes the configuration alone),
    `architecture` (a class of transformers; the configuration's own if absent) and `ignore_mismatched_sizes` (true
    gives tensors of another shape, such as a new head, fresh weights). Models with fresh weights get classes, channels
    and image size, or vocabulary and positions, from the data. For text the class follows the task, whatever the
    configuration names. Code from the hub is never run.

    Raises:
        UsageError: neither a folder nor a model that the hub gives.
        RecipeError: an argument that the configuration does not know.
        IncompatibleError: stored weights for another number of classes.
    """
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local:
        check_folder(folder)
    origin = str(folder) if local else name
    stored = any(folder.glob("*.safetensors")) if local else True
    pretrained = arguments.get("pretrained", stored)
    if pretrained and not stored:
        raise RecipeError(f"{key}.arguments.pretrained", f"there are no safetensors in '{name}'")
    config = _read_config(origin)
    _configure(config, arguments, data, bool(pretrained), key)
    if not pretrained:
        config._name_or_path = ""  # fresh weights do not go with the image processor in that folder
        return build_fresh(config, arguments.get("architecture"), data, key)
    model_class = class_of(config, arguments.get("architecture"), data, key)
    loose = bool(arguments.get("ignore_mismatched_sizes", False))
    model, _ = _load(model_class, origin, config=config, ignore_mismatched_sizes=loose)
    return model


def save_transformers(model: nn.Module, folder: Path) -> None:
    """Writes the folder that `from_pretrained` loads, with the tokenizer or image processor where one is known."""
    saved: Any = model
    with _quiet():
        saved.save_pretrained(folder)
    save_tokenizer(model, folder)
    normalisation = normalisation_of(model)
    if normalisation is not None:
        write_json(folder / "preprocessor_config.json", _processor(saved.config, *normalisation))


def load_transformers(folder: Path) -> nn.Module:
    """Loads a folder in transformers' format from its safetensors alone, in float32.

    Raises:
        DamagedFileError: the configuration or the weights are not what transformers writes.
        IncompatibleError: tensors are missing, left over, or of another shape.
    """
    config = _read_config(str(folder))
    model_class = _named_class((config.architectures or [""])[0])
    if model_class is None:
        raise UsageError(f"{folder / 'config.json'} names no class of transformers", "set its 'architectures'")
    model, report = _load(model_class, str(folder), config=config)
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise IncompatibleError(f"the weights in {folder} are not those of its config.json: {wrong[0]}")
    normalisation = normalisation_of(model)
    if normalisation is not None:
        set_normalisation(model, *normalisation)  # so that it outlives the folder
    note_tokenizer(model, folder)
    return model


def load_as(origin: str, name: str) -> nn.Module:
    """Loads a folder or hub model as a class of transformers, an automatic one or a model's own.

    Raises:
        UsageError: no such class, folder or hub model.
    """
    import transformers

    automatic = getattr(transformers, name, None) if name.startswith("AutoModelFor") else None
    model_class = automatic or _named_class(name)
    if model_class is None:
        raise UsageError(f"transformers has no model class '{name}'")
    if Path(origin).is_dir():
        check_folder(Path(origin))
    model, _ = _load(model_class, origin, config=_read_config(origin))
    return model


def _read_config(origin: str) -> Any:
    from transformers import AutoConfig

    import limbeck.models.adapters.converted  # noqa: F401  # registers its model type

    try:
        return AutoConfig.from_pretrained(origin, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"'{origin}' is no folder or hub model that transformers can read: {reason}",
            "give a folder with config.json; code that comes with a model is never run",
        ) from error


def _load(model_class: Any, origin: str, **options: Any) -> Any:
    try:
        with _quiet():
            return model_class.from_pretrained(
                origin, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
    except SafetensorError as error:
        raise DamagedFileError(origin, str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise IncompatibleError(
            f"the weights of '{origin}' cannot be loaded: {reason}",
            "a new head for other classes needs ignore_mismatched_sizes: true",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars of a library's own between those of the run."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _configure(config: Any, arguments: dict[str, Any], data: DataInfo, pretrained: bool, key: str) -> None:
    given = {name: value for name, value in arguments.items() if name not in _OWN}
    for name in given:
        if name != "num_labels" and not hasattr(config, name):
            hint = did_you_mean(name, sorted(config.to_dict()))
            raise RecipeError(
                f"{key}.arguments.{name}", f"not in the model's configuration ({config.model_type})", hint
            )
    if pretrained and "num_labels" not in given and data.classes not in (0, config.num_labels):
        raise IncompatibleError(
            f"the model has {config.num_labels} classes and the data {data.classes}",
            f"for a new head set arguments num_labels: {data.classes} and ignore_mismatched_sizes: true",
        )
    if pretrained and data.text is not None:
        check_vocabulary(config, data.text, key)
    if not pretrained:
        given = {**{name: value for name, value in fresh_fields(data).items() if hasattr(config, name)}, **given}
    for name, value in given.items():
        setattr(config, name, value)


def class_of(config: Any, architecture: Any, data: DataInfo, key: str) -> Any:
    """The model class: the one that is named, else the task's for text, else the configuration's own.

    Raises:
        RecipeError: transformers has no such class.
    """
    import transformers

    if data.text is not None and architecture is None:
        return text_class(data)
    name = architecture or (config.architectures or [None])[0]
    if name is None:
        return transformers.AutoModelForImageClassification
    model_class = _named_class(name)
    if model_class is None:
        raise RecipeError(f"{key}.arguments.architecture", f"transformers has no model class '{name}'")
    return model_class


def _named_class(name: str) -> Any:
    """A model class of transformers by name; None for anything else that may be called so."""
    import transformers

    from limbeck.models.adapters.converted import ConvertedForCausalLM

    if name == ConvertedForCausalLM.__name__:
        return ConvertedForCausalLM
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def _processor(config: Any, mean: list[float], std: list[float]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_resize": False,
    }
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        settings |= {"do_resize": True, "size": {"height": size, "width": size}}
    return settings

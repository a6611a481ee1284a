"""From a recipe's description of a model to the model."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.errors import RecipeError, UnknownNameError
from limbeck.core.method import DataInfo
from limbeck.core.specs import ModelSpec
from limbeck.models.names import DENOISERS, check_model, parse_model_name
from limbeck.models.normalisation import Normalisation, normalisation_of, set_normalisation
from limbeck.models.saved import ecosystem, load_model
from limbeck.models.seeding import seeded
from limbeck.models.shipped import build_shipped


def build_model(
    spec: ModelSpec,
    data: DataInfo,
    seed: int,
    *,
    stages: Mapping[str, nn.Module] | None = None,
    normalisation: Normalisation | None = None,
    key: str = "model",
) -> nn.Module:
    """Builds the model that a recipe names, on the CPU.

    Fresh weights are a function of `spec.seed`, or else of `seed`; the process's random streams are left alone.

    Args:
        spec: the model; see `ModelSpec.name` for the forms of its name.
        data: what the model is for: gives channels, image size and classes where the arguments leave them open.
        seed: seed of fresh weights.
        stages: results of earlier stages by name; a model taken from here is a copy, and trainable.
        normalisation: per-channel (mean, deviation) of the data's images, noted on a model that knows of none.
        key: dotted path of the spec in its recipe, for messages.

    Raises:
        UnknownNameError, MissingExtraError: no such model, or its package is not installed.
        RecipeError: a folder is missing, or an argument is wrong.
        IncompatibleError: the model does not go with the data.
        DamagedFileError: a stored model cannot be read.
    """
    check_model(spec, key)
    model = _base(spec, data, seed, stages or {}, key)
    if normalisation is not None and normalisation_of(model) is None:
        set_normalisation(model, *normalisation)
    if spec.adapter is None:
        return model
    from limbeck.models.adapters.peft import add_adapter

    own_seed = seed if spec.seed is None else spec.seed
    return add_adapter(model, spec.adapter, own_seed, origin=_origin(spec, model), key=key)


def student_folder(folder: Path) -> Path:
    """Where a run folder keeps its student: `student` within it; the folder itself if that is an exported model."""
    student = folder / "student"
    return student if student.is_dir() else folder


def _base(spec: ModelSpec, data: DataInfo, seed: int, stages: Mapping[str, nn.Module], key: str) -> nn.Module:
    """The model without the spec's adapter."""
    kind, value = parse_model_name(spec.name)
    if kind == "stage":
        return _of_stage(value, stages)
    if kind in ("run", "folder"):
        _refuse_arguments(spec, key)
        return load_model(student_folder(Path(value).expanduser()))
    with seeded(seed if spec.seed is None else spec.seed, "model"):
        return _build(kind, value, dict(spec.arguments), data, key)


def _origin(spec: ModelSpec, model: nn.Module) -> str | None:
    """The folder or hub id that holds this very model; None where it is nowhere but in memory."""
    kind, value = parse_model_name(spec.name)
    if kind in ("run", "folder"):
        return str(student_folder(Path(value).expanduser()).resolve())
    stored = getattr(getattr(model, "config", None), "_name_or_path", "")
    if kind == "diffusers" and not spec.arguments:
        stored = value
    elif kind != "hf" or spec.arguments or not stored:
        return None
    folder = Path(value).expanduser()
    return str(folder.resolve()) if folder.is_dir() else value


def _build(kind: str, value: str, arguments: dict[str, Any], data: DataInfo, key: str) -> nn.Module:
    if kind == "timm":
        from limbeck.models.adapters.timm import build_timm

        return build_timm(value, arguments, data, key)
    if kind == "hf":
        from limbeck.models.adapters.transformers import build_transformers

        return build_transformers(value, arguments, data, key)
    if kind == "diffusers":
        from limbeck.models.adapters.diffusers import load_diffusers

        return load_diffusers(value, arguments, data.classes, key)
    if kind == "config" and value in DENOISERS:
        from limbeck.models.adapters.diffusers import build_diffusers

        return build_diffusers(value, arguments, data, key)
    if kind == "config":
        from limbeck.models.adapters.text import build_from_type

        return build_from_type(value, arguments, data, key)
    return build_shipped(value, arguments, data, key)


def _of_stage(name: str, stages: Mapping[str, nn.Module]) -> nn.Module:
    if name not in stages:
        raise UnknownNameError("stage", name, stages)
    copied = copy.deepcopy(stages[name])
    # Of a model with an adapter the adapter alone is trained, as it was in the stage.
    return copied if ecosystem(copied) == "peft" else copied.requires_grad_(True)


def _refuse_arguments(spec: ModelSpec, key: str) -> None:
    if spec.arguments:
        raise RecipeError(
            f"{key}.arguments", "a stored model takes no arguments", "its shape is fixed by its config.json"
        )

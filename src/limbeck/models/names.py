"""Which models can be named in a recipe, checked without importing torch."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from limbeck.core.errors import MissingExtraError, RecipeError, UnknownNameError
from limbeck.core.explain import explain
from limbeck.core.specs import ModelSpec
from limbeck.models.configs import SHIPPED

Kind = Literal["shipped", "timm", "hf", "diffusers", "config", "run", "stage", "served", "folder"]
FORMS = (
    "timm:NAME",
    "hf:FOLDER_OR_ID",
    "diffusers:FOLDER_OR_ID",
    "config:TYPE",
    "run:FOLDER",
    "stage:NAME",
    "served:URL",
)
DENOISERS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "SanaTransformer2DModel",
)
"""Networks of diffusers that `config:` names; those that `diffusion.ports` can call."""

_PACKAGES = {
    "timm": ("timm", "vision"),
    "hf": ("transformers", "language"),
    "diffusers": ("diffusers", "diffusion"),
    "config": ("transformers", "language"),
}


class ModelName(NamedTuple):
    """A model's name in its two parts: what kind it is, and the name, path or id within that kind."""

    kind: Kind
    value: str


def known_models() -> list[str]:
    """Names of the shipped networks."""
    return sorted(SHIPPED)


def parse_model_name(name: str) -> ModelName:
    """Takes a name apart.

    Raises:
        UnknownNameError: neither a shipped network, nor one of the forms, nor an existing folder.
    """
    if name in SHIPPED:
        return ModelName("shipped", name)
    prefix, colon, value = name.partition(":")
    if colon and value and prefix in ("timm", "hf", "diffusers", "config", "run", "stage", "served"):
        return ModelName(prefix, value)  # type: ignore[arg-type]  # checked in the line above
    if Path(name).expanduser().is_dir():
        return ModelName("folder", name)
    raise UnknownNameError("model", name, [*known_models(), *FORMS])


def check_model(spec: ModelSpec, key: str = "model") -> None:
    """Refuses what can be seen to be wrong without building the model: name, folder, package, arguments.

    Args:
        spec: the model.
        key: dotted path of the spec in its recipe, for messages.

    Raises:
        UnknownNameError, MissingExtraError: no such model, or its package is not installed.
        RecipeError: a folder is missing, or an argument of a shipped network is wrong.
    """
    kind, value = parse_model_name(spec.name)
    package = _PACKAGES["diffusers" if kind == "config" and value in DENOISERS else kind] if kind in _PACKAGES else None
    if package is not None and find_spec(package[0]) is None:
        raise MissingExtraError(*package, f"the model '{spec.name}'")
    if spec.adapter is not None and find_spec("peft") is None:
        raise MissingExtraError("peft", "language", f"the adapter of '{spec.name}'")
    if kind == "run" and not Path(value).expanduser().is_dir():
        raise RecipeError(f"{key}.name", f"there is no folder '{value}'", "give the folder of a finished run")
    # A hub id is NAME or OWNER/NAME; anything else can only be a path.
    is_path = value.startswith((".", "/", "~")) or value.count("/") > 1
    if kind in ("hf", "diffusers") and is_path and not Path(value).expanduser().is_dir():
        file = "config.json" if kind == "hf" else "model_index.json"
        raise RecipeError(f"{key}.name", f"there is no folder '{value}'", f"give a folder that holds {file}")
    if kind == "shipped":
        check_arguments(value, spec.arguments, key)
    if kind == "served":
        from limbeck.teachers.options import check_served

        check_served(spec, key)


def check_arguments(name: str, arguments: object, key: str = "model") -> None:
    """Checks the arguments of a shipped network.

    Raises:
        RecipeError: naming the first argument that is unknown, of the wrong type or out of range.
    """
    try:
        SHIPPED[name].model_validate(arguments)
    except ValidationError as error:
        raise explain(error, SHIPPED[name], f"{key}.arguments") from None

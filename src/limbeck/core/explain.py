"""Problems found by pydantic or by a JSON schema, as one clear line: dotted key, value, nearest valid choice."""

import typing
from collections.abc import Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from pydantic import BaseModel, ValidationError

from limbeck.core.errors import RecipeError, did_you_mean


def explain(error: ValidationError, model: type[BaseModel], key: str = "") -> RecipeError:
    """The first problem of a pydantic error.

    Args:
        error: what pydantic raised.
        model: the model that was validated; its fields are the valid keys.
        key: dotted path of the model in its recipe.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    location = first["loc"]
    path = ".".join(str(part) for part in (key, *location) if part != "")
    if first["type"] == "extra_forbidden":
        return RecipeError(path, "there is no such key", did_you_mean(str(location[-1]), _fields(model, location[:-1])))
    if first["type"] == "missing":
        return RecipeError(path, "this key is required", "add it")
    message, value = first["msg"].removeprefix("Value error, "), first.get("input")
    shown = "" if isinstance(value, dict | list | BaseModel) else f", not {value!r}"
    hint = ""
    if first["type"] == "literal_error" and isinstance(value, str):
        hint = did_you_mean(value, _choices(model, location))
    return RecipeError(path, f"{message[:1].lower()}{message[1:]}{shown}", hint or "correct the value")


def check_schema(value: Any, schema: dict[str, Any], key: str) -> None:
    """Checks plain data against a JSON schema.

    Raises:
        RecipeError: the problem that says most.
    """
    error = best_match(Draft202012Validator(schema).iter_errors(value))
    if error is None:
        return
    path = ".".join([key, *map(str, error.absolute_path)])
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        unknown = next(name for name in error.instance if name not in known)
        raise RecipeError(f"{path}.{unknown}", "there is no such option", did_you_mean(str(unknown), known))
    hint = "correct the value"
    if error.validator == "enum" and isinstance(error.instance, str):
        hint = did_you_mean(error.instance, map(str, error.validator_value))
    raise RecipeError(path, f"{error.message}", hint)


def _fields(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields of the model that lies at `location` within `model`."""
    inner: Any = model
    for part in location:
        if part in inner.model_fields:  # else a place in a list, or a name in a mapping of models
            inner = _inner_model(inner.model_fields[part].annotation)
    return sorted(inner.model_fields)


def _choices(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The values of the literal that lies at `location`."""
    inner: Any = model
    for part in location:
        if part in getattr(inner, "model_fields", ()):
            annotation = inner.model_fields[part].annotation
            inner = _inner_model(annotation) or annotation
    while typing.get_origin(inner) is list:
        (inner,) = typing.get_args(inner)
    return [str(choice) for choice in typing.get_args(inner)]


def _inner_model(annotation: Any) -> Any:
    """The pydantic model within an annotation such as `list[Model]` or `Model | None`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inner_model(argument) for argument in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)

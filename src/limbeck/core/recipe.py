"""Recipes: read, overridden and checked before anything heavy is imported or anything is written."""

import re
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from limbeck.core import catalogue
from limbeck.core.errors import RecipeError, UnknownNameError, did_you_mean
from limbeck.core.explain import explain
from limbeck.core.specs import Recipe, StageSpec

_LARGEST = 1 << 20
_MOST_VALUES = 100_000


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader (no object tags), which also refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key, times in Counter(map(str, keys)).items() if times > 1]
        if repeated:
            raise RecipeError(repeated[0], f"given twice (line {node.start_mark.line + 1})", "keep one of them")
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a string, since it wants 1.0e-3; people write learning rates the short way.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("limbeck") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by shipped name or file, with dotted overrides applied, fully checked.

    Args:
        name_or_path: a name of `shipped_recipes`, or the path of a YAML file.
        overrides: values by dotted path; a path starts with a recipe key (`seed`, `data.name`) or the name of a stage
            (`distil.options.temperature`).

    Raises:
        UnknownNameError: no such recipe.
        RecipeError: naming the key path, the value, and the nearest valid key.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        if path.suffix in {".yaml", ".yml"} or "/" in name_or_path:
            raise RecipeError("", f"there is no recipe file {name_or_path}", "check the path")
        raise UnknownNameError("recipe", name_or_path, shipped)
    tree = read_yaml(path)
    for key, value in (overrides or {}).items():
        _override(tree, key, value)
    return check_recipe(tree)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of plain data.

    Raises:
        RecipeError: not YAML, an object tag, a repeated key, not a mapping, or too large, by its aliases too.
    """
    if path.stat().st_size > _LARGEST:
        raise RecipeError("", f"{path} is larger than 1 MiB", "recipes are short texts; is this the right file?")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no such date, a huge number
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise RecipeError("", f"{path} is no plain YAML{line}: {problem}", "recipes hold plain data only") from error
    if not isinstance(tree, dict):
        raise RecipeError("", f"{path} holds no mapping", "a recipe has the keys seed, data and stages")
    _check_extent(tree, path)
    return tree


def _check_extent(tree: Any, path: Path) -> None:
    """Refuses a text of a few lines whose aliases stand for billions of values, and numbers beyond 64 bits."""
    left, seen = [tree], 0
    while left:
        value = left.pop()
        seen += 1
        if isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)
        if seen + len(left) > _MOST_VALUES or (isinstance(value, int) and abs(value) >= 1 << 63):
            raise RecipeError("", f"{path} holds too many values, or too large ones", "recipes are short texts")


def check_recipe(tree: Any) -> Recipe:
    """A recipe from plain data, checked against the schema, the catalogue of methods and the files that it names.

    Raises:
        RecipeError: naming the key path, the value, and the nearest valid key.
    """
    # Imported here: these modules stand above the kernel, and know which names there are without importing torch.
    from limbeck.data.names import check_data
    from limbeck.models.names import check_model

    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problem = explain(error, Recipe)
        raise RecipeError(_by_stage_name(problem.key, tree), problem.bare_message, problem.hint) from None
    check_data(recipe.data)
    _check_whitening(recipe)
    for stage in recipe.stages:
        _check_method(stage)
        _check_stage_data(stage, recipe)
        for part, models in {"student": [stage.student], "teacher": stage.teacher}.items():
            for model in models:
                check_model(model, f"{stage.name}.{part}")
    return recipe


def _check_method(stage: StageSpec) -> None:
    """The method exists, its options are right, and the stage gives it what its card says it needs."""
    if stage.method not in catalogue.read():
        hint = did_you_mean(stage.method, catalogue.read())
        raise RecipeError(f"{stage.name}.method", f"there is no method '{stage.method}'", hint)
    entry = catalogue.entry(stage.method)
    catalogue.check_options(stage.method, stage.options, f"{stage.name}.options")
    needs, name = entry["card"]["needs"], f"method '{stage.method}'"
    if "teacher" in needs and not stage.teacher:
        raise RecipeError(f"{stage.name}.teacher", f"{name} needs a teacher", "add the key teacher")
    if "teacher" not in needs and stage.teacher:
        raise RecipeError(f"{stage.name}.teacher", f"{name} uses no teacher", "remove the key")
    if "features" in needs and len(stage.teacher) > 1:
        raise RecipeError(f"{stage.name}.teacher", f"{name} reads features of one teacher", "give a single teacher")
    if entry["trains"] and stage.train is None:
        raise RecipeError(f"{stage.name}.train", f"{name} trains", "add the key, e.g. train: {steps: 1000}")
    if not entry["trains"] and stage.train is not None:
        raise RecipeError(f"{stage.name}.train", f"{name} does not train by gradient", "remove the key")


def _check_stage_data(stage: StageSpec, recipe: Recipe) -> None:
    """What a stage trains on, where an earlier one is to make it, is a synthetic set."""
    maker = next((other for other in recipe.stages if stage.data == f"stage:{other.name}"), None)
    if maker is not None and catalogue.entry(maker.method)["card"]["task"] != "dataset":
        reason = f"the method '{maker.method}' of stage '{maker.name}' makes no synthetic set"
        raise RecipeError(f"{stage.name}.data", reason, "name a stage that does, or remove the key")


def _check_whitening(recipe: Recipe) -> None:
    """Only data-set distillation is given whitened images: nothing else keeps how to whiten those it will see."""
    for stage in recipe.stages if recipe.data.whiten is not None else ():
        if catalogue.entry(stage.method)["card"]["family"] != "datasets":
            reason = f"whitened images are for data-set distillation, and '{stage.method}' is none"
            raise RecipeError("data.whiten", reason, "remove the key")


def _override(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets one dotted path in the plain data of a recipe."""
    first, *rest = key.split(".")
    stages = {stage.get("name"): stage for stage in tree.get("stages") or [] if isinstance(stage, dict)}
    known = [*Recipe.model_fields, *(str(name) for name in stages)]
    if first not in known:
        raise RecipeError(key, f"'{first}' is neither a key of the recipe nor a stage", did_you_mean(first, known))
    path = rest if first in stages else [first, *rest]
    place: Any = stages.get(first, tree)
    for part in path[:-1]:
        if isinstance(place.get(part), str):  # the shorthand for {name: ...} grows into its long form
            place[part] = {"name": place[part]}
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise RecipeError(key, f"'{part}' has no keys of its own", "set the whole value instead")
    if not path:
        raise RecipeError(key, "a stage as a whole cannot be set", f"set one of its keys, e.g. {key}.train.steps")
    place[path[-1]] = value


def _by_stage_name(key: str, tree: Any) -> str:
    """`stages.1.train.lr` as `distil.train.lr`, as overrides spell it."""
    first, *rest = key.split(".")
    if first != "stages" or not rest or not rest[0].isdigit():
        return key
    stage = tree["stages"][int(rest[0])]
    name = stage.get("name") if isinstance(stage, dict) else None
    return ".".join([name, *rest[1:]]) if isinstance(name, str) else key

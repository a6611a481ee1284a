"""Reference of recipes, shipped models and forms of data, from the pydantic models and tables that check them."""

import itertools
import re
from pathlib import Path

import limbeck
from limbeck.core.recipe import shipped_recipes
from limbeck.core.specs import Recipe
from limbeck.data.names import FORMS
from limbeck.models.configs import SHIPPED

from .markdown import NOTICE, table
from .schema import Schema, option_table

_INTRODUCTION = """# Recipe reference

Every key that a recipe may hold. Ranges are written as intervals: a square bracket includes the end, a round one does
not. Unknown keys, wrong types and values out of range are refused before anything is written. The options of each
method are on [its own page](../methods/index.md).

"""


_BUILDING_BLOCKS = {
    "objectives": """# Objectives

Pure functions of tensors, each formula once. Float32 (or better) inside, means over valid items only. Shapes stand in
the annotations; arguments and results say their units.
""",
    "diffusion": """# Diffusion

What diffusion methods are made of. One notation throughout: x_t = alpha x0 + sigma eps, with a time that grows towards
the noise; guidance scales count from 1, the conditional prediction alone.
""",
    "rendering": """# Scenes

Anything trainable that cameras can look at, and the cameras. World: z up, the front at +x.
""",
    "synthesis": """# Synthetic data

What the distillation of data sets is made of: trainable images and labels, how they are augmented, matched with real
ones and unrolled through training.
""",
    "mixers": """# Sequence mixers

Layers that let the tokens of a sequence see each other, behind one interface: all at once, one token at a time with a
state, and as the matrix that they multiply the values by.
""",
    "compression": """# Compression

Fewer bits, fewer weights, lower ranks: what conversion methods do to the weights of a network, as functions of tensors.
""",
}
"""Folders of pure building blocks, with the beginning of their pages."""


def recipe_page() -> str:
    """The page of all keys of a recipe: first its own, then those of every part, in the order of first mention."""
    schema = Recipe.model_json_schema()
    models = {"Recipe": schema} | {name: schema["$defs"][name] for name in _parts(schema, schema)}
    parts = [NOTICE, _INTRODUCTION]
    for name, model in models.items():
        parts.append(f"({name.lower()})=\n## {name}\n\n{_first_paragraph(model)}\n\n{option_table(model)}\n")
    return "".join(parts).rstrip() + "\n"


def models_page() -> str:
    """The page of the shipped recipes, the shipped networks and the forms of data."""
    parts = [NOTICE, "# Shipped recipes, networks and forms of data\n\n## Recipes\n\n"]
    recipes = [[f"`{name}`", _comment(path)] for name, path in shipped_recipes().items()]
    parts.append(table(["name", "what it does"], recipes) + "\n## Networks\n\n")
    parts.append("Small reference networks. Channels, classes and image size are read from the data if left out.\n\n")
    for name, config in SHIPPED.items():
        parts.append(f"### {name}\n\n{option_table(config.model_json_schema())}\n")
    parts.append("## Data\n\n" + table(["name in a recipe", "what it is"], [[f"`{k}`", v] for k, v in FORMS.items()]))
    return "".join(parts)


def building_block_pages() -> dict[str, str]:
    """A page for each folder of building blocks, whose text is read from their docstrings when the pages are built."""
    return {name: _modules_page(name, introduction) for name, introduction in _BUILDING_BLOCKS.items()}


def _modules_page(package: str, introduction: str) -> str:
    folder = Path(limbeck.__path__[0]) / package
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    sections = [f"## {name}\n\n```{{eval-rst}}\n.. automodule:: limbeck.{package}.{name}\n```\n" for name in names]
    return f"{NOTICE}{introduction}\n" + "\n".join(sections)


def _parts(schema: Schema, root: Schema) -> list[str]:
    """Names of the models that a schema mentions, and of those that these mention."""
    mentioned = re.findall(r"#/\$defs/(\w+)", str(schema.get("properties")))
    direct = [name for name in dict.fromkeys(mentioned) if "properties" in root["$defs"][name]]
    return list(dict.fromkeys([*direct, *(deep for name in direct for deep in _parts(root["$defs"][name], root))]))


def _comment(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines).split(". ")[0].rstrip(".") + "."


def _first_paragraph(model: Schema) -> str:
    return " ".join(model.get("description", "").split("\n\n")[0].split())

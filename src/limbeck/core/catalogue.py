"""The catalogue: cards and option schemas of all methods as one generated JSON file, so that recipes are checked and
methods listed without importing torch. `make docs` writes it; a test fails when it is stale."""

import inspect
import json
from functools import cache
from importlib import resources
from typing import Any

from limbeck.core.errors import UnknownNameError
from limbeck.core.explain import check_schema

Entry = dict[str, Any]


@cache
def read() -> dict[str, Entry]:
    """The shipped catalogue by slug; an entry has `card`, `options` (JSON schema), `description` and `trains`."""
    text = (resources.files("limbeck") / "methods" / "catalogue.json").read_text(encoding="utf-8")
    entries: dict[str, Entry] = json.loads(text)
    return entries


def entry(slug: str) -> Entry:
    """One method's entry.

    Raises:
        UnknownNameError: no method has this slug; the message offers the nearest.
    """
    if slug not in read():
        raise UnknownNameError("method", slug, read())
    return read()[slug]


def check_options(slug: str, options: Any, key: str) -> None:
    """Checks a method's options; `key` is their dotted path in the recipe.

    Raises:
        RecipeError: unknown option, wrong type, or out of range.
    """
    check_schema(options, entry(slug)["options"], key)


def build() -> dict[str, Entry]:
    """The catalogue as the registered methods have it now; imports them all."""
    from limbeck.core.method import Method
    from limbeck.core.registry import all_methods

    return {
        slug: {
            "card": method.card.as_dict(),
            "description": inspect.cleandoc(method.__doc__ or ""),
            "trains": issubclass(method, Method),
            "options": method.Options.model_json_schema(),
        }
        for slug, method in all_methods().items()
    }

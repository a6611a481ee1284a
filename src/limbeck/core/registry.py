"""The registry: methods found by scanning `limbeck.methods` or registered by decorator, named by slug."""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from limbeck.core.errors import UnknownNameError
from limbeck.core.method import Method, Procedure

MethodClass = type[Method] | type[Procedure]
Registered = TypeVar("Registered", bound=MethodClass)
_registered: dict[str, MethodClass] = {}


def register(method: Registered) -> Registered:
    """Class decorator that makes a method available by its card's slug.

    Raises:
        ValueError: another class has the slug already.
    """
    slug = method.card.slug
    other = _registered.get(slug)
    if other is not None and other.__qualname__ != method.__qualname__:
        raise ValueError(f"the slug '{slug}' belongs to {other.__qualname__}; choose another")
    _registered[slug] = method
    return method


def method_class(slug: str) -> MethodClass:
    """The class behind a slug; its own file alone is imported when the layout tells where it is."""
    if slug not in _registered:
        _import_file_of(slug)
    if slug not in _registered:
        raise UnknownNameError("method", slug, all_methods())
    return _registered[slug]


def all_methods() -> dict[str, MethodClass]:
    """Every method by slug, in alphabetical order; imports all of `limbeck.methods`."""
    _each_module(importlib.import_module)
    return dict(sorted(_registered.items()))


def _import_file_of(slug: str) -> None:
    wanted = slug.replace("-", "_")
    _each_module(lambda name: importlib.import_module(name) if name.rpartition(".")[2] == wanted else None)


def _each_module(visit: Callable[[str], ModuleType | None]) -> None:
    package = importlib.import_module("limbeck.methods")
    for module in pkgutil.walk_packages(package.__path__, "limbeck.methods."):
        if not module.ispkg:
            visit(module.name)

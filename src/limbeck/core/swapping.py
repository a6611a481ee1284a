"""Replacing modules of a model by others, and putting them back."""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from torch import nn

from limbeck.core.errors import IncompatibleError
from limbeck.core.taps import match_modules

Factory = Callable[[str, nn.Module], nn.Module]


class Swapped:
    """Modules that were replaced; as a context manager they are put back at its end.

    Attributes:
        originals: the modules that were there, by path.
        replacements: those that are there now, by path.
    """

    def __init__(self, model: nn.Module, originals: dict[str, nn.Module], replacements: dict[str, nn.Module]) -> None:
        self.model, self.originals, self.replacements = model, originals, replacements
        self._in_place = True

    def undo(self) -> None:
        """Puts the very same modules back, trained or not as they were; a second call does nothing.

        Raises:
            IncompatibleError: something else stands in their place by now, such as a later swap's modules.
        """
        if not self._in_place:
            return
        for path, replacement in self.replacements.items():
            if _at(self.model, path) is not replacement:
                raise IncompatibleError(f"'{path}' was replaced again since", "undo the later swap first")
        for path, original in self.originals.items():
            _put(self.model, path, original)
        self._in_place = False

    def __enter__(self) -> "Swapped":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def swap_modules(model: nn.Module, patterns: str | Sequence[str], factory: Factory) -> Swapped:
    """Replaces every module whose path matches, in place, under its own name.

    Of nested matches the outermost is replaced, as the others leave with it. A module that stands at several paths is
    replaced once, at all of them, also at those that match no pattern. Nothing is replaced if the factory fails. Device
    and precision are the factory's business; the training mode is taken over.

    Args:
        model: any module; not itself replaced.
        patterns: paths or globs (`layers.*.self_attn`), as in `model.named_modules()`.
        factory: makes the replacement of a module from its path and itself; it may return the module to leave it.

    Raises:
        IncompatibleError: a pattern matches nothing; the message offers the nearest path.
    """
    places = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    made: dict[int, nn.Module] = {}
    left: list[str] = []
    matched = set(match_modules(model, [patterns] if isinstance(patterns, str) else patterns, every_path=True))
    for path, module in places.items():
        if path not in matched:
            continue
        if id(module) not in made and not _lies_below(path, left):
            made[id(module)] = factory(path, module).train(module.training)
        if made.get(id(module), module) is not module:
            left.append(path)
    originals: dict[str, nn.Module] = {}
    for path, module in places.items():  # parents come before their children
        if made.get(id(module), module) is not module and not _lies_below(path, originals):
            originals[path] = module
    replacements = {path: made[id(module)] for path, module in originals.items()}
    for path, replacement in replacements.items():
        _put(model, path, replacement)
    return Swapped(model, originals, replacements)


def _lies_below(path: str, others: Iterable[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent)._modules.get(name)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module

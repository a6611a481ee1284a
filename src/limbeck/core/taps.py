"""Taps: inputs or outputs of named submodules, caught while a model runs and gone afterwards."""

import fnmatch
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call
from limbeck.core.errors import IncompatibleError, did_you_mean


class _LastTapReached(Exception):
    """Ends a forward pass whose remaining output nobody needs."""


class Taps:
    """Catches what chosen submodules receive or return, as a context manager.

    Within the context `taps[path]` is the value of the model's latest forward pass; on leaving it every hook is gone.

    Args:
        model: the model to listen to.
        paths: module paths or globs (`layers.*.mlp`), as in `model.named_modules()`.
        kind: "output" (default), "input" (the first one, by position or else by name), or "attention": the second of
            what an attention of transformers returns, its matrices in the eager implementation.
        stop: end the forward pass at the last tap; run the model through `taps.run` then.

    Raises:
        IncompatibleError: a path matches no submodule.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        kind: Literal["output", "input", "attention"] = "output",
        stop: bool = False,
    ) -> None:
        self.model, self.kind, self.stop = model, kind, stop
        self.paths = match_modules(model, paths)
        self._values: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Taps":
        for path in self.paths:
            module = self.model.get_submodule(path)
            if self.kind == "input":
                self._handles.append(module.register_forward_pre_hook(self._catch_input(path), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._catch_output(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._values:
            raise KeyError(f"'{path}' was not reached; taps caught {list(self._values)}")
        return self._values[path]

    def values(self) -> list[Tensor]:
        """The caught tensors in the order of `paths`."""
        return [self[path] for path in self.paths]

    def run(self, batch: Batch) -> Any:
        """Calls the model on a batch; returns None when the pass was ended at the last tap."""
        return self.during(lambda: call(self.model, batch))

    def during(self, forward: Callable[[], Any]) -> Any:
        """What `forward`, which calls the model in its own way, returns; None when it was ended at the last tap."""
        self._values.clear()
        try:
            return forward()
        except _LastTapReached:
            return None

    def _catch_output(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.kind == "attention":
                self._keep(path, _matrices(path, output))
            else:
                self._keep(path, output[0] if isinstance(output, tuple) else output)

        return hook

    def _catch_input(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, options: Any) -> None:
            self._keep(path, args[0] if args else next(iter(options.values())))

        return hook

    def _keep(self, path: str, value: Tensor) -> None:
        self._values[path] = value
        if self.stop and len(self._values) == len(self.paths):
            raise _LastTapReached


def _matrices(path: str, output: Any) -> Tensor:
    matrices = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(matrices, Tensor):
        raise IncompatibleError(f"'{path}' returns no attention matrices", "they exist in eager attention alone")
    return matrices


def match_modules(model: nn.Module, patterns: Sequence[str], every_path: bool = False) -> list[str]:
    """Module paths that match any of the patterns, each pattern's matches in the model's own order.

    A module that stands at several paths is known by its first alone, unless `every_path` is asked for.

    Raises:
        IncompatibleError: a pattern matches nothing; the message offers the nearest path.
    """
    if all(_is_path(model, pattern) for pattern in patterns):
        return list(patterns)  # already resolved: no walk through the whole model
    names = [name for name, _ in model.named_modules(remove_duplicate=not every_path) if name]
    found: list[str] = []
    for pattern in patterns:
        matches = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not matches:
            raise IncompatibleError(f"no layer '{pattern}' in {type(model).__name__}", did_you_mean(pattern, names))
        found += [name for name in matches if name not in found]
    return found


def _is_path(model: nn.Module, pattern: str) -> bool:
    try:
        model.get_submodule(pattern)
    except AttributeError:
        return False
    return bool(pattern)

"""Trackers: the rows of metrics also go to TensorBoard and its like, through accelerate's classes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import MissingExtraError

if TYPE_CHECKING:
    from limbeck.core.specs import Recipe

Watch = Callable[[str, int, dict[str, Any]], None]
"""Receives (stage, steps in all, row) for each row of metrics."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose package is not installed; imports none of them.

    Raises:
        MissingExtraError: naming the package.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, "track", f"track: {name}")


@contextmanager
def tracking(recipe: "Recipe", folder: Path) -> Iterator[Watch]:
    """Within this context the yielded function passes rows on to the recipe's trackers.

    TensorBoard writes to `tracking/` in the run's folder; the others where their own settings say. They are started
    at the first row, which comes in the main process alone.
    """
    trackers: list[Any] = []

    def watch(stage: str, steps: int, row: dict[str, Any]) -> None:
        if not trackers:
            trackers.extend(_start(name, recipe, folder) for name in recipe.track)
        for tracker in trackers:
            tracker.log(numbers(stage, row), step=row["step"])

    try:
        yield watch
    finally:
        for tracker in trackers:
            tracker.finish()


def numbers(stage: str, row: dict[str, Any]) -> dict[str, float]:
    """The figures of a row by path, such as `distil/student/loss`; nested ones are spelt out."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= numbers(f"{stage}/{name}", value)
        elif name != "step" and isinstance(value, int | float):
            flat[f"{stage}/{name}"] = float(value)
    return flat


def _start(name: str, recipe: "Recipe", folder: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    run_name = folder.resolve().name
    tracker = kind(run_name, folder / "tracking") if kind.requires_logging_directory else kind(run_name)
    tracker.start()
    if name != "tensorboard":  # which takes flat values only, and repeats them in a file of its own
        tracker.store_init_configuration(recipe.model_dump(mode="json"))
    return tracker

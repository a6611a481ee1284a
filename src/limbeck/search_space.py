"""What a sweep searches: ranges and choices of dotted paths of a recipe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.core.errors import UsageError
from limbeck.scalars import parse_scalar

if TYPE_CHECKING:
    import optuna

_FORMS = "write PATH=LOW:HIGH, PATH=LOW:HIGH:log, or PATH=A,B,C"


@dataclass(frozen=True, slots=True)
class Axis:
    """One path and what it may be: one of `choices`, or from `low` to `high` (whole numbers if both are)."""

    path: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    def suggest(self, trial: "optuna.Trial") -> Any:
        """The value that a trial takes."""
        if self.choices:
            return trial.suggest_categorical(self.path, self.choices)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.path, self.low, self.high, log=self.log)
        return trial.suggest_float(self.path, self.low, self.high, log=self.log)

    def corners(self) -> tuple[Any, ...]:
        """The values between which all others lie."""
        return self.choices or (self.low, self.high)


def parse_search(search: Sequence[str] | Mapping[str, str]) -> list[Axis]:
    """The axes of a search.

    Args:
        search: `PATH=LOW:HIGH`, `PATH=LOW:HIGH:log` or `PATH=A,B,C`; or a mapping of path to what follows the sign.

    Raises:
        UsageError: none of these forms, an empty range, a path that is given twice, or nothing to search.
    """
    if isinstance(search, Mapping):
        pairs = list(search.items())
    else:
        pairs = [(path, text) for path, _, text in (word.partition("=") for word in search)]
    axes = [_parse_axis(path, str(text)) for path, text in pairs]
    paths = [axis.path for axis in axes]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise UsageError(f"{twice[0]}: searched twice", "keep one of them")
    if not axes:
        raise UsageError("there is nothing to search", _FORMS)
    return axes


def corners(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Overrides that try every end of every range and every choice once."""
    for axis in axes:
        for value in axis.corners():
            yield {axis.path: value}


def _parse_axis(path: str, text: str) -> Axis:
    if not path or not text:
        raise UsageError(f"search: '{path}={text}' has no {'values' if path else 'path'}", _FORMS)
    if ":" not in text:
        values = tuple(parse_scalar(path, part) for part in text.split(","))
        if len(values) < 2 or not all(isinstance(value, str | int | float | None) for value in values):
            raise UsageError(f"{path}: '{text}' is no range and no list of two or more plain values", _FORMS)
        return Axis(path, choices=values)
    low, high, *scale = (parse_scalar(path, part) for part in text.split(":"))
    numbers = [value for value in (low, high) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != 2 or scale not in ([], ["log"]):
        raise UsageError(f"{path}: '{text}' is no range", _FORMS)
    if not low < high or (scale and low <= 0):
        raise UsageError(f"{path}: the range {text} is empty, or reaches 0 on a logarithmic scale", _FORMS)
    return Axis(path, low=low, high=high, log=bool(scale))

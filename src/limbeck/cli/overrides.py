"""Dotted overrides on the command line: `--distil.train.lr 1e-3`, `--data.augment [flip,crop]`, `--seed=3`."""

from collections.abc import Iterable, Sequence
from typing import Any

from limbeck.core.errors import UsageError, nearest
from limbeck.scalars import parse_scalar


def parse_overrides(words: Sequence[str], options: Iterable[str] = ()) -> dict[str, Any]:
    """The values by dotted path; a value is read as YAML, so that numbers, booleans, null and lists come out as such.

    Args:
        words: what the command line holds beyond the command's own options.
        options: the command's own options, to be offered for a misspelt one.

    Raises:
        UsageError: a word that belongs to no option, an option without value, or a value that is no YAML.
    """
    found: dict[str, Any] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UsageError(f"unexpected argument '{word}'", "overrides are written --stage.key value")
        key, equals, value = word[2:].partition("=")
        _check_option(key, options)
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise UsageError(f"{key}: a value is missing", f"write --{key} VALUE")
            value = remaining.pop(0)
        if key in found:
            raise UsageError(f"{key}: given twice", "keep one of them")
        found[key] = parse_scalar(key, value)
    return found


def _check_option(key: str, options: Iterable[str]) -> None:
    """A word without a dot that looks like one of the command's own options is a misspelt one."""
    meant = nearest(key, options)
    if "." not in key and key not in ("seed", "data", "track") and meant:
        raise UsageError(f"there is no option '--{key}'", f"did you mean '--{meant}'?")

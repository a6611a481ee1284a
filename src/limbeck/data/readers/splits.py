"""Which files of a folder are for training and which are held out, told by their names."""

from collections.abc import Sequence
from pathlib import Path

from limbeck.core.errors import RecipeError

_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",), "train": ("train",)}


def split_files(path: str, patterns: Sequence[str]) -> tuple[list[Path], list[Path] | None]:
    """The training files, and the held-out ones where the names tell.

    In a folder a file's name says its split (`train`, `validation`, `valid`, `val`, `dev`, `test`); the validation
    files are held out, or else the test files. A single file has no split.

    Args:
        path: a file, or a folder that is searched with its subfolders.
        patterns: globs of file names, such as `*.parquet`.

    Raises:
        RecipeError: no such files in the folder.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root], None
    files = sorted({file for pattern in patterns for file in root.rglob(pattern) if file.is_file()})
    if not files:
        raise RecipeError("data.name", f"no {' or '.join(patterns)} files in '{path}'")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    held_out = by_split.get("validation") or by_split.get("test")
    if "train" not in by_split or held_out is None:
        return by_split.get("train", files), None
    return by_split["train"], held_out


def _split_of(file: Path) -> str:
    words = file.stem.lower().replace("_", "-").replace(".", "-").split("-")
    return next((split for split, names in _SPLITS.items() if any(name in words for name in names)), "other")

"""Readers of text: each gives the rows of a table, and those that are held out where the data bring a split."""

import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from limbeck.core.errors import DamagedFileError, RecipeError
from limbeck.core.specs import DataSpec
from limbeck.data.readers.splits import split_files

Rows = list[dict[str, Any]]


def read_rows(kind: str, path: str, spec: DataSpec) -> tuple[Rows, Rows | None]:
    """The rows of text data by their kind: `pydoc`, `text`, `jsonl`, `parquet` or `datasets`.

    Raises:
        RecipeError: no files, or a file that cannot be split.
        DamagedFileError: a file is not what its name says.
    """
    return _READERS[kind](path, spec)


def read_pydoc(path: str, spec: DataSpec) -> tuple[Rows, None]:
    """Python's own documentation of its language, 79 topics of 465,000 characters (Python 3.11, PSF licence)."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return [{"text": text} for _, text in sorted(topics.items())], None


def read_text(path: str, spec: DataSpec) -> tuple[Rows, Rows | None]:
    """Plain text in UTF-8: a file, or a folder of `.txt`, `.md` and `.rst` files whose names say their split.

    Where sequences are packed a file is one document, and of a file that stands alone the end is held out, cut at a
    line's end. Where they are not, each paragraph (up to an empty line) is a document.
    """
    training, held_out = split_files(path, ("*.txt", "*.md", "*.rst"))
    if not spec.text.packing:
        return _paragraphs(training), None if held_out is None else _paragraphs(held_out)
    if held_out is None and len(training) == 1:
        whole = _decode(training[0])
        cut = whole.rfind("\n", 0, round((1 - spec.validation) * len(whole))) + 1
        if not 0 < cut < len(whole):
            raise RecipeError("data.name", f"'{path}' cannot be split: it has a single line", "set text.packing: false")
        return [{"text": whole[:cut]}], [{"text": whole[cut:]}]
    rows = [{"text": _decode(file)} for file in training]
    return rows, None if held_out is None else [{"text": _decode(file)} for file in held_out]


def read_jsonl(path: str, spec: DataSpec) -> tuple[Rows, Rows | None]:
    """Files of one JSON object a line; in a folder their names say their split."""
    training, held_out = split_files(path, ("*.jsonl", "*.ndjson"))
    return _objects(training), None if held_out is None else _objects(held_out)


def read_parquet_rows(path: str, spec: DataSpec) -> tuple[Rows, Rows | None]:
    """Parquet files with columns of text."""
    from limbeck.data.readers.parquet import read_table

    training, held_out = split_files(path, ("*.parquet",))
    return read_table(training).to_pylist(), None if held_out is None else read_table(held_out).to_pylist()


def read_datasets_rows(path: str, spec: DataSpec) -> tuple[Rows, Rows | None]:
    """A data set with columns of text, saved with `save_to_disk`."""
    from limbeck.data.readers.saved_datasets import open_saved

    training, held_out = open_saved(path)
    return list(training), None if held_out is None else list(held_out)


def _paragraphs(files: Sequence[Path]) -> Rows:
    texts = [text.strip("\n") for file in files for text in re.split(r"\n\s*\n", _decode(file))]
    return [{"text": text} for text in texts if text.strip()]


def _objects(files: Sequence[Path]) -> Rows:
    rows: Rows = []
    for file in files:
        for number, line in enumerate(_decode(file).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DamagedFileError(file, f"line {number} is no JSON ({type(error).__name__})") from error
            if not isinstance(row, dict):
                raise DamagedFileError(file, f"line {number} is no JSON object")
            rows.append(row)
    return rows


def _decode(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(file, f"no UTF-8 at byte {error.start}") from error


_READERS: dict[str, Callable[[str, DataSpec], tuple[Rows, Rows | None]]] = {
    "pydoc": read_pydoc,
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet_rows,
    "datasets": read_datasets_rows,
}

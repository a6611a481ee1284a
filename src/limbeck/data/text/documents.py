"""Documents: what a row of any table says as text, and which documents are held out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from limbeck.core.errors import RecipeError, did_you_mean
from limbeck.core.randomness import generator
from limbeck.core.specs import DataSpec
from limbeck.data.readers.columns import as_labels

Row = Mapping[str, Any]

_USUAL = ("text", "completion", "response")


class Document(NamedTuple):
    """One text.

    Attributes:
        text: what is to be predicted: the whole text, or the completion of a prompt.
        prompt: what comes before it and is no target; None where there is none.
        label: number of its class, -100 where there is none.
    """

    text: str
    prompt: str | None = None
    label: int = -100

    @property
    def size(self) -> int:
        """Characters in all."""
        return len(self.text) + len(self.prompt or "")


class Corpus(NamedTuple):
    """Documents and the names of their classes, which are none where no label column was named."""

    documents: Sequence[Document]
    class_names: tuple[str, ...] = ()


def corpus_of(rows: Sequence[Row], spec: DataSpec, class_names: Sequence[str] | None = None) -> Corpus:
    """The documents in rows, from the columns that the spec names or from the only one that can serve.

    Args:
        rows: one mapping from column to value a document.
        spec: names the columns of prompt, completion and label.
        class_names: names of the classes where they are known, as from the training rows.

    Raises:
        RecipeError: a column is missing or holds no text, or no row has any text.
    """
    if not rows:
        raise RecipeError("data.name", "there are no rows")
    text, prompt, label = _text_column(rows[0], spec), spec.text.prompt_column, spec.label_column
    for column, key in ((text, "completion_column"), (prompt, "prompt_column")):
        _check(rows, column, f"data.text.{key}")
    if label is None:
        return Corpus([Document(row[text], None if prompt is None else row[prompt]) for row in rows])
    if label not in rows[0]:
        raise RecipeError("data.label_column", f"there is no column '{label}'", did_you_mean(label, rows[0]))
    numbers, names = as_labels([row[label] for row in rows], class_names)
    found = names or [str(number) for number in range(int(numbers.max()) + 1)]
    if int(numbers.max()) >= len(found):
        raise RecipeError("data.label_column", f"class {int(numbers.max())} is not among the {len(found)} in training")
    documents = [Document(row[text], None, int(number)) for row, number in zip(rows, numbers, strict=True)]
    return Corpus(documents, tuple(found))


def hold_out(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Documents to keep and documents to hold out, each in their order; whole documents, about `share` of the text.

    Args:
        documents: at least two.
        share: share of the characters to hold out, in (0, 1); exceeded only where every document is larger.
        seed: which documents are held out.

    Raises:
        RecipeError: a single document, which cannot be split.
    """
    if len(documents) < 2:
        raise RecipeError("data.name", "a single document cannot be split into training and validation data")
    room, held = share * sum(document.size for document in documents), set[int]()
    order = torch.randperm(len(documents), generator=generator(seed, "split")).tolist()
    for number in order:
        if documents[number].size <= room and len(held) < len(documents) - 1:
            held.add(number)
            room -= documents[number].size
    held = held or {min(order, key=lambda number: documents[number].size)}
    kept = [document for number, document in enumerate(documents) if number not in held]
    return kept, [document for number, document in enumerate(documents) if number in held]


def _text_column(row: Row, spec: DataSpec) -> str:
    named = spec.text.completion_column
    if named is not None:
        return named
    others = {spec.text.prompt_column, spec.label_column}
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in others]
    usual = [name for name in _USUAL if name in texts]
    if not usual and len(texts) != 1:
        raise RecipeError("data.text.completion_column", "name the column of the text", f"columns: {', '.join(row)}")
    return usual[0] if usual else texts[0]


def _check(rows: Sequence[Row], column: str | None, key: str) -> None:
    if column is None:
        return
    if column not in rows[0]:
        raise RecipeError(key, f"there is no column '{column}'", did_you_mean(column, rows[0]))
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            raise RecipeError(key, f"row {number} has no text in '{column}', but {row.get(column)!r:.40}")

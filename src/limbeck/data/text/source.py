"""The source of text: token sequences in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, TextInfo
from limbeck.data.source import Source, check_not_empty
from limbeck.data.text.masking import Masking
from limbeck.objectives.tokens import IGNORED_LABEL


class TextSource(Source):
    """Token sequences of one length, padded on the right.

    Batches hold `input_ids` and `attention_mask` (items, length) int64, `index` (items,), and either `labels`
    (items, length), which repeat `input_ids` where a token is a target and are -100 elsewhere (unshifted: the model's
    output at i - 1 predicts label i), or, for sequences with classes, `label` (items,). With `masking`, `labels` are
    the hidden tokens alone. Prompts are the tokens before the first target.

    Args:
        ids: (items, length) token ids, integers.
        lengths: (items,) tokens before the padding; all of them if absent.
        targets: (items, length) True where a token is to be predicted; every one before the padding if absent.
        vocab: number of token ids; the tokenizer's, or the highest id + 1, if absent.
        tokenizer: what made the tokens; saved with students.
        masking: hides tokens, anew for each seed; without a seed always the same ones.
        label: (items,) class of each sequence; then tokens are no targets.
        class_names: one name a class.

    Raises:
        IncompatibleError: shapes that do not fit, ids outside the vocabulary, or no items.
    """

    def __init__(
        self,
        ids: Any,
        lengths: Any = None,
        targets: Any = None,
        *,
        vocab: int | None = None,
        tokenizer: Any = None,
        masking: Masking | None = None,
        label: Any = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self._ids = torch.as_tensor(ids).to(torch.int32)
        self._places = torch.arange(self._ids.shape[-1])
        rows = torch.as_tensor(label if label is not None else [IGNORED_LABEL] * len(self._ids))
        self._lengths = torch.as_tensor([len(self._places)] * len(self._ids) if lengths is None else lengths)
        self._targets = None if targets is None else torch.as_tensor(targets).to(torch.bool)
        check_not_empty(self._ids)
        self._check_shapes(rows)
        self.labels, self.class_names = rows.to(torch.int64), tuple(class_names)
        self.classes = max(int(self.labels.max()) + 1, len(class_names)) if label is not None else 0
        self.tokenizer, self.masking = tokenizer, masking
        self.vocab = self._checked_vocab(vocab if vocab is not None or tokenizer is None else len(tokenizer))

    @property
    def length(self) -> int:
        """Tokens a sequence, padding included."""
        return len(self._places)

    @property
    def varied(self) -> bool:
        """Whether tokens are hidden, others with each seed."""
        return self.masking is not None

    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        """The sequences at `indices` as a batch; see `TextSource` for its fields.

        Args:
            indices: item numbers (items,), int64.
            seed: which tokens are hidden, where there is masking; a function of the seed and the item's number.
        """
        ids = self._ids.index_select(0, indices).long()
        present = self._places < self._lengths.index_select(0, indices).unsqueeze(1)
        targets = present if self._targets is None else present & self._targets.index_select(0, indices)
        fields = {"input_ids": ids, "attention_mask": present.long(), "index": indices}
        if self.classes:
            return Batch(fields | {"label": self.labels.index_select(0, indices)})
        if self.masking is not None:
            fields["input_ids"], targets = self.masking(ids, targets, seed or 0, indices)
        return Batch(fields | {"labels": torch.where(targets, ids, IGNORED_LABEL)})

    def select(self, rows: Tensor) -> "TextSource":
        """See `Source.select`; the tokens are copied."""
        return TextSource(
            self._ids[rows],
            self._lengths[rows],
            None if self._targets is None else self._targets[rows],
            vocab=self.vocab,
            tokenizer=self.tokenizer,
            masking=self.masking,
            label=self.labels[rows] if self.classes else None,
            class_names=self.class_names,
        )

    def info(self) -> DataInfo:
        """Number of items and classes, two items as an example, vocabulary and tokenizer."""
        text = TextInfo(self.vocab, self.tokenizer, self.masking is not None)
        return DataInfo(len(self), self.classes, self.fetch(torch.arange(2) % len(self)), text)

    def _check_shapes(self, labels: Tensor) -> None:
        if self._ids.ndim != 2 or self._lengths.shape != self._ids.shape[:1] or labels.shape != self._ids.shape[:1]:
            raise IncompatibleError(f"token ids must be (items, length), not {tuple(self._ids.shape)}")
        if self._targets is not None and self._targets.shape != self._ids.shape:
            raise IncompatibleError(f"targets {tuple(self._targets.shape)} for tokens {tuple(self._ids.shape)}")

    def _checked_vocab(self, vocab: int | None) -> int:
        lowest, highest = int(self._ids.min()), int(self._ids.max())
        if lowest < 0 or (vocab is not None and highest >= vocab):
            raise IncompatibleError(f"token ids from {lowest} to {highest} in a vocabulary of {vocab}")
        return highest + 1 if vocab is None else vocab

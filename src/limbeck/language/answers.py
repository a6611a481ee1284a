"""Predictions arranged by item, for losses that treat each answer as a whole, and texts in two tokenisations."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.language.predictions import kept_labels, kept_tokens
from limbeck.models.tokenizers import tokenizer_of
from limbeck.objectives.cross_tokenizer import Group, align_spans
from limbeck.objectives.tokens import IGNORED_LABEL


@dataclass(frozen=True, slots=True)
class Answers:
    """The tokens that count, item by item and from place 0 on.

    Attributes:
        logits: (items, longest, vocab), those that predict the token of the same place; 0 after an answer's end.
        labels: (items, longest) ids, -100 after an answer's end.
        ends: (items, longest) byte of the text at which each token ends; None where the batch does not say.
    """

    logits: Tensor
    labels: Tensor
    ends: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer (items,)."""
        return (self.labels != IGNORED_LABEL).sum(1)

    def item(self, number: int) -> tuple[Tensor, Tensor, list[int]]:
        """Logits (length, vocab), ids (length,) and ends of one answer."""
        length = int(self.lengths[number])
        ends = [] if self.ends is None else self.ends[number, :length].tolist()
        return self.logits[number, :length], self.labels[number, :length], ends


def answers(logits: Tensor, batch: Batch, shift: int = 1) -> Answers:
    """Arranges predictions (tokens, vocab) at `kept_tokens(batch, shift)` by item.

    Byte positions are the batch's `ends` (items, length), one a token.
    """
    kept = kept_tokens(batch, shift)
    counts = kept.sum(1)
    filled = torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(1)
    labels = torch.full(filled.shape, IGNORED_LABEL, device=logits.device)
    labels[filled] = kept_labels(batch, shift)
    # index_put and not an assignment, so that gradients flow back to the predictions.
    rows = logits.new_zeros(*filled.shape, logits.shape[-1]).index_put(filled.nonzero(as_tuple=True), logits)
    if "ends" not in batch:
        return Answers(rows, labels)
    ends = torch.zeros_like(labels)
    ends[filled] = batch["ends"][:, shift:][kept[:, : kept.shape[1] - shift]]
    return Answers(rows, labels, ends)


def has_second_text(batch: Batch, prefix: str) -> bool:
    """Whether a batch brings along another text in fields of this prefix."""
    return f"{prefix}input_ids" in batch


def second_text(batch: Batch, prefix: str) -> Batch:
    """The other text that a batch brings along in fields of this prefix, as `teacher_input_ids`, without the prefix.

    Raises:
        IncompatibleError: there is none.
    """
    fields = {name.removeprefix(prefix): batch[name] for name in batch if name.startswith(prefix)}
    if not has_second_text(batch, prefix):
        raise IncompatibleError(
            f"the data bring no second text: no '{prefix}input_ids' among {', '.join(batch)}",
            f"name its tensors {prefix}input_ids, {prefix}attention_mask and {prefix}labels",
        )
    return Batch({**fields, "index": batch["index"]} if "index" in batch else fields)


def aligned_groups(student_ends: list[int], teacher_ends: list[int]) -> tuple[list[range], list[range]]:
    """Groups of tokens of both sides that end at the same byte; see `align_spans`.

    Raises:
        IncompatibleError: the data do not say where tokens end.
    """
    if not (student_ends and teacher_ends):
        raise IncompatibleError(
            "the batches do not say where tokens end", "add the tensors ends and teacher_ends, or set variant: plain"
        )
    groups: list[Group] = align_spans(student_ends, teacher_ends)
    return [ours for ours, _ in groups], [theirs for _, theirs in groups]


def both_tokenizers(data: DataInfo, teacher: Teacher | None) -> tuple[Any, Any]:
    """The tokenizers of the data, which is the student's, and of the teacher, from the folder that it was loaded from.

    Raises:
        IncompatibleError: one of them is not known.
    """
    ours = getattr(data.text, "tokenizer", None)
    theirs = tokenizer_of(teacher.model) if isinstance(teacher, LiveTeacher) else None
    if ours is None or theirs is None:
        raise IncompatibleError(
            "which tokens two vocabularies share is told by their tokenizers, and not both are known",
            "load the teacher from a folder with its tokenizer, or set variant: aligned-bayesian, which needs none",
        )
    return ours, theirs


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Ids of the strings that both tokenizers know: those of the student, ascending, and the teacher's for the same."""
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    pairs = sorted((number, theirs[string]) for string, number in ours.items() if string in theirs)
    return torch.tensor([ours for ours, _ in pairs]).long(), torch.tensor([theirs for _, theirs in pairs]).long()

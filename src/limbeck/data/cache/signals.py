"""A teacher's signals as tensors to store: asked for one batch, and taken apart by kind."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.core.specs import CacheSpec
from limbeck.core.teacher import Ensemble, Teacher, logits_of_tokens
from limbeck.data.cache.codec import TopK, TopKCodec, top_k
from limbeck.data.cache.items import marks_of
from limbeck.data.source import Source
from limbeck.language.predictions import TokenSignal, kept_tokens
from limbeck.objectives.fused_head import HiddenTeacher, TopKTeacher, chunk_rows

RECORDS, LOGITS, HIDDEN, FEATURE = "records", "logits", "hidden", "feature."
"""Names of stored tensors; a feature's layer follows its prefix."""

CODEC = "codec"
"""Name of the shared tensor that is the header of top-k records."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is stored of one batch, on the CPU.

    Attributes:
        items: tensors with one row an item.
        tokens: tensors with one row a token that counts, item by item.
        counts: tokens an item (items,); None where `tokens` is empty.
        shared: what is the same for all items.
        given: precision of each tensor as the teacher gave it.
    """

    items: dict[str, Tensor]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)

    def first(self, count: int) -> "Content":
        """The content of the first `count` items."""
        items = {name: tensor[:count] for name, tensor in self.items.items()}
        if self.counts is None:
            return replace(self, items=items)
        counts = self.counts[:count]
        tokens = {name: tensor[: int(counts.sum())] for name, tensor in self.tokens.items()}
        return replace(self, items=items, tokens=tokens, counts=counts)


class Recorder:
    """Asks a teacher and keeps what a cache of some kind holds.

    Args:
        teacher: who is asked.
        spec: what to keep, and in which precision.
        source: the data.

    Raises:
        IncompatibleError: a kind that does not go with the data, or a teacher that draws at random.
    """

    def __init__(self, teacher: Teacher, spec: CacheSpec, source: Source) -> None:
        if isinstance(teacher, Ensemble) and teacher.reduce == "random":
            raise IncompatibleError("a teacher drawn anew for each batch cannot be cached", "use reduce: mean_prob")
        self.teacher, self.spec = teacher, spec
        self.shift = shift_of(source)
        self.vocab = getattr(source, "vocab", None)
        if self.shift is None and spec.kind == "hidden":
            raise IncompatibleError("hidden states are stored of text alone", "use cache.kind: dense or features")

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Content:
        """What is stored of a batch, which lies on the teacher's device.

        Raises:
            IncompatibleError: the teacher does not give what is to be stored.
        """
        marks = marks_of(batch, self.shift)
        if self.shift is None or self.spec.kind == "features":
            return self._of_items(batch, marks)
        signal = self.teacher.tokens(batch)
        counts = kept_tokens(batch, self.shift).sum(1)
        tokens, shared = self._of_tokens(signal)
        found = len(next(iter(tokens.values())))
        if found != int(counts.sum()):
            raise IncompatibleError(f"the teacher speaks of {found} tokens where {int(counts.sum())} count")
        return Content(
            _stored(marks), _stored(tokens, self._dtype()), counts.cpu(), _stored(shared), _precisions(tokens)
        )

    def _of_items(self, batch: Batch, marks: dict[str, Tensor]) -> Content:
        signal = self.teacher.signal(batch, self.spec.layers)
        given = {f"{FEATURE}{path}": value for path, value in signal.features.items()}
        wrong = [name for name, value in given.items() if value.shape[:1] != (batch.size,)]
        if wrong:
            raise IncompatibleError(f"layer '{wrong[0].removeprefix(FEATURE)}' does not return one row an item")
        if signal.logits is None and not given:
            raise IncompatibleError("the teacher gives no logits")
        shared = {}
        if signal.logits is not None and self.spec.kind == "top-k":
            found = top_k(signal.logits, self.spec.k)
            given[RECORDS], shared[CODEC] = _encoded(found, signal.logits.shape[-1])
        elif signal.logits is not None and signal.logits.ndim == 2:  # those of every token would be far too many
            given[LOGITS] = signal.logits
        items = _stored(marks) | _stored(given, self._dtype())
        return Content(items, shared=shared, given=_precisions(given))

    def _of_tokens(self, signal: TokenSignal) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors of the tokens, and tensors shared by all."""
        if self.spec.kind == "top-k":
            records, header = _encoded(*self._most_probable(signal))
            return {RECORDS: records}, {CODEC: header}
        if self.spec.kind == "dense":
            return {LOGITS: logits_of_tokens(signal)}, {}
        if not isinstance(signal, HiddenTeacher):
            raise IncompatibleError("this teacher's logits do not come from its hidden states alone", "use kind: dense")
        head = {"weight": signal.weight, "bias": signal.bias}
        return {HIDDEN: signal.hidden}, {name: value for name, value in head.items() if value is not None}

    def _most_probable(self, signal: TokenSignal) -> tuple[TopK, int]:
        if isinstance(signal, TopKTeacher):
            if signal.ids.shape[1] != self.spec.k or self.vocab is None:
                raise IncompatibleError(f"the teacher gives {signal.ids.shape[1]} tokens", "set cache.k to this")
            unknown = torch.full_like(signal.log_probs[:, 0], torch.nan)
            return TopK(signal.ids, signal.log_probs, unknown), self.vocab
        rows, vocab, logits_at = _by_rows(signal)
        # A few tokens at a time: the logits of a whole batch may be far larger than all that is kept of them.
        parts = [
            top_k(logits_at(chosen), self.spec.k) for chosen in rows.split(chunk_rows(len(rows), vocab, rows.device))
        ]
        return TopK(*(torch.cat(column) for column in zip(*parts, strict=True))), vocab

    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.dtype)


def shift_of(source: Source) -> int | None:
    """How far a target lies behind the token that predicts it: 1 for text, 0 for masked text; None without targets."""
    text = source.info().text
    if text is None or source.classes:
        return None
    return 0 if text.masked else 1


def _by_rows(signal: TokenSignal) -> tuple[Tensor, int, Callable[[Tensor], Tensor]]:
    """Row numbers of a signal, its vocabulary, and the logits at some of the rows."""
    if isinstance(signal, HiddenTeacher):
        hidden, weight, bias = signal.hidden, signal.weight, signal.bias
        rows = torch.arange(len(hidden), device=hidden.device)
        return rows, len(weight), lambda chosen: torch.nn.functional.linear(hidden[chosen], weight, bias)
    logits = logits_of_tokens(signal)
    return torch.arange(len(logits), device=logits.device), logits.shape[-1], lambda chosen: logits[chosen]


def _encoded(found: TopK, vocab: int) -> tuple[Tensor, Tensor]:
    """Records of the most probable tokens, and the header that goes with them."""
    codec = TopKCodec(found.ids.shape[1], vocab)
    return codec.encode(found), codec.header


def _precisions(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def _stored(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors as they are written: on the CPU, contiguous, numbers with a fraction in the precision asked for."""
    return {
        name: tensor.detach()
        .to("cpu", dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in tensors.items()
    }

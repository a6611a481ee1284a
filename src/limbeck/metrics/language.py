"""How well a language model predicts text, and how much it predicts like its teacher."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.language.predictions import Predictions, TokenReader, TokenSignal, kept_labels, kept_tokens
from limbeck.models.modes import device_of, evaluating
from limbeck.objectives.divergences import divergence, log_probabilities
from limbeck.objectives.fused_head import TopKTeacher, chunk_rows
from limbeck.objectives.speculative import acceptance
from limbeck.objectives.vocabulary import match_vocabulary

if TYPE_CHECKING:
    from limbeck.core.teacher import Teacher
    from limbeck.data.source import Source

_TOKENS = 1 << 13  # tokens at a time, where the caller does not say how many items


def evaluate_language(
    model: nn.Module,
    source: "Source",
    *,
    teacher: "Teacher | nn.Module | None" = None,
    batch_size: int | None = None,
    pause: Callable[[], Any] | None = None,
) -> dict[str, int | float]:
    """Measures a language model on text, in eval mode; the logits of a few tokens at a time are all that is held.

    Every target counts the same, whatever its sequence's length.

    Args:
        model: a causal or masked language model.
        source: text with `labels`; see `data.text.source.TextSource`.
        teacher: whom to compare with. One known by its most probable tokens gives `agreement` alone.
        batch_size: items at a time; as many as make about 8,000 tokens if absent.
        pause: called between batches; raises `Interrupted` when the run was asked to stop.

    Returns:
        `items`, `tokens` (targets), `cross_entropy` in nats a token, `perplexity` (its exponential) with a 95 %
        interval `perplexity_low` to `perplexity_high` over items, and `token_accuracy` (share of targets that are the
        most probable token). With a teacher: `agreement` (share of targets at which both have the same most probable
        token), `teacher_kl` (KL of teacher to model in nats a token) and `acceptance` (probability that the teacher
        accepts a token drafted by the model: 1 minus their total variation). Shares are in [0, 1].
    """
    device = device_of(model)
    if teacher is not None:
        teacher.to(device)
    reader, signal, totals = None, None, _Totals()
    watched = [model, *([teacher] if isinstance(teacher, nn.Module) else [])]
    with evaluating(*watched):
        for batch in _batches(source, batch_size):
            if pause is not None:
                pause()
            batch = batch.to(device)
            if reader is None:
                reader = TokenReader(model, batch.select(slice(0, 1)))
                signal = None if teacher is None else _signal_of(teacher, batch)
            rows = kept_tokens(batch, reader.shift).nonzero()[:, 0]
            predictions, labels = reader(batch), kept_labels(batch, reader.shift)
            totals.add(predictions, labels, rows, batch.size, None if signal is None else signal(batch))
    return totals.summary()


class _Totals:
    """Sums over tokens, kept on the device so that no batch waits for a number."""

    def __init__(self) -> None:
        self.items = self.tokens = self.compared = self.divergent = 0
        self.sums: dict[str, Tensor] = {}
        self.item_loss: list[Tensor] = []
        self.item_tokens: list[Tensor] = []
        self._forward_kl = divergence("forward-kl")

    def add(
        self, predictions: Predictions, labels: Tensor, rows: Tensor, items: int, teacher: TokenSignal | None
    ) -> None:
        """Adds a batch: predictions and labels (tokens,), the item of each token, and the teacher at the same ones."""
        self.items, self.tokens = self.items + items, self.tokens + len(labels)
        loss = torch.zeros(items, device=labels.device)
        for chosen, logits in _chunks(predictions, len(labels)):
            target = labels[chosen]
            losses = -log_probabilities(logits).gather(-1, target.unsqueeze(-1)).squeeze(-1)
            loss.index_add_(0, rows[chosen], losses)
            self._sum("correct", (logits.argmax(-1) == target).sum())
            if teacher is not None:
                self._compare(logits, teacher, chosen)
        self.item_loss.append(loss)
        self.item_tokens.append(torch.bincount(rows, minlength=items))

    def _compare(self, logits: Tensor, teacher: TokenSignal, chosen: Tensor) -> None:
        self.compared += len(chosen)
        if isinstance(teacher, TopKTeacher):
            best = teacher.ids[chosen].gather(-1, teacher.log_probs[chosen].argmax(-1, keepdim=True)).squeeze(-1)
            self._sum("agreeing", (logits.argmax(-1) == best).sum())
            return
        found: list[Tensor] = []

        def keep(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
            found.extend(match_vocabulary(ours, theirs))
            return self._forward_kl(ours, theirs)

        self._sum("divergence", teacher.compare(keep, logits, chosen, 1.0).sum())
        ours, theirs = found
        self.divergent += len(chosen)
        self._sum("agreeing", (ours.argmax(-1) == theirs.argmax(-1)).sum())
        self._sum("accepted", acceptance(ours.float().softmax(-1), theirs.float().softmax(-1)).sum())

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def summary(self) -> dict[str, int | float]:
        """The figures; see `evaluate_language`."""
        result: dict[str, int | float] = {"items": self.items, "tokens": self.tokens}
        if not self.tokens:
            return result
        loss, counts = torch.cat(self.item_loss).double().cpu(), torch.cat(self.item_tokens).double().cpu()
        mean = float(loss.sum()) / self.tokens
        error = _ratio_error(loss, counts)
        result["cross_entropy"] = mean
        result |= {
            "perplexity": _exp(mean),
            "perplexity_low": _exp(mean - error),
            "perplexity_high": _exp(mean + error),
        }
        result["token_accuracy"] = float(self.sums["correct"]) / self.tokens
        if self.compared:
            result["agreement"] = float(self.sums["agreeing"]) / self.compared
        if self.divergent:
            result["teacher_kl"] = max(0.0, float(self.sums["divergence"]) / self.divergent)  # rounding may leave -1e-9
            result["acceptance"] = min(1.0, float(self.sums["accepted"]) / self.divergent)
        return result


def _batches(source: "Source", batch_size: int | None) -> Iterator[Batch]:
    length = source.fetch(torch.zeros(1, dtype=torch.int64))["input_ids"].shape[1]
    size = batch_size or max(1, _TOKENS // length)
    return (source.fetch(rows) for rows in torch.arange(len(source)).split(size))


def _signal_of(teacher: "Teacher | nn.Module", batch: Batch) -> Callable[[Batch], TokenSignal]:
    if not isinstance(teacher, nn.Module):
        return teacher.tokens
    reader = TokenReader(teacher, batch.select(slice(0, 1)))
    return lambda one: reader(one).as_teacher()


def _chunks(predictions: Predictions, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of a few tokens, and their logits."""
    whole = predictions.dense if predictions.dense is not None else predictions.hidden
    assert whole is not None
    vocab = whole.shape[-1] if predictions.weight is None else len(predictions.weight)
    for chosen in torch.arange(tokens, device=whole.device).split(chunk_rows(max(tokens, 1), vocab, whole.device)):
        if not len(chosen):
            return
        if predictions.dense is not None:
            yield chosen, predictions.dense[chosen]
        else:
            yield chosen, Predictions(whole[chosen], predictions.weight, predictions.bias).logits()


def _ratio_error(loss: Tensor, counts: Tensor, quantile: float = 1.96) -> float:
    """Half-width of the interval of sum(loss) / sum(counts) over items that are drawn independently."""
    items = len(loss)
    if items < 2:
        return 0.0
    residuals = loss - loss.sum() / counts.sum() * counts
    variance = float(residuals.square().sum()) * items / (items - 1) / float(counts.sum()) ** 2
    return quantile * math.sqrt(variance)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # beyond it a float is infinite, which JSON does not know

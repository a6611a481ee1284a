"""Rollouts: texts with what was known of their tokens when they were written, to learn from more than once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import IncompatibleError
from limbeck.language.mixed import spoken_log_probs
from limbeck.language.predictions import Predictions, TokenReader, TokenSignal
from limbeck.models.modes import evaluating
from limbeck.objectives.fused_head import DenseTeacher, HiddenTeacher, chunk_rows
from limbeck.objectives.sequence import ppo_surrogate, token_log_probs
from limbeck.objectives.vocabulary import match_vocabulary

Known = HiddenTeacher | DenseTeacher
"""A teacher that is known by more than its most probable tokens."""


def settled(read: TokenReader, batch: Batch) -> Predictions:
    """A model's predictions without dropout and without a graph."""
    with evaluating(read.model):
        return read(batch)


@dataclass(frozen=True, slots=True)
class Spoken:
    """Log-probabilities (tokens,) of written tokens: by student, by teacher, and by what they were drawn from."""

    student: Tensor
    teacher: Tensor
    sampler: Tensor


@torch.no_grad()
def spoken_by(student: Predictions, teacher: Known, tokens: Tensor, share: float) -> Spoken:
    """What both models make of written tokens, a few rows of logits at a time.

    Args:
        student: its predictions at the tokens.
        teacher: its signal at the same tokens.
        tokens: (tokens,) ids.
        share: the teacher's share in the mixture that they were drawn from.
    """
    itself, parts = student.as_teacher(), []
    vocab = len(itself.weight) if isinstance(itself, HiddenTeacher) else itself.logits.shape[-1]
    for rows in torch.arange(len(tokens), device=tokens.device).split(chunk_rows(len(tokens), vocab, tokens.device)):
        ours, theirs = match_vocabulary(_logits(itself, rows), _logits(teacher, rows))
        mixed = spoken_log_probs(_logits(itself, rows), _logits(teacher, rows), share)
        drawn = mixed.gather(1, tokens[rows, None]).squeeze(1)
        parts.append((token_log_probs(ours, tokens[rows]), token_log_probs(theirs, tokens[rows]), drawn))
    return Spoken(*(torch.cat(values) for values in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class Rollout:
    """Written texts and what is known of each token of their responses.

    Attributes:
        text: as `generate` returns it.
        teacher: the teacher's signal at the tokens (tokens, …), in row-major order.
        log_probs: (tokens,) of the student that wrote them.
        advantages: (tokens,) how much better than usual what came of each token was.
        weights: (tokens,) importance weights of the sampler.
    """

    text: Batch
    teacher: Known
    log_probs: Tensor
    advantages: Tensor
    weights: Tensor

    def select(self, rows: Tensor) -> "Rollout":
        """The texts at `rows` (items,)."""
        filled = filled_places(self.text)
        numbers = torch.zeros_like(filled, dtype=torch.long)
        numbers[filled] = torch.arange(len(self.log_probs), device=filled.device)
        tokens = numbers[rows][filled[rows]]
        own = (values[tokens] for values in (self.log_probs, self.advantages, self.weights))
        return Rollout(self.text.select(rows), _at(self.teacher, tokens), *own)


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """What a rollout asks of its tokens' new predictions: stands where a teacher would in a fused head.

    Attributes:
        rollout: what is known of the tokens.
        tokens: (tokens,) ids.
        clip_range: how far the ratio of new to old probability may go.
        with_teacher: add the divergence between the predictions and the teacher's.
    """

    rollout: Rollout
    tokens: Tensor
    clip_range: float
    with_teacher: bool

    def compare(self, divergence: Callable[..., Tensor], logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
        """The clipped surrogate of the chosen tokens (chosen,), and the divergence; see `RowMeasure`."""
        known = self.rollout
        values = ppo_surrogate(
            token_log_probs(logits, self.tokens[rows]),
            known.log_probs[rows],
            known.advantages[rows],
            known.weights[rows],
            self.clip_range,
        )
        return values + known.teacher.compare(divergence, logits, rows, temperature) if self.with_teacher else values


def filled_places(text: Batch) -> Tensor:
    """True (items, longest response) where a response has a token."""
    lengths = text["response_length"]
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths.unsqueeze(1)


def by_item(values: Tensor, filled: Tensor) -> Tensor:
    """Values (tokens,) as (items, longest), 0 where `filled` is False."""
    return values.new_zeros(filled.shape).masked_scatter(filled, values)


def known_teacher(signal: TokenSignal) -> Known:
    """The signal of a teacher that is known by more than its most probable tokens.

    Raises:
        IncompatibleError: it is not.
    """
    if isinstance(signal, HiddenTeacher | DenseTeacher):
        return signal
    raise IncompatibleError("a teacher known by its top-k tokens cannot judge every token", "take a live teacher")


def _logits(signal: Known, rows: Tensor) -> Tensor:
    return signal.compare(lambda nothing, logits, temperature: logits, rows, rows, 1.0)


def _at(signal: Known, tokens: Tensor) -> Known:
    if isinstance(signal, DenseTeacher):
        return DenseTeacher(signal.logits[tokens])
    return HiddenTeacher(signal.hidden[tokens], signal.weight, signal.bias)

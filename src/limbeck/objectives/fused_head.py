"""Output head and divergence in one: (tokens, vocabulary) never exists, only a few rows of it at a time.

The gradient with respect to a chunk's logits is taken while they are there, in the forward pass, and carried on to the
hidden states and the head at once. So nothing of a chunk is kept and nothing is computed twice; the backward pass only
scales. Logits of masked tokens are never computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from limbeck.objectives.divergences import LogitDivergence
from limbeck.objectives.tokens import label_mask
from limbeck.objectives.topk import TopKDivergence

# Logits of one chunk. About ten tensors of this size live at once: large enough for the matrix products to be
# efficient, small enough not to show beside the head.
_CHUNK_ELEMENTS_CPU = 2**21
_CHUNK_ELEMENTS_DEVICE = 2**25

# Divergence and cross-entropy of the chosen rows, each summed, from their logits and their positions.
RowLosses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@runtime_checkable
class RowMeasure(Protocol):
    """What a few tokens' logits are compared with: a teacher, or whatever else knows something of each token."""

    def compare(self, divergence: Callable[..., Tensor], logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
        """One value a token (chosen,) for logits (chosen, vocab) of the tokens numbered ``rows`` (chosen,)."""
        ...


@dataclass(frozen=True)
class HiddenTeacher(RowMeasure):
    """A teacher given by hidden states and its frozen head; its logits are computed chunk by chunk as well."""

    hidden: Float[Tensor, "*items width"]
    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, "vocab"] | None = None

    def compare(self, divergence: Callable[..., Tensor], logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(_rows(self.hidden, rows), self.weight, self.bias)
        return divergence(logits, teacher, temperature)


@dataclass(frozen=True)
class DenseTeacher(RowMeasure):
    """A teacher given by its logits."""

    logits: Float[Tensor, "*items vocab"]

    def compare(self, divergence: Callable[..., Tensor], logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
        return divergence(logits, _rows(self.logits, rows), temperature)


@dataclass(frozen=True)
class TopKTeacher(RowMeasure):
    """A teacher given by k token ids and their log-probabilities at temperature 1; goes with a top-k divergence."""

    ids: Int[Tensor, "*items k"]
    log_probs: Float[Tensor, "*items k"]

    def compare(self, divergence: Callable[..., Tensor], logits: Tensor, rows: Tensor, temperature: float) -> Tensor:
        return divergence(logits, _rows(self.ids, rows), _rows(self.log_probs, rows), temperature)


class HeadLosses(NamedTuple):
    """A loss and what it is made of, each the mean over the valid tokens.

    Attributes:
        total: the weighted sum of the two; the only one with a gradient.
        divergence: in nats, detached; 0 where its weight is 0, for then it is not computed.
        cross_entropy: the same of the cross-entropy.
    """

    total: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]


def fused_head_losses(
    hidden: Float[Tensor, "*items width"],
    weight: Float[Tensor, "vocab width"],
    teacher: RowMeasure,
    divergence: LogitDivergence | TopKDivergence | Callable[..., Tensor],
    *,
    bias: Float[Tensor, "vocab"] | None = None,
    mask: Bool[Tensor, "*items"] | None = None,
    labels: Int[Tensor, "*items"] | None = None,
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    num_items: int | float | Tensor | None = None,
    chunk_size: int | None = None,
) -> HeadLosses:
    """Mean over the valid tokens of a divergence (and cross-entropy), from hidden states, without the full logits.

    The total is ``soft_weight * divergence(hidden @ weight.T + bias, teacher, temperature) + hard_weight *
    cross-entropy`` on the tokens of ``mask``, in value and in gradients, which go to ``hidden``, ``weight`` and
    ``bias``; a frozen head gets no buffer. Head gradients are summed in float32. The parts come from the same pass.

    Args:
        hidden: the student's last hidden states, already shifted against the labels.
        weight: the student's head; under FSDP, gathered.
        teacher: what is known of the teacher at the same tokens (``HiddenTeacher``, ``DenseTeacher``,
            ``TopKTeacher``); no gradient reaches it.
        divergence: from ``divergence(...)``, or ``topk_divergence(...)`` for a ``TopKTeacher``.
        bias: the student's head bias.
        mask: True where a token counts; by default where ``labels`` is not -100, or everywhere.
        labels: token ids for the cross-entropy on the logits at temperature 1.
        temperature: of the divergence, positive.
        soft_weight: weight of the divergence.
        hard_weight: weight of the cross-entropy.
        num_items: the mean is over this many tokens; default the valid ones here. None valid gives 0.
        chunk_size: tokens at a time; by default chosen from the size of the vocabulary.

    Raises:
        ValueError: for a hard weight without labels, or a chunk size below 1.
        RuntimeError: on a second derivative, which the stored gradients do not have.
    """
    if hard_weight and labels is None:
        raise ValueError("hard_weight needs labels")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if mask is None and labels is not None:
        mask = label_mask(labels)
    tokens = hidden.shape[:-1].numel()
    rows = torch.arange(tokens, device=hidden.device) if mask is None else mask.flatten().nonzero().squeeze(-1)

    def row_losses(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        soft, hard = logits.new_zeros(()), logits.new_zeros(())
        if soft_weight:
            soft = teacher.compare(divergence, logits, chosen, temperature).sum()
        if hard_weight and labels is not None:
            hard = F.cross_entropy(logits, labels.flatten()[chosen], reduction="sum")
        return soft, hard

    flat, weights = hidden.reshape(-1, hidden.shape[-1]), (soft_weight, hard_weight)
    sums = _FusedHead.apply(flat, weight, bias, rows, row_losses, weights, chunk_size, torch.is_grad_enabled())
    count = torch.as_tensor(len(rows) if num_items is None else num_items, device=flat.device).clamp_min(1)
    return HeadLosses(*(total / count for total in sums))


def fused_head_divergence(
    hidden: Float[Tensor, "*items width"],
    weight: Float[Tensor, "vocab width"],
    teacher: RowMeasure,
    divergence: LogitDivergence | TopKDivergence | Callable[..., Tensor],
    **options: Any,
) -> Float[Tensor, ""]:
    """The total of :func:`fused_head_losses`, with the same options."""
    return fused_head_losses(hidden, weight, teacher, divergence, **options).total


def chunk_rows(tokens: int, vocab: int, device: torch.device) -> int:
    """How many tokens to take at a time: as few equal chunks as the budget of logits allows."""
    budget = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_DEVICE
    chunks = max(1, -(-tokens * vocab // budget))
    return max(1, -(-tokens // chunks))


class _FusedHead(torch.autograd.Function):
    """Sums of the row losses: weighted, and each by itself; gradients are made in the forward pass, see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        row_losses: RowLosses,
        weights: tuple[float, float],
        chunk_size: int | None,
        with_grad: bool,
    ) -> tuple[Tensor, ...]:
        wanted = [with_grad and needed for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients(hidden, weight, bias, wanted)
        sums = torch.zeros(3, dtype=_wide(hidden), device=hidden.device)
        for chosen in rows.split(chunk_size or chunk_rows(len(rows), len(weight), hidden.device)):
            losses, logit_grad = _chunk(
                _logits(hidden[chosen], weight, bias), chosen, row_losses, weights, any(wanted) and any(weights)
            )
            sums += losses
            if logit_grad is not None:
                gradients.add(logit_grad, hidden, weight, chosen)
        ctx.save_for_backward(*gradients.finished(hidden, weight, bias))
        total, soft, hard = (value.clone() for value in sums)
        ctx.mark_non_differentiable(soft, hard)
        return total, soft, hard

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *parts: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fused head has no second derivative; use the unfused divergence with create_graph")
        # In place: another buffer of the head's size would be the peak. A second backward then fails loudly.
        scaled = [None if grad is None else grad.mul_(grad_output) for grad in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return logits.to(_wide(logits))


def _chunk(
    logits: Tensor, chosen: Tensor, row_losses: RowLosses, weights: tuple[float, float], with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums (total, divergence, cross-entropy) of one chunk, and the total's gradient with respect to its logits."""
    with torch.set_grad_enabled(with_grad):
        soft, hard = row_losses(logits.requires_grad_(with_grad), chosen)
        total = weights[0] * soft + weights[1] * hard
        sums = torch.stack([total, soft, hard]).detach()
    return sums, torch.autograd.grad(total, logits)[0] if with_grad else None


class _Gradients:
    """The accumulators of one forward pass, only those that are wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> None:
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=_wide(weight)) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=_wide(bias)) if wanted[2] and bias is not None else None

    def add(self, logit_grad: Tensor, hidden: Tensor, weight: Tensor, chosen: Tensor) -> None:
        if self.bias is not None:
            self.bias += logit_grad.sum(0)
        if self.hidden is not None:
            self.hidden[chosen] = (logit_grad.to(weight.dtype) @ weight).to(hidden.dtype)
        if self.weight is None:
            return
        if hidden.dtype == self.weight.dtype:
            self.weight.addmm_(logit_grad.t(), hidden[chosen])
        else:
            self.weight += logit_grad.to(hidden.dtype).t() @ hidden[chosen]

    def finished(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        pairs = ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        return [None if grad is None or like is None else grad.to(like.dtype) for grad, like in pairs]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """The chosen tokens of a tensor (*items, features), without a gradient or, for a shifted view, a copy of it all."""
    return tensor.detach()[torch.unravel_index(rows, tensor.shape[:-1])]

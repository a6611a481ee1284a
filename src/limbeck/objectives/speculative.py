"""Speculative decoding: one exact accept/reject step, and the closed forms that say what it gains."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NO_TOKEN = -1


@dataclass(frozen=True)
class SpeculativeStep:
    """What one call of the target yields.

    Attributes:
        tokens: accepted draft tokens, then one more token, then -1; ``(batch, drafted + 1)``.
        accepted: how many draft tokens were accepted, from 0 to drafted; the step yields one token more.
    """

    tokens: Int[Tensor, "batch length"]
    accepted: Int[Tensor, "batch"]


def lenient(
    target_probs: Float[Tensor, "*items vocab"],
    epsilon: float,
    kind: Literal["linear", "square", "exponential"] = "linear",
) -> Float[Tensor, "*items vocab"]:
    """The target's probabilities raised for lossy decoding: p/eps, p/eps^2 or p^eps, eps in (0, 1]; 1 changes nothing.

    Not normalised. Source: Zhou et al., *DistillSpec: Improving Speculative Decoding via Knowledge Distillation*,
    ICLR 2024, arXiv 2310.08461.
    """
    if not 0.0 < epsilon <= 1.0:
        raise ValueError(f"lenience epsilon must be in (0, 1], got {epsilon}")
    if kind == "exponential":
        return target_probs**epsilon
    return target_probs / (epsilon if kind == "linear" else epsilon**2)


def speculative_step(
    drafted: Int[Tensor, "batch drafted"],
    draft_probs: Float[Tensor, "batch drafted vocab"],
    target_probs: Float[Tensor, "batch length vocab"],
    *,
    generator: torch.Generator | None = None,
    epsilon: float = 1.0,
    lenience: Literal["linear", "square", "exponential"] = "linear",
) -> SpeculativeStep:
    """Accept or reject drafted tokens so that what comes out is distributed exactly as the target's own samples.

    Token x is accepted with probability min(1, p(x)/q(x)); at the first rejection one token is drawn from the
    normalised excess max(p - q, 0), and after no rejection from p. ``draft_probs`` must be the warped distributions
    (temperature, top-k, top-p) that ``drafted`` was drawn from; ``target_probs`` has one position more. ``epsilon`` <
    1 makes it lossy. Raises ValueError where the positions do not fit.

    Source: Leviathan et al., *Fast Inference from Transformers via Speculative Decoding*, ICML 2023, arXiv 2211.17192.
    """
    if target_probs.shape[1] != drafted.shape[1] + 1:
        raise ValueError(f"{drafted.shape[1]} drafted tokens need that many target positions and one more")
    target_probs, draft_probs = (probs.to(torch.float32) for probs in (target_probs, draft_probs))
    raised = lenient(target_probs[:, :-1], epsilon, lenience)
    chance, proposal = (probs.gather(-1, drafted.unsqueeze(-1)).squeeze(-1) for probs in (raised, draft_probs))
    uniform = torch.rand(drafted.shape, generator=generator, device=drafted.device)
    # u q < p, not u <= p/q: never accepts where p = 0, always where p >= q, and no division.
    accepted = _leading(uniform * proposal < chance)
    # After the last draft token nothing was proposed, so that the excess over it is p itself.
    excess = torch.cat([(raised - draft_probs).clamp_min(0.0), target_probs[:, -1:]], dim=1)
    chosen = _position(excess, accepted)
    return _finish(drafted, accepted, torch.multinomial(chosen, 1, generator=generator).squeeze(-1))


def greedy_step(
    drafted: Int[Tensor, "batch drafted"], target_scores: Float[Tensor, "batch length vocab"]
) -> SpeculativeStep:
    """Accept drafted tokens while each is the target's argmax, then add the target's own: exactly greedy decoding.

    ``target_scores`` are logits or probabilities with one position more than ``drafted``.
    """
    if target_scores.shape[1] != drafted.shape[1] + 1:
        raise ValueError(f"{drafted.shape[1]} drafted tokens need that many target positions and one more")
    best = target_scores.argmax(-1)
    accepted = _leading(drafted == best[:, :-1])
    return _finish(drafted, accepted, _position(best, accepted))


def acceptance(
    draft_probs: Float[Tensor, "*items vocab"], target_probs: Float[Tensor, "*items vocab"]
) -> Float[Tensor, "*items"]:
    """Probability that a token drawn from the draft is accepted: sum min(p, q) = 1 - total variation, in [0, 1].

    Take its mean over contexts that the target generated. Source: as :func:`speculative_step`.
    """
    return torch.minimum(draft_probs, target_probs).sum(-1)


def expected_tokens(rate: float | Float[Tensor, "*items"], drafted: int) -> Float[Tensor, "*items"]:
    """Tokens per call of the target, 1 to drafted + 1, if each is accepted independently with probability ``rate``."""
    rate = torch.as_tensor(rate, dtype=torch.float64)
    return (rate.unsqueeze(-1) ** torch.arange(drafted + 1, device=rate.device)).sum(-1)


def speedup(rate: float | Float[Tensor, "*items"], drafted: int, cost: float) -> Float[Tensor, "*items"]:
    """Wall-time gain over plain decoding; ``cost`` is the time of a draft call over that of a target call."""
    return expected_tokens(rate, drafted) / (drafted * cost + 1)


def _leading(accepted: Bool[Tensor, "batch drafted"]) -> Int[Tensor, "batch"]:
    """How many tokens are accepted before the first that is not."""
    return accepted.long().cumprod(-1).sum(-1)


def _position(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b]] for every b."""
    return values[torch.arange(len(index), device=index.device), index]


def _finish(drafted: Tensor, accepted: Tensor, extra: Tensor) -> SpeculativeStep:
    place = torch.arange(drafted.shape[1] + 1, device=drafted.device)
    tokens = torch.nn.functional.pad(drafted, (0, 1), value=NO_TOKEN)
    tokens = torch.where(place == accepted.unsqueeze(-1), extra.unsqueeze(-1), tokens)
    return SpeculativeStep(tokens.masked_fill(place > accepted.unsqueeze(-1), NO_TOKEN), accepted)

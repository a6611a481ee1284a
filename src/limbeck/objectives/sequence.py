"""MiniLLM's policy gradient in pieces: rewards, advantages, importance weights, clipped surrogate.

Source of all: Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024, arXiv 2306.08543.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from limbeck.objectives.divergences import divergence, log_probabilities
from limbeck.objectives.f_divergences import log_mixture
from limbeck.objectives.operands import full_precision


def token_log_probs(
    logits: Float[Tensor, "*items vocab"], tokens: Int[Tensor, "*items"], temperature: float = 1.0
) -> Float[Tensor, "*items"]:
    """Log-probability in nats of the given token at each place; ``logits`` are those that predict it."""
    return log_probabilities(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_rewards(
    teacher_log_probs: Float[Tensor, "*items"],
    student_log_probs: Float[Tensor, "*items"],
    *,
    scale: float = 1.0,
    limit: float | None = None,
) -> Float[Tensor, "*items"]:
    """log p(y_t) - log q(y_t) of sampled tokens, without gradient: minus the sequence-level reverse KL on average.

    ``student_log_probs`` are those at rollout time. The reward is divided by ``scale`` and then clipped to
    [-limit, limit] (0.5 and 100 in the official runs).
    """
    rewards = (teacher_log_probs - student_log_probs).detach() / scale
    return rewards if limit is None else rewards.clamp(-limit, limit)


def reverse_kl_k3(rewards: Float[Tensor, "*items"]) -> Float[Tensor, "*items"]:
    """exp(r) - 1 - r >= 0: an unbiased estimate of reverse KL from unscaled rewards; a metric, not a loss."""
    return torch.expm1(rewards) - rewards


@full_precision  # the matrix product too
def advantages(
    rewards: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    *,
    gamma: float = 0.95,
    normalise_length: bool = True,
    include_current: bool = True,
    compat: Literal["trl"] | None = None,
) -> Float[Tensor, "batch length"]:
    """Discounted sum of the rewards from each token on; divided by the number of valid tokens left if normalised.

    ``mask`` is True on generated tokens; masked rewards count as 0. With the single-step term, which already holds a
    token's own reward, set ``include_current`` to False (the official code does not). ``compat="trl"`` reproduces
    TRL: gamma to the power of the absolute position, and normalisation by the discounted count in which a masked
    token weighs 1e-4; gamma = 0 gives the rewards.
    """
    rewards = rewards.detach() * mask
    place = torch.arange(rewards.shape[1], dtype=rewards.dtype, device=rewards.device)
    if compat == "trl":
        return _absolute_advantages(rewards, mask, gamma**place, normalise_length) if gamma > 0 else rewards
    ahead = place.unsqueeze(-1) - place - (0 if include_current else 1)  # [i, t]: i - t
    kernel = torch.where(ahead >= 0, gamma ** ahead.clamp_min(0), 0.0)
    total = rewards @ kernel
    return total / (mask.to(kernel) @ (ahead >= 0).to(kernel)).clamp_min(1) if normalise_length else total


def _absolute_advantages(rewards: Tensor, mask: Tensor, discount: Tensor, normalise_length: bool) -> Tensor:
    def from_here(values: Tensor) -> Tensor:
        return values.flip(-1).cumsum(-1).flip(-1)

    total = from_here(discount * rewards)
    return total / from_here(discount * torch.where(mask, 1.0, 1e-4)) if normalise_length else total


def whiten(
    values: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "batch length"]:
    """Shift and scale to mean 0 and variance 1 (unbiased, + 1e-8) over the valid entries; masked ones become 0.

    ``mask=None`` takes padding for data, as the official code does.
    """
    chosen = values.flatten() if mask is None else values[mask]
    if chosen.numel() < 2:
        return torch.zeros_like(values)
    white = (values - chosen.mean()) * torch.rsqrt(chosen.var() + 1e-8)
    return white if mask is None else white * mask


def mixed_log_probs(
    student_logits: Float[Tensor, "*items vocab"], teacher_logits: Float[Tensor, "*items vocab"], alpha: float = 0.2
) -> Float[Tensor, "*items vocab"]:
    """log(alpha p + (1 - alpha) q), from which teacher-mixed rollouts are sampled; without gradient."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    return log_mixture(log_probabilities(teacher_logits.detach()), log_probabilities(student_logits.detach()), alpha)


def importance_weights(
    student_log_probs: Float[Tensor, "*items"], sampler_log_probs: Float[Tensor, "*items"]
) -> Float[Tensor, "*items"]:
    """q(y_t) / sampler(y_t) per token, frozen at rollout time; one step's ratio stands for the product of all."""
    return (student_log_probs - sampler_log_probs).detach().exp()


def ppo_surrogate(
    log_probs: Float[Tensor, "*items"],
    old_log_probs: Float[Tensor, "*items"],
    advantages: Float[Tensor, "*items"],
    weights: Float[Tensor, "*items"] | None = None,
    clip_range: float = 0.2,
) -> Float[Tensor, "*items"]:
    """Clipped policy-gradient loss per token: max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range)).

    ratio = q/q_old times ``weights``; gradient flows through ``log_probs`` only. Drop masked tokens before.

    Source: Schulman et al., *Proximal Policy Optimization Algorithms*, 2017, arXiv 1707.06347.
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    ratio = ratio if weights is None else ratio * weights.detach()
    advantages = advantages.detach()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def single_step(
    student_logits: Float[Tensor, "*items student_vocab"], teacher_logits: Float[Tensor, "*items teacher_vocab"]
) -> Float[Tensor, "*items"]:
    """Minus the exact expectation of a token's own reward: reverse KL of the next-token distributions."""
    return divergence("reverse-kl")(student_logits, teacher_logits)

"""Teachers known by their top-k tokens only: stored ids and log-probabilities, and what to do about the tail."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.objectives.divergences import LogProbDivergence, log_probabilities, log_sum_exp
from limbeck.objectives.f_divergences import f_divergence
from limbeck.objectives.operands import check_temperature

Tail = Literal["zero", "bucket", "uniform"]

# Quantised log-probabilities may sum to slightly more than 1; the tail keeps this much.
_LEAST_TAIL = 1e-8


@dataclass(frozen=True)
class TopKDivergence:
    """An f-divergence from a teacher known by k tokens, called on the student's logits.

    Attributes:
        from_log_probs: ``(log_student, log_teacher) -> (*items,)``.
        tail: where the teacher's probability outside its k tokens goes, see :func:`topk_divergence`.
    """

    from_log_probs: LogProbDivergence
    tail: Tail

    def __call__(
        self,
        student_logits: Float[Tensor, "*items vocab"],
        ids: Int[Tensor, "*items k"],
        log_probs: Float[Tensor, "*items k"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "*items"]:
        """One value in nats per token, without a factor temperature^2.

        ``ids`` are distinct per token; one beyond the student's vocabulary is a token the student cannot say (not for a
        uniform tail, which needs to know how many there are).
        ``log_probs`` are the teacher's, over its full vocabulary, at temperature 1.
        """
        log_probs = log_probs.detach().to(torch.promote_types(log_probs.dtype, torch.float32))
        if self.tail == "uniform":
            dense = spread_uniformly(ids, log_probs, student_logits.shape[-1])
            return self.from_log_probs(
                log_probabilities(student_logits, temperature), log_probabilities(dense, temperature)
            )
        tail = log_tail(log_probs) if self.tail == "bucket" else torch.full_like(log_probs[..., :1], -math.inf)
        teacher = log_probabilities(torch.cat([log_probs, tail], dim=-1), temperature)
        return self.from_log_probs(bucket_log_probabilities(student_logits, ids, temperature), teacher)


def topk_divergence(name: str, tail: Tail = "bucket", **parameters: float) -> TopKDivergence:
    """The f-divergence of this name from a top-k teacher.

    ``tail`` is what stands for the teacher's probability r outside the k tokens:

    - ``bucket``: one more class, r for the teacher, everything outside the k tokens for the student. Never above the
      true divergence and equal to it at k = vocabulary. At temperature T the teacher's r is tempered as one class,
      r^(1/T).
    - ``zero``: the k tokens are renormalised and everything else has probability 0: over-confident targets. The
      student's probability outside enters in closed form. Raises ValueError for a divergence that this makes
      infinite.
    - ``uniform``: r is spread evenly over the other tokens; needs memory for the full vocabulary.
    """
    row = f_divergence(name, **parameters)
    if tail == "zero" and math.isinf(float(row.f(torch.zeros(())))):
        raise ValueError(f"{name!r} is infinite where the teacher has probability 0; use tail='bucket'")
    return TopKDivergence(row.from_log_probs, tail)


def log_tail(log_probs: Float[Tensor, "*items k"]) -> Float[Tensor, "*items 1"]:
    """log of the probability that k entries leave over, kept within [1e-8, 1]."""
    return torch.log((1 - log_probs.exp().sum(-1, keepdim=True)).clamp(_LEAST_TAIL, 1.0))


def bucket_log_probabilities(
    logits: Float[Tensor, "*items vocab"], ids: Int[Tensor, "*items k"], temperature: float = 1.0
) -> Float[Tensor, "*items classes"]:
    """Log-probabilities of the k given tokens and, as class k + 1, of all other tokens together.

    The rest is a logsumexp of logits and not 1 minus a sum, which loses every digit of a small tail.
    """
    check_temperature(temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if temperature == 1 else logits / temperature
    vocab, ids = logits.shape[-1], ids.long()
    kept = logits.gather(-1, ids.clamp_max(vocab - 1)).masked_fill(ids >= vocab, -math.inf)
    # One spare column takes the ids beyond the vocabulary, so that they do not hide a token that is there.
    rest = torch.nn.functional.pad(logits, (0, 1), value=-math.inf).scatter_(-1, ids.clamp_max(vocab), -math.inf)
    return torch.cat([kept, log_sum_exp(rest).unsqueeze(-1)], dim=-1).log_softmax(-1)


def spread_uniformly(
    ids: Int[Tensor, "*items k"], log_probs: Float[Tensor, "*items k"], vocab: int
) -> Float[Tensor, "*items vocab"]:
    """Dense log-probabilities: the k given ones, and the rest spread evenly over the other vocab - k tokens."""
    k, ids = ids.shape[-1], ids.long()
    if k > vocab:
        raise ValueError(f"{k} tokens do not fit a vocabulary of {vocab}")
    if k == vocab:
        return torch.empty_like(log_probs).scatter_(-1, ids, log_probs)
    each = log_tail(log_probs) - math.log(vocab - k)
    return each.expand(*log_probs.shape[:-1], vocab).scatter(-1, ids, log_probs)


def support_divergence(
    name: str,
    student_logits: Float[Tensor, "*items vocab"],
    ids: Int[Tensor, "*items k"],
    log_probs: Float[Tensor, "*items k"],
    temperature: float = 1.0,
    **parameters: float,
) -> Float[Tensor, "*items"]:
    """The terms of an f-divergence on the given tokens only: no renormalisation, no remainder; may be negative.

    ``log_probs`` are the teacher's over its full vocabulary and, unlike for :func:`topk_divergence`, already taken at
    ``temperature``.
    """
    log_student = log_probabilities(student_logits, temperature).gather(-1, ids.long())
    log_teacher = log_probs.detach().to(log_student.dtype)
    return f_divergence(name, **parameters).from_log_probs(log_student, log_teacher)


def sample_support(
    teacher_logits: Float[Tensor, "items vocab"],
    draws: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "items draws"]:
    """Token ids drawn with replacement from the teacher, each of weight 1/draws: an unbiased sparse teacher."""
    probs = log_probabilities(teacher_logits.detach(), temperature).exp()
    return torch.multinomial(probs, draws, replacement=True, generator=generator)


def sampled_cross_entropy(
    student_logits: Float[Tensor, "*items vocab"], ids: Int[Tensor, "*items draws"], temperature: float = 1.0
) -> Float[Tensor, "*items"]:
    """Mean negative log-probability in nats of tokens drawn from the teacher.

    Its gradient is that of forward KL on average.

    Source: Anshumann et al., *Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs*, ACL 2025,
    arXiv 2503.16870.
    """
    return -log_probabilities(student_logits, temperature).gather(-1, ids).mean(-1)

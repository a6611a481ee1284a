"""Per-token divergences between a student's and a teacher's logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.objectives.f_divergences import F_DIVERGENCES, f_divergence, kl_divergence
from limbeck.objectives.operands import check_temperature
from limbeck.objectives.vocabulary import match_vocabulary

LogProbDivergence = Callable[[Tensor, Tensor], Tensor]


def log_probabilities(logits: Float[Tensor, "*items vocab"], temperature: float = 1.0) -> Float[Tensor, "*items vocab"]:
    """log softmax(logits / temperature) in float32 or better. Raises ValueError unless temperature > 0."""
    check_temperature(temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def log_sum_exp(logits: Float[Tensor, "*items vocab"]) -> Float[Tensor, "*items"]:
    """logsumexp over the last dimension, with a zero instead of a NaN gradient where every entry is -inf."""
    empty = torch.isneginf(logits.detach().amax(-1))
    return logits.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)


@dataclass(frozen=True)
class LogitDivergence:
    """A divergence of next-token distributions, called on logits.

    Attributes:
        from_log_probs: ``(log_student, log_teacher) -> (*items,)``.
        square_temperature: multiply by temperature^2, so that gradients keep their size as the temperature grows.
    """

    from_log_probs: LogProbDivergence
    square_temperature: bool = False

    def __call__(
        self,
        student_logits: Float[Tensor, "*items student_vocab"],
        teacher_logits: Float[Tensor, "*items teacher_vocab"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "*items"]:
        """One value in nats per token; no gradient reaches the teacher.

        The vocabularies may differ in size: an entry that one side lacks has probability 0 there.
        """
        student_logits, teacher_logits = match_vocabulary(student_logits, teacher_logits.detach())
        log_student = log_probabilities(student_logits, temperature)
        values = self.from_log_probs(log_student, log_probabilities(teacher_logits, temperature))
        return values * temperature**2 if self.square_temperature else values


def divergence(name: str, *, square_temperature: bool = False, **parameters: float | str | None) -> LogitDivergence:
    """The divergence of this name on logits, e.g. ``divergence("jsd", beta=0.1)(student_logits, teacher_logits)``.

    Names: every row of ``F_DIVERGENCES``, and the two that are none, ``adaptive-kl`` (mu, compat) and
    ``sorted-wasserstein``. Values are true divergences (0 at student = teacher), never the cross-entropy form.
    ``square_temperature`` is off, as is usual for language models. Raises ValueError for an unknown name or parameter.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; known: {', '.join(sorted(DIVERGENCES))}")
    try:
        from_log_probs = DIVERGENCES[name](**parameters)
    except TypeError as error:
        raise ValueError(f"divergence {name!r} does not take these parameters: {error}") from error
    return LogitDivergence(from_log_probs, square_temperature)


def entropy(logits: Float[Tensor, "*items vocab"], temperature: float = 1.0) -> Float[Tensor, "*items"]:
    """Entropy in nats of softmax(logits / temperature); an entry at -inf contributes 0."""
    log_p = log_probabilities(logits, temperature)
    return -(log_p.exp() * log_p.masked_fill(torch.isneginf(log_p), 0.0)).sum(-1)


def token_cross_entropy(
    student_logits: Float[Tensor, "*items student_vocab"],
    teacher_logits: Float[Tensor, "*items teacher_vocab"],
    temperature: float = 1.0,
) -> Float[Tensor, "*items"]:
    """-sum p log q in nats: forward KL plus the teacher's entropy; the same gradient, another value."""
    student_logits, teacher_logits = match_vocabulary(student_logits, teacher_logits.detach())
    log_p = log_probabilities(teacher_logits, temperature)
    return cross_entropy_from_log_probs(log_probabilities(student_logits, temperature), log_p)


def cross_entropy_from_log_probs(
    log_student: Float[Tensor, "*items vocab"], log_teacher: Float[Tensor, "*items vocab"]
) -> Float[Tensor, "*items"]:
    """-sum p log q in nats from log-probabilities; an entry the student lacks contributes 0."""
    return -(log_teacher.exp() * log_student.masked_fill(torch.isneginf(log_student), 0.0)).sum(-1)


def adaptive_kl(
    log_student: Float[Tensor, "*items vocab"],
    log_teacher: Float[Tensor, "*items vocab"],
    mu: float = 0.5,
    compat: Literal["taid"] | None = None,
) -> Float[Tensor, "*items"]:
    """Forward and reverse KL mixed per token by where the two disagree: on the teacher's head or on its tail.

    The head is the smallest set of top teacher tokens whose probability reaches ``mu``. Forward KL weighs by the
    share of sum |p - q| that lies on the head, reverse KL by the rest; the weights carry no gradient.

    ``compat="taid"`` reproduces TAID's repository: ascending order, the mask of sorted places applied to unsorted
    tokens, forward KL without the teacher's entropy, gradients through the weights.

    Source: Wu et al., *Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models*,
    COLING 2025, arXiv 2404.02657.
    """
    if compat == "taid":
        gap = (log_teacher.exp() - log_student.exp()).abs()
        head = log_teacher.exp().sort(dim=-1).values.cumsum(-1) >= mu
        forward = cross_entropy_from_log_probs(log_student, log_teacher)
    else:
        teacher, order = log_teacher.exp().sort(dim=-1, descending=True)
        gap = (teacher - log_student.detach().exp().gather(-1, order)).abs()
        head = teacher.cumsum(-1) - teacher < mu
        forward = kl_divergence(log_teacher, log_student)
    head_gap = (gap * head).sum(-1)
    total = gap.sum(-1)
    # At p = q both divergences are 0, whatever the share.
    share = head_gap / total.clamp_min(torch.finfo(total.dtype).tiny)
    return share * forward + (1 - share) * kl_divergence(log_student, log_teacher)


def sorted_wasserstein(
    student_probs: Float[Tensor, "*items student_vocab"], teacher_probs: Float[Tensor, "*items teacher_vocab"]
) -> Float[Tensor, "*items"]:
    """L1 distance of the two descending probability spectra, in [0, 2]; blind to which token has which probability.

    The Wasserstein-1 distance under the 0/1 cost that universal logit distillation uses across tokenizers; the shorter
    vocabulary is padded with probability 0.

    Source: Boizard et al., *Towards Cross-Tokenizer Distillation*, TMLR 2025, arXiv 2402.12030.
    """
    student, teacher = (probs.sort(dim=-1, descending=True).values for probs in (student_probs, teacher_probs))
    student, teacher = match_vocabulary(student, teacher, "zero")
    return (student - teacher).abs().sum(-1)


def decoupled_kl(
    student_logits: Float[Tensor, "*items student_vocab"],
    teacher_logits: Float[Tensor, "*items teacher_vocab"],
    target: Int[Tensor, "*items"],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    square_temperature: bool = False,
) -> Float[Tensor, "*items"]:
    """Forward KL in two parts with their own weights: target against the rest (alpha), and among the rest (beta).

    ``target`` holds token ids; drop ignored tokens before. The original multiplies by temperature^2.

    Source: Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022, arXiv 2203.08679.
    """
    matched = match_vocabulary(student_logits, teacher_logits.detach())
    log_q, log_p = (log_probabilities(logits, temperature) for logits in matched)
    rest_q, rest_p = (log.scatter(-1, target.unsqueeze(-1), -torch.inf) for log in (log_q, log_p))

    def against_rest(log: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([log.gather(-1, target.unsqueeze(-1)), log_sum_exp(rest).unsqueeze(-1)], dim=-1)

    on_target = kl_divergence(against_rest(log_p, rest_p), against_rest(log_q, rest_q))
    among_rest = kl_divergence(rest_p.log_softmax(-1), rest_q.log_softmax(-1))
    values = alpha * on_target + beta * among_rest
    return values * temperature**2 if square_temperature else values


def _row(name: str) -> Callable[..., LogProbDivergence]:
    return lambda **parameters: f_divergence(name, **parameters).from_log_probs


def _sorted(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    return sorted_wasserstein(log_student.exp(), log_teacher.exp())


def _adaptive(mu: float = 0.5, compat: Literal["taid"] | None = None) -> LogProbDivergence:
    return lambda log_student, log_teacher: adaptive_kl(log_student, log_teacher, mu, compat)


DIVERGENCES: dict[str, Callable[..., LogProbDivergence]] = {
    **{name: _row(name) for name in F_DIVERGENCES},
    "adaptive-kl": _adaptive,
    "sorted-wasserstein": lambda: _sorted,
}

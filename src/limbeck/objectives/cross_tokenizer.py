"""Teacher and student with different tokenizers: sorted spectra, spans that end at the same byte, both together."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.objectives.divergences import log_probabilities, sorted_wasserstein
from limbeck.objectives.f_divergences import generalised_jsd
from limbeck.objectives.tokens import label_mask

# One group of tokens of the student and one of the teacher that spell the same bytes.
Group = tuple[range, range]


def universal_logit_distillation(
    student_logits: Float[Tensor, "batch student_length student_vocab"],
    teacher_logits: Float[Tensor, "batch teacher_length teacher_vocab"],
    student_labels: Int[Tensor, "batch student_length"],
    teacher_labels: Int[Tensor, "batch teacher_length"],
    *,
    temperature: float = 1.0,
    shift: bool = True,
) -> Float[Tensor, "batch"]:
    """L1 distance of sorted next-token probabilities, position by position of the answer; the mean over each sample.

    Labels are aligned with the tokens themselves, -100 outside the answer, which is one span. The i-th answer token
    of one side is paired with the i-th of the other, up to the shorter answer. ``shift`` takes the logits one
    position earlier: those that predict the token; False reproduces code that does not. A sample without an answer
    gives 0. Raises ValueError where an answer begins at position 0, which no logits predict.

    Source: Boizard et al., *Towards Cross-Tokenizer Distillation*, TMLR 2025, arXiv 2402.12030.
    """
    values = []
    for index in range(len(student_logits)):
        student, teacher = (_answer(labels[index], shift) for labels in (student_labels, teacher_labels))
        length = min(len(student), len(teacher))
        student_rows = student_logits[index, student.start : student.start + length]
        teacher_rows = teacher_logits[index, teacher.start : teacher.start + length].detach()
        distance = sorted_wasserstein(
            log_probabilities(student_rows, temperature).exp(), log_probabilities(teacher_rows, temperature).exp()
        )
        values.append(distance.sum() / max(length, 1))
    return torch.stack(values)


def _answer(labels: Int[Tensor, "length"], shift: bool) -> range:
    """The positions of the logits that belong to the answer."""
    places = label_mask(labels).nonzero()
    if len(places) == 0:
        return range(0)
    start = int(places[0]) - shift
    if start < 0:
        raise ValueError("an answer begins at position 0, which no logits predict; begin with a prompt token")
    return range(start, start + len(places))


def utf8_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Byte position in UTF-8 at which each token ends, from the (start, end) character offsets of a fast tokenizer."""
    ends = [0]
    for character in text:
        ends.append(ends[-1] + len(character.encode()))
    return [ends[end] for _, end in offsets]


def align_spans(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[Group]:
    """Smallest groups of consecutive tokens of both sides that end at the same byte.

    ``*_ends`` are non-decreasing byte positions at which tokens end; a token of no bytes joins the group after it.
    Tokens after the last common end belong to no group. Groups are ranges of token indices.
    """
    groups, student_start, teacher_start, i, j = [], 0, 0, 0, 0
    while i < len(student_ends) and j < len(teacher_ends):
        if student_ends[i] < teacher_ends[j]:
            i += 1
        elif student_ends[i] > teacher_ends[j]:
            j += 1
        else:
            i, j = i + 1, j + 1
            groups.append((range(student_start, i), range(teacher_start, j)))
            student_start, teacher_start = i, j
    return groups


def merge_rows(
    probs: Float[Tensor, "length vocab"],
    token_ids: Int[Tensor, "length"],
    groups: Sequence[range],
    mode: Literal["observed", "bayesian"] = "bayesian",
) -> Float[Tensor, "groups vocab"]:
    """One row per group of tokens; rows of longer groups are not normalised.

    ``probs[i]`` is the distribution that predicts ``token_ids[i]``. ``bayesian``: the last row times the
    probabilities of the group's earlier tokens, a joint probability. ``observed``: the first row times those of the
    later tokens.
    """
    spoken = probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    rows = []
    for group in groups:
        first, last = group[0], group[-1]
        if mode == "bayesian":
            rows.append(probs[last] * spoken[first:last].prod())
        else:
            rows.append(probs[first] * spoken[first + 1 : last + 1].prod())
    return torch.stack(rows) if rows else probs[:0]


def hybrid_distance(
    student_probs: Float[Tensor, "*items student_vocab"],
    teacher_probs: Float[Tensor, "*items teacher_vocab"],
    student_shared: Int[Tensor, "shared"],
    teacher_shared: Int[Tensor, "shared"],
    *,
    beta: float = 0.5,
    shared_weight: float | None = None,
) -> Float[Tensor, "*items"]:
    """Generalised JSD on tokens that both vocabularies have, sorted L1 on all others; per aligned group.

    ``student_shared[i]`` and ``teacher_shared[i]`` are the ids of one string. Probabilities are compared as they are,
    without renormalisation (logarithms from 1e-8 up). ``shared_weight`` defaults to the shared part of the teacher's
    vocabulary; the others weigh 1 minus it. Raises ValueError for a weight outside [0, 1].

    Source: GOLD, the extended universal logit distillation in Hugging Face TRL, 2025 (no paper).
    """
    weight = len(teacher_shared) / teacher_probs.shape[-1] if shared_weight is None else shared_weight
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"shared_weight must be in [0, 1], got {weight}")
    teacher_probs = teacher_probs.detach()
    student_log, teacher_log = (
        probs[..., ids].clamp_min(1e-8).log()
        for probs, ids in ((student_probs, student_shared), (teacher_probs, teacher_shared))
    )
    shared = generalised_jsd(beta).from_log_probs(student_log, teacher_log)
    others = sorted_wasserstein(_without(student_probs, student_shared), _without(teacher_probs, teacher_shared))
    return weight * shared + (1 - weight) * others


def _without(probs: Tensor, ids: Tensor) -> Tensor:
    keep = torch.ones(probs.shape[-1], dtype=torch.bool, device=probs.device)
    keep[ids] = False
    return probs[..., keep]

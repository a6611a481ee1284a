"""Objectives on logits that treat the class of the label apart from all others: DKD and NKD."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.objectives.operands import check_same_shape, check_temperature, full_precision


@full_precision
def dkd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    *,
    temperature: float = 4.0,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
) -> Float[Tensor, ""]:
    r"""Decoupled distillation: weigh "how likely is the label" apart from "how are the other classes related".

    .. math:: T^2 \cdot \frac1B \sum_b \alpha\,\mathrm{KL}(b_t \| b_s) + \beta\,\mathrm{KL}(q_t \| q_s)

    with :math:`b = (p_y, 1 - p_y)` and q the softmax over the classes other than y. Per sample,
    :math:`\mathrm{KL}(p_t \| p_s) = \mathrm{KL}(b_t \| b_s) + (1 - p_{t,y})\,\mathrm{KL}(q_t \| q_s)`.

    Args:
        student_logits: (batch, classes), at least two classes.
        teacher_logits: (batch, classes), no gradient flows into it.
        labels: class indices (batch), or soft labels (batch, classes) of which the largest is taken.
        temperature: T above 0.
        target_weight: the paper's alpha.
        non_target_weight: the paper's beta.

    Returns:
        A scalar, 0 where both sides agree up to a constant per row.

    Raises:
        ValueError: if T is not positive, the shapes differ or there is only one class.

    Source: Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022, arXiv 2203.08679.
    """
    _check(student_logits, teacher_logits, temperature)
    target = _class_indices(labels)
    student_binary, student_others = _split(student_logits / temperature, target)
    teacher_binary, teacher_others = _split(teacher_logits.detach() / temperature, target)
    target_part = F.kl_div(student_binary, teacher_binary, reduction="batchmean", log_target=True)
    non_target_part = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return temperature**2 * (target_weight * target_part + non_target_weight * non_target_part)


@full_precision
def nkd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
    non_target_weight: float = 1.5,
) -> Float[Tensor, ""]:
    r"""Normalised distillation: a soft label for the target class and renormalised soft labels for the others.

    .. math:: -\frac1B \sum_b \Bigl( p_{t,y} \log p_{s,y} + \gamma T^2 \sum_{c \ne y} q_{t,c} \log q_{s,c} \Bigr)

    with p the plain softmax (no temperature) and q the softmax of z / T over the classes other than y. Both parts are
    cross-entropies, hence not 0 where the sides agree; there only the second part's gradient is 0.

    Args:
        student_logits: (batch, classes), at least two classes.
        teacher_logits: (batch, classes), no gradient flows into it.
        labels: class indices (batch), or soft labels (batch, classes) of which the largest is taken.
        temperature: T above 0, of the second part only.
        non_target_weight: the paper's gamma.

    Returns:
        A scalar.

    Raises:
        ValueError: if T is not positive, the shapes differ or there is only one class.

    Source: Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
    Loss and Customized Soft Labels*, ICCV 2023, arXiv 2303.13005.
    """
    _check(student_logits, teacher_logits, temperature)
    target = _class_indices(labels)
    teacher_logits = teacher_logits.detach()
    student_target, teacher_target = (
        F.log_softmax(logits, dim=1).gather(1, target[:, None]) for logits in (student_logits, teacher_logits)
    )
    student_others, teacher_others = (
        F.log_softmax(_without(logits / temperature, target), dim=1) for logits in (student_logits, teacher_logits)
    )
    target_part = -(teacher_target.exp() * student_target).mean()
    non_target_part = -(teacher_others.exp() * student_others).sum(dim=1).mean()
    return target_part + non_target_weight * temperature**2 * non_target_part


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits, "compare logits of one batch over the same classes")
    if student_logits.shape[1] < 2:
        raise ValueError("a target class apart from the others needs at least 2 classes: use kd for a single logit")


def _class_indices(labels: Tensor) -> Tensor:
    return labels.argmax(dim=1) if labels.ndim == 2 else labels.long()


def _without(values: Tensor, target: Tensor) -> Tensor:
    """Drop the target's column of each row: exact, unlike a large negative logit, and without a device sync."""
    columns = torch.arange(values.shape[1] - 1, device=values.device)[None]
    return values.gather(1, columns + (columns >= target[:, None]))


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (target, all others together) and those of the others among themselves."""
    log_probabilities = F.log_softmax(logits, dim=1)
    others = _without(log_probabilities, target)
    # A logsumexp, because 1 - p loses every digit once the target's probability rounds to 1.
    binary = torch.cat([log_probabilities.gather(1, target[:, None]), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return binary, F.log_softmax(others, dim=1)

"""Objectives on whole logit vectors: Hinton's, DeiT's, DIST, and the standardisation that can precede them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.operands import Reduction, check_same_shape, check_temperature, full_precision

SAME_CLASSES = "compare logits of one batch over the same classes, in the same order"


@full_precision
def kd(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 4.0,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, ""]:
    r"""Hinton's distillation loss: the divergence of the softened student from the softened teacher.

    .. math:: T^2 \cdot \frac1B \sum_b \mathrm{KL}(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T))

    The factor :math:`T^2` keeps the size of the gradient, :math:`T (p_s - p_t) / B`, about independent of T.

    Args:
        student_logits: (batch, classes), any range.
        teacher_logits: (batch, classes), no gradient flows into it.
        temperature: T above 0; large values compare the centred logits themselves.
        reduction: ``batchmean`` averages over the batch, ``numel`` over batch and classes (C times smaller).

    Returns:
        A scalar, 0 where both sides agree up to a constant per row.

    Raises:
        ValueError: if T is not positive, the shapes differ or the reduction is unknown.

    Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return temperature**2 * total / _count(student, reduction)


@full_precision
def soft_cross_entropy(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, ""]:
    r"""Cross-entropy with the teacher's softened probabilities as labels: :func:`kd` plus the teacher's entropy.

    .. math:: -T^2 \cdot \frac1B \sum_{b,c} p_t \log p_s, \qquad p = \mathrm{softmax}(z / T)

    Its gradient is that of :func:`kd`. For a mean of several teachers' probabilities pass its logarithm as
    ``teacher_logits``.

    Args:
        student_logits: (batch, classes), any range.
        teacher_logits: (batch, classes), no gradient flows into it.
        temperature: T above 0.
        reduction: as in :func:`kd`.

    Returns:
        A scalar; at its least, the teacher's entropy times :math:`T^2`.

    Raises:
        ValueError: if T is not positive, the shapes differ or the reduction is unknown.

    Source: Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return -(temperature**2) * (teacher.exp() * student).sum() / _count(student, reduction)


@full_precision
def deit_hard(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's distillation head with the class the teacher finds most likely.

    Args:
        student_logits: (batch, classes), of the distillation token or head.
        teacher_logits: (batch, classes); only the position of the largest entry of each row matters.

    Returns:
        A scalar, the mean over the batch.

    Raises:
        ValueError: if the shapes differ.

    Source: Touvron et al., *Training Data-Efficient Image Transformers & Distillation through Attention*, ICML 2021,
    arXiv 2012.12877.
    """
    check_same_shape(student_logits, teacher_logits, SAME_CLASSES)
    return F.cross_entropy(student_logits, teacher_logits.argmax(dim=1))


def deit_soft(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 3.0,
) -> Float[Tensor, ""]:
    """DeiT's soft variant: :func:`kd` averaged over batch and classes, hence C times smaller.

    Args:
        student_logits: (batch, classes), any range.
        teacher_logits: (batch, classes), no gradient flows into it.
        temperature: T above 0.

    Returns:
        A scalar.

    Raises:
        ValueError: if T is not positive or the shapes differ.

    Source: Touvron et al., *Training Data-Efficient Image Transformers & Distillation through Attention*, ICML 2021,
    arXiv 2012.12877.
    """
    return kd(student_logits, teacher_logits, temperature=temperature, reduction="numel")


@full_precision
def dist(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 1.0,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    eps: float = 1e-8,
) -> Float[Tensor, ""]:
    r"""DIST: probabilities shall correlate with the teacher's, across classes per sample and across samples per class.

    .. math:: T^2 \bigl(\beta\,(1 - \overline{\rho}_{rows}) + \gamma\,(1 - \overline{\rho}_{columns})\bigr)

    with :math:`\rho` Pearson's correlation of :math:`\mathrm{softmax}(z / T)`. Couples the samples of a batch.

    Args:
        student_logits: (batch, classes), any range.
        teacher_logits: (batch, classes), no gradient flows into it.
        temperature: T above 0.
        inter_weight: the paper's beta, of the correlation across classes (rows).
        intra_weight: the paper's gamma, of the correlation across the batch (columns).
        eps: added to the product of norms; a class of constant probability counts as uncorrelated.

    Returns:
        A scalar between 0 (up to eps) and :math:`2 T^2 (\beta + \gamma)`.

    Raises:
        ValueError: if T is not positive or the shapes differ.

    Source: Huang et al., *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022, arXiv 2205.10536.
    """
    student, teacher = (part.exp() for part in _log_probabilities(student_logits, teacher_logits, temperature))
    inter = 1 - _pearson(student, teacher, dim=1, eps=eps).mean()
    intra = 1 - _pearson(student, teacher, dim=0, eps=eps).mean()
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


@full_precision
def standardise_logits(logits: Float[Tensor, "batch classes"], *, eps: float = 1e-7) -> Float[Tensor, "batch classes"]:
    r"""Give every row of logits mean 0 and (unbiased) standard deviation 1, before any logit loss, on both sides.

    .. math:: (z - \mathrm{mean}(z)) / (\epsilon + \mathrm{std}(z))

    Frees the student from matching the teacher's location and scale. Detaches nothing: the loss does.

    Args:
        logits: (batch, classes), at least two classes.
        eps: added to the standard deviation.

    Returns:
        The standardised logits, unchanged if a row is shifted or scaled by a positive number (up to eps).

    Raises:
        ValueError: if there is only one class.

    Source: Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024, arXiv 2403.01427.
    """
    if logits.shape[1] < 2:
        raise ValueError("standardise_logits needs at least 2 classes: one logit has no standard deviation")
    std, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / (eps + std)


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits, SAME_CLASSES)
    student = F.log_softmax(student_logits / temperature, dim=1)
    return student, F.log_softmax(teacher_logits.detach() / temperature, dim=1)


def _count(values: Tensor, reduction: Reduction) -> int:
    if reduction not in ("batchmean", "numel"):
        raise ValueError(f"reduction must be 'batchmean' or 'numel', got {reduction!r}")
    return len(values) if reduction == "batchmean" else values.numel()


def _pearson(first: Tensor, second: Tensor, dim: int, eps: float) -> Tensor:
    first = first - first.mean(dim, keepdim=True)
    second = second - second.mean(dim, keepdim=True)
    return (first * second).sum(dim) / (first.norm(dim=dim) * second.norm(dim=dim) + eps)

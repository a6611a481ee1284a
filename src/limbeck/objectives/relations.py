"""Objectives on relations between the samples of a batch: similarity-preserving, RKD, PKT. All couple the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.operands import check_same_batch, full_precision


@full_precision
def similarity_preserving(
    student_features: Float[Tensor, "batch *student_shape"],
    teacher_features: Float[Tensor, "batch *teacher_shape"],
) -> Float[Tensor, ""]:
    r"""Similarity-preserving distillation: inputs that are alike for the teacher shall be alike for the student.

    .. math:: \|G_s - G_t\|_F^2 / B^2

    with G the Gram matrix of the flattened features, every row scaled to unit length.

    Args:
        student_features: (batch, ...), any shape.
        teacher_features: (batch, ...), may have another shape; no gradient flows into it.

    Returns:
        A scalar, 0 where the similarities agree.

    Raises:
        ValueError: if the batches differ.

    Source: Tung, Mori, *Similarity-Preserving Knowledge Distillation*, ICCV 2019, arXiv 1907.09682.
    """
    check_same_batch(student_features, teacher_features)
    rows = (features.reshape(len(features), -1) for features in (student_features, teacher_features.detach()))
    student, teacher = (F.normalize(features @ features.mT, dim=1) for features in rows)
    return F.mse_loss(student, teacher)


@full_precision
def rkd_distance(
    student_features: Float[Tensor, "batch student_dim"],
    teacher_features: Float[Tensor, "batch teacher_dim"],
    *,
    squared: bool = False,
) -> Float[Tensor, ""]:
    r"""RKD's distance term: match all pairwise distances, each side in units of its own mean distance.

    .. math:: \frac{1}{B^2} \sum_{ij} \ell(d^s_{ij} / \overline{d^s} - d^t_{ij} / \overline{d^t})

    with :math:`\ell` the smooth L1 loss (beta 1). The student's mean is differentiated. Unchanged if the features of a
    side are shifted, rotated or scaled as a whole.

    Args:
        student_features: (batch, dim), at least two samples.
        teacher_features: (batch, dim), may have another dim; no gradient flows into it.
        squared: compare squared distances.

    Returns:
        A scalar, the mean over all ordered pairs, the diagonal included.

    Raises:
        ValueError: if the batches differ or hold fewer than two samples.

    Source: Park et al., *Relational Knowledge Distillation*, CVPR 2019, arXiv 1904.05068.
    """
    check_same_batch(student_features, teacher_features, at_least=2)
    student, teacher = _relative_distances(student_features, squared), _relative_distances(teacher_features, squared)
    return F.smooth_l1_loss(student, teacher.detach())


@full_precision
def rkd_angle(
    student_features: Float[Tensor, "batch student_dim"],
    teacher_features: Float[Tensor, "batch teacher_dim"],
) -> Float[Tensor, ""]:
    r"""RKD's angle term: match the cosine of every angle that two samples span at a third.

    .. math:: \frac{1}{B^3} \sum_{ijk} \ell(\cos^s_{ijk} - \cos^t_{ijk}), \qquad
        \cos_{ijk} = \langle e_{ij}, e_{ik} \rangle, \quad e_{ij} = (x_j - x_i) / \|x_j - x_i\|

    with :math:`\ell` the smooth L1 loss (beta 1). Needs memory for :math:`B^2 (B + dim)` numbers.

    Args:
        student_features: (batch, dim).
        teacher_features: (batch, dim), may have another dim; no gradient flows into it.

    Returns:
        A scalar, the mean over all triples.

    Raises:
        ValueError: if the batches differ.

    Source: Park et al., *Relational Knowledge Distillation*, CVPR 2019, arXiv 1904.05068.
    """
    check_same_batch(student_features, teacher_features)
    return F.smooth_l1_loss(_angles(student_features), _angles(teacher_features.detach()))


@full_precision
def rkd(
    student_features: Float[Tensor, "batch student_dim"],
    teacher_features: Float[Tensor, "batch teacher_dim"],
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
) -> Float[Tensor, ""]:
    """Relational distillation: the weighted sum of :func:`rkd_distance` and :func:`rkd_angle`.

    Args:
        student_features: (batch, dim), at least two samples.
        teacher_features: (batch, dim), may have another dim; no gradient flows into it.
        distance_weight: of the distance term; 0 leaves it out.
        angle_weight: of the angle term; 0 leaves it out, and with it the cost of all triples.
        squared: compare squared distances.

    Returns:
        A scalar.

    Raises:
        ValueError: if the batches differ or hold fewer than two samples.

    Source: Park et al., *Relational Knowledge Distillation*, CVPR 2019, arXiv 1904.05068.
    """
    check_same_batch(student_features, teacher_features, at_least=2)
    loss = student_features.sum() * 0.0  # keeps the graph when both weights are 0
    if distance_weight:
        loss = loss + distance_weight * rkd_distance(student_features, teacher_features, squared=squared)
    if angle_weight:
        loss = loss + angle_weight * rkd_angle(student_features, teacher_features)
    return loss


@full_precision
def pkt(
    student_features: Float[Tensor, "batch student_dim"],
    teacher_features: Float[Tensor, "batch teacher_dim"],
    *,
    eps: float = 1e-7,
) -> Float[Tensor, ""]:
    r"""Probabilistic knowledge transfer: match, for every sample, the distribution of its likeness to all samples.

    .. math:: \frac{1}{B^2} \sum_{ij} t_{ij} \log \frac{t_{ij} + \epsilon}{s_{ij} + \epsilon}

    with each row of s and t the cosine similarities moved to [0, 1] and divided by their sum.

    Args:
        student_features: (batch, dim).
        teacher_features: (batch, dim), may have another dim; no gradient flows into it.
        eps: added to norms and inside the logarithm.

    Returns:
        A scalar, 0 where the distributions agree.

    Raises:
        ValueError: if the batches differ.

    Source: Passalis, Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*, ECCV 2018,
    arXiv 1803.10837.
    """
    check_same_batch(student_features, teacher_features)
    student, teacher = _likeness(student_features, eps), _likeness(teacher_features.detach(), eps)
    return (teacher * ((teacher + eps) / (student + eps)).log()).mean()


def _relative_distances(features: Tensor, squared: bool) -> Tensor:
    # Differences, not |a|^2 + |b|^2 - 2ab, which loses the distances between close samples. The floor keeps the
    # root's gradient finite for samples that coincide.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").clamp_min(1e-6)
    distances = distances.square() if squared else distances
    distances = distances.masked_fill(torch.eye(len(features), dtype=torch.bool, device=features.device), 0.0)
    # Above the floor, every entry off the diagonal is positive: no data-dependent selection, no device sync.
    return distances * (len(features) * (len(features) - 1)) / distances.sum()


def _angles(features: Tensor) -> Tensor:
    directions = F.normalize(features[None, :] - features[:, None], dim=2)
    return directions @ directions.mT


def _likeness(features: Tensor, eps: float) -> Tensor:
    features = features / (features.norm(dim=1, keepdim=True) + eps)
    similarity = (features @ features.mT + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)

"""Objectives that compare how channels respond, as sets or in pairs: NST and ICKD."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.operands import check_same_batch, full_precision, pool_to_smaller


@full_precision
def nst(
    student_features: Float[Tensor, "batch student_channels student_height student_width"],
    teacher_features: Float[Tensor, "batch teacher_channels teacher_height teacher_width"],
) -> Float[Tensor, ""]:
    r"""Neuron selectivity transfer: make the set of the student's channel maps look like the teacher's.

    .. math:: k(s, s) + k(t, t) - 2\,k(s, t), \qquad k(a, b) = \mathrm{mean}_{b,i,j} \langle a_i, b_j \rangle^2

    the squared maximum mean discrepancy, under a polynomial kernel, of channel maps of unit length.

    Args:
        student_features: (batch, channels, height, width).
        teacher_features: the same batch; other channels and sizes are allowed (the larger map is average-pooled).

    Returns:
        A scalar, 0 where the sets of maps agree in any order.

    Raises:
        ValueError: if the batches differ.

    Source: Huang, Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017,
    arXiv 1707.01219.
    """
    check_same_batch(student_features, teacher_features)
    student, teacher = (
        F.normalize(features.flatten(2), dim=2)
        for features in pool_to_smaller(student_features, teacher_features.detach())
    )
    return _kernel(student, student) + _kernel(teacher, teacher) - 2 * _kernel(student, teacher)


@full_precision
def ickd(
    student_features: Float[Tensor, "batch channels *student_positions"],
    teacher_features: Float[Tensor, "batch channels *teacher_positions"],
) -> Float[Tensor, ""]:
    r"""Inter-channel correlation: match which channels fire together within each sample.

    .. math:: \frac{1}{B C} \sum_b \|G_s - G_t\|_F^2

    with G the Gram matrix (channels, channels) of a sample's flattened map, every row scaled to unit length.

    Args:
        student_features: (batch, channels, ...), already projected to the teacher's channels.
        teacher_features: the same batch and channels; the number of positions may differ.

    Returns:
        A scalar, 0 where the correlations agree.

    Raises:
        ValueError: if the batches or the numbers of channels differ.

    Source: Liu et al., *Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation*, ICCV 2021,
    arXiv 2202.03680.
    """
    check_same_batch(student_features, teacher_features)
    if student_features.shape[1] != teacher_features.shape[1]:
        raise ValueError(
            f"student has {student_features.shape[1]} channels, teacher {teacher_features.shape[1]}: "
            "put a projection to the teacher's channels behind the student's features"
        )
    student, teacher = _correlations(student_features), _correlations(teacher_features.detach())
    return (student - teacher).square().sum() / (len(student) * student.shape[1])


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.mT).square().mean()


def _correlations(features: Tensor) -> Tensor:
    maps = features.reshape(*features.shape[:2], -1)
    return F.normalize(maps @ maps.mT, dim=2)

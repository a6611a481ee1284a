"""Objectives that compare feature maps position by position: hints, SquareHead, attention, OFD, ReviewKD, VID."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.operands import check_same_batch, check_same_shape, full_precision, pool_to_smaller

CONNECT = "put a connector (projection, resize) behind the student's features"


@full_precision
def hint(
    student_features: Float[Tensor, "*shape"],
    teacher_features: Float[Tensor, "*shape"],
) -> Float[Tensor, ""]:
    """FitNets' hint: the squared error to the teacher's features, averaged over all their entries.

    Args:
        student_features: any shape, already brought to the teacher's by a connector.
        teacher_features: the same shape, no gradient flows into it.

    Returns:
        A scalar, 0 where the features agree.

    Raises:
        ValueError: if the shapes differ.

    Source: Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015, arXiv 1412.6550.
    """
    check_same_shape(student_features, teacher_features, CONNECT)
    return F.mse_loss(student_features, teacher_features.detach())


@full_precision
def square_head(
    student_state: Float[Tensor, "tokens width"],
    teacher_state: Float[Tensor, "tokens width"],
    *,
    eps: float = 2.0**-7,
    teacher_square: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    r"""SquareHead's term of one layer: the squared error in units of the teacher's own size, whatever that is.

    .. math:: \frac{\mathrm{mean}\,(f_s - f_t)^2}{\mathrm{mean}\,f_t^2 + \epsilon}

    Args:
        student_state: of the tokens that count.
        teacher_state: of the same tokens, no gradient flows into it.
        eps: at least 0; the default is the machine epsilon of bfloat16.
        teacher_square: mean of the squared teacher's states, where these tokens are but a part of the batch.

    Returns:
        A scalar; 0 where the states agree, nearly 1 where the student's are 0. 0 without tokens.

    Raises:
        ValueError: if the shapes differ.

    Source: Kurtic et al., *Sparse Fine-tuning for Inference Acceleration of Large Language Models*, 2023, arXiv
    2310.06927.
    """
    check_same_shape(student_state, teacher_state, "SquareHead needs a student with the teacher's width")
    teacher = teacher_state.detach()
    count = max(1, teacher.numel())
    square = teacher.square().sum() / count if teacher_square is None else teacher_square
    return (student_state - teacher).square().sum() / count / (square + eps)


@full_precision
def attention_transfer(
    student_features: Float[Tensor, "batch student_channels student_height student_width"],
    teacher_features: Float[Tensor, "batch teacher_channels teacher_height teacher_width"],
    *,
    power: int = 2,
) -> Float[Tensor, ""]:
    r"""Attention transfer: match where the two networks are active, whatever their channels.

    .. math:: \mathrm{mean}\,(Q_s - Q_t)^2, \qquad Q = \mathrm{vec}(\overline{F^p}) / \|\mathrm{vec}(\overline{F^p})\|

    with the bar a mean over channels. The powers keep their sign when p is odd.

    Args:
        student_features: (batch, channels, height, width).
        teacher_features: the same batch; other channels and sizes are allowed (the larger map is average-pooled).
        power: p, at least 1.

    Returns:
        A scalar, the mean over batch and positions; 0 where the maps are proportional.

    Raises:
        ValueError: if p is below 1 or the batches differ.

    Source: Zagoruyko, Komodakis, *Paying More Attention to Attention: Improving the Performance of Convolutional Neural
    Networks via Attention Transfer*, ICLR 2017, arXiv 1612.03928.
    """
    check_same_batch(student_features, teacher_features)
    if power < 1:
        raise ValueError(f"power must be at least 1, got {power}: 2 is the paper's")
    student, teacher = (
        F.normalize(features.pow(power).mean(dim=1).flatten(1), dim=1)
        for features in pool_to_smaller(student_features, teacher_features.detach())
    )
    return F.mse_loss(student, teacher)


@full_precision
def ofd_margin(
    weight: Float[Tensor, "channels"],
    bias: Float[Tensor, "channels"],
) -> Float[Tensor, "channels"]:
    r"""The margin of each channel for :func:`partial_l2`: the mean of its negative pre-activations.

    The teacher's last batch norm makes a channel about :math:`N(\mu, \sigma^2)`, with its bias and weight as mean and
    (up to sign) standard deviation, so that

    .. math:: E[x \mid x < 0] = \mu - \sigma\,\varphi(\mu/\sigma) / \Phi(-\mu/\sigma).

    Args:
        weight: (channels), the batch norm's scale, any sign.
        bias: (channels), the batch norm's shift.

    Returns:
        (channels), never positive, without gradient.

    Source: Heo et al., *A Comprehensive Overhaul of Feature Distillation*, ICCV 2019, arXiv 1904.01866.
    """
    mean, std = bias.detach(), weight.detach().abs()
    # The ratio of density and tail written with erfcx neither underflows nor divides 0 by 0 far out in the tail; beyond
    # 1e4 standard deviations the margin is 0 to float32's precision, which the last clamp makes exact.
    distance = (mean / std.clamp_min(torch.finfo(std.dtype).tiny)).clamp(-1e4, 1e4)
    ratio = math.sqrt(2 / math.pi) / torch.special.erfcx(distance / math.sqrt(2))
    return (mean - std * ratio).clamp_max(0)


@full_precision
def partial_l2(
    student_features: Float[Tensor, "batch channels height width"],
    teacher_features: Float[Tensor, "batch channels height width"],
    margin: Float[Tensor, "channels"],
) -> Float[Tensor, ""]:
    r"""OFD's distance: squared error, except where both sides are already inactive.

    .. math:: \frac1B \sum (F_s - t)^2 \,[t > 0 \text{ or } F_s > t], \qquad t = \max(F_t, margin)

    Args:
        student_features: (batch, channels, height, width), before the ReLU and behind the connector.
        teacher_features: the same shape, before the ReLU; no gradient flows into it.
        margin: (channels), not positive, see :func:`ofd_margin`.

    Returns:
        A scalar, summed over channels and positions and averaged over the batch.

    Raises:
        ValueError: if the shapes differ or the margin has another number of channels.

    Source: Heo et al., *A Comprehensive Overhaul of Feature Distillation*, ICCV 2019, arXiv 1904.01866.
    """
    check_same_shape(student_features, teacher_features, CONNECT)
    if margin.shape != teacher_features.shape[1:2]:
        raise ValueError(f"margin {tuple(margin.shape)} must hold one number for each of the teacher's channels")
    target = torch.maximum(teacher_features, margin[:, None, None]).detach()
    active = (target > 0) | (student_features > target)
    return ((student_features - target).square() * active).sum() / len(target)


@full_precision
def hierarchical_context_loss(
    student_features: Float[Tensor, "batch channels height width"],
    teacher_features: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, ""]:
    """ReviewKD's HCL: squared error at full resolution and at ever coarser average pools.

    Weight 1 at full resolution; then pools of side 4, 2 and 1, as far as they are smaller than the map, with weights
    1/2, 1/4, 1/8 in the order used; divided by the sum of the weights.

    Args:
        student_features: (batch, channels, height, width), already fused and projected to the teacher's shape.
        teacher_features: the same shape, no gradient flows into it.

    Returns:
        A scalar, the weighted mean of mean squared errors.

    Raises:
        ValueError: if the shapes differ.

    Source: Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021, arXiv 2104.09044.
    """
    check_same_shape(student_features, teacher_features, CONNECT)
    difference = student_features - teacher_features.detach()  # pooling is linear: the difference can be pooled
    loss, weight, total = difference.square().mean(), 1.0, 1.0
    for side in (side for side in (4, 2, 1) if side < difference.shape[2]):
        weight /= 2
        loss = loss + weight * F.adaptive_avg_pool2d(difference, side).square().mean()
        total += weight
    return loss / total


@full_precision
def vid(
    student_mean: Float[Tensor, "batch channels *positions"],
    teacher_features: Float[Tensor, "batch channels *positions"],
    log_scale: Float[Tensor, "channels"],
    *,
    eps: float = 1e-5,
) -> Float[Tensor, ""]:
    r"""VID: how unlikely the teacher's features are under a Gaussian that the student predicts.

    .. math:: \mathrm{mean}\,\tfrac12\bigl((\mu - F_t)^2 / v_c + \log v_c\bigr), \qquad
        v_c = \mathrm{softplus}(s_c) + \epsilon

    A bound on the mutual information of the two features, up to a constant. Connector and scale are trained.

    Args:
        student_mean: (batch, channels, ...), the connector's prediction of the teacher's features.
        teacher_features: the same shape, no gradient flows into it.
        log_scale: (channels), the s of each channel's variance v, trained; see :func:`vid_log_scale`.
        eps: the least variance.

    Returns:
        A scalar, the mean over all entries; negative where the fit is good.

    Raises:
        ValueError: if the shapes differ or the scale has another number of channels.

    Source: Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019, arXiv 1904.05835.
    """
    check_same_shape(student_mean, teacher_features, CONNECT)
    if log_scale.shape != student_mean.shape[1:2]:
        raise ValueError(f"log_scale {tuple(log_scale.shape)} must hold one number for each of the teacher's channels")
    variance = (F.softplus(log_scale) + eps).reshape(-1, *[1] * (student_mean.ndim - 2))
    error = (student_mean - teacher_features.detach()).square()
    return (0.5 * (error / variance + variance.log())).mean()


def vid_log_scale(variance: float = 5.0, *, eps: float = 1e-5) -> float:
    """The log scale at which :func:`vid` starts with a given variance.

    Args:
        variance: above eps, in squared units of the teacher's features.
        eps: as in :func:`vid`.

    Returns:
        The s with softplus(s) + eps = variance.

    Raises:
        ValueError: if the variance is not above eps.

    Source: Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019, arXiv 1904.05835.
    """
    if not variance > eps:
        raise ValueError(f"variance must be above eps = {eps}, got {variance}: 5 is the customary start")
    excess = variance - eps
    return excess + math.log(-math.expm1(-excess))  # log(exp(x) - 1) without overflow

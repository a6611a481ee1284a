"""How alike two networks look at one batch: class-channel maps, their semantic difference, and RMI. All couple the
batch."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.objectives.channels import ickd
from limbeck.objectives.operands import check_same_batch, full_precision
from limbeck.objectives.similarity import linear_cka

Axis = Literal["channel", "class"]
"""Which Gram matrices of a class-channel map are compared: of the channels, class by class; or of the classes."""


@full_precision
def class_channel_map(
    logits: Float[Tensor, "items classes"],
    inputs: Float[Tensor, "items channels"],
    label: Int[Tensor, "items"],
) -> Float[Tensor, "classes channels"]:
    r"""How much each channel has to do with each class: the gradient of the cross-entropy on a classifier's weight.

    .. math:: w = \frac{\partial\,\mathrm{CE}}{\partial W} = \frac1B \sum_b (p_b - y_b)\, f_b^\top

    for logits :math:`z = W f + c`; a Grad-CAM that is summed over the batch. It is written out, and so needs no
    backward pass and can itself be differentiated.

    Args:
        logits: (items, classes) of a linear classifier.
        inputs: (items, channels), what that classifier receives.
        label: (items,) classes; -100 where an item has none, which then adds nothing.

    Returns:
        (classes, channels), the mean over labelled items; zeros where there are none.

    Raises:
        ValueError: if the items differ in number.

    Source: Dong et al., *DisWOT: Student Architecture Search for Distillation WithOut Training*, CVPR 2023,
    arXiv 2303.15678.
    """
    check_same_batch(logits, inputs)
    known = label >= 0
    target = F.one_hot(label.clamp_min(0), logits.shape[1]).to(logits.dtype)
    error = (logits.softmax(1) - target) * known[:, None]
    return error.mT @ inputs / known.sum().clamp_min(1)


@full_precision
def semantic_difference(
    student_map: Float[Tensor, "classes student_channels"],
    teacher_map: Float[Tensor, "classes teacher_channels"],
    *,
    axis: Axis = "channel",
) -> Float[Tensor, ""]:
    r"""How differently two networks assign channels to classes, given their class-channel maps w.

    .. math:: \frac{1}{K C} \sum_k \|G_{s,k} - G_{t,k}\|_F^2, \qquad G_k = \mathrm{rows}(w_k w_k^\top)

    with every row of the Gram matrix (channels, channels) scaled to unit length. Each has rank one: its row i is
    :math:`\pm w_k / \|w_k\|` with the sign of :math:`w_{ki}`, so that the sum is found without forming it,

    .. math:: \|G_s - G_t\|_F^2 = 2 C - 2\,\langle \mathrm{sign}\,w_s, \mathrm{sign}\,w_t \rangle
        \langle w_s / \|w_s\|, w_t / \|w_t\| \rangle

    (rows of zeros count nothing). Unchanged if a whole map is scaled. `axis="class"`, an extension of this library,
    compares the Gram matrices (classes, classes) of the maps, which need no equal number of channels.

    Args:
        student_map: (classes, channels).
        teacher_map: (classes, channels), the same classes, and for "channel" as many channels; no gradient flows into
            it.
        axis: "channel" is the paper's.

    Returns:
        A scalar, 0 where the maps agree up to a positive factor; 4 at most.

    Raises:
        ValueError: if the classes differ, or the channels for "channel".

    Source: Dong et al., *DisWOT: Student Architecture Search for Distillation WithOut Training*, CVPR 2023,
    arXiv 2303.15678.
    """
    if len(student_map) != len(teacher_map):
        raise ValueError(f"student tells {len(student_map)} classes apart, teacher {len(teacher_map)}")
    if axis == "class":
        return ickd(_unit_scale(student_map)[None], _unit_scale(teacher_map)[None])
    if student_map.shape != teacher_map.shape:
        raise ValueError(
            f"student has {student_map.shape[1]} channels, teacher {teacher_map.shape[1]}: "
            "compare the classes instead (axis 'class')"
        )
    teacher_map = teacher_map.detach()
    student, teacher = (F.normalize(_unit_scale(one), dim=1) for one in (student_map, teacher_map))
    signs = (student.sign() * teacher.sign()).sum(1)
    rows = ((one != 0).sum(1) * one.square().sum(1) for one in (student, teacher))
    return (sum(rows, start=-2 * signs * (student * teacher).sum(1)) / student.shape[1]).mean()


def rmi(
    student_features: Sequence[Float[Tensor, "batch ..."]],
    teacher_features: Sequence[Float[Tensor, "batch ..."]],
) -> Float[Tensor, ""]:
    r"""Representation mutual information: how far the stages of two networks are from being rotations of each other.

    .. math:: n - \sum_{l=1}^{n} \mathrm{CKA}(F_s^l, F_t^l)

    with the linear, biased alignment of the flattened features; n = 3 in the paper.

    Args:
        student_features: one tensor (batch, ...) a stage.
        teacher_features: equally many, the same batch; shapes may differ, no gradient flows into them.

    Returns:
        A scalar in [0, n], 0 where every stage agrees up to rotation, shift and scale.

    Raises:
        ValueError: if the numbers of stages or the batches differ.

    Source: Dong et al., *DisWOT: Student Architecture Search for Distillation WithOut Training*, CVPR 2023,
    arXiv 2303.15678.
    """
    if not student_features or len(student_features) != len(teacher_features):
        raise ValueError(f"{len(student_features)} stages cannot be compared with {len(teacher_features)}")
    pairs = zip(student_features, teacher_features, strict=True)
    return torch.stack([1 - linear_cka(one.flatten(1), other.flatten(1)) for one, other in pairs]).sum()


def _unit_scale(values: Tensor) -> Tensor:
    """Divided by the largest entry, so that the floor of a later normalisation is never reached by small gradients."""
    return values / values.detach().abs().max().clamp_min(torch.finfo(values.dtype).tiny)

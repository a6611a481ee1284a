"""OFA's objective: soft labels that lean further towards the label, the surer the teacher is of it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.objectives.operands import check_same_shape, check_temperature, full_precision


@full_precision
def target_enhanced(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    *,
    power: float = 1.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Cross-entropy with the teacher's probabilities, the label's raised and all others lowered by a power.

    .. math:: -\frac1B \sum_{b,c} \bigl((p_{t,c} + [c = y])^\epsilon - [c = y]\bigr) \log p_{s,c}

    with :math:`p = \mathrm{softmax}(z / T)`. At :math:`\epsilon = 1` it is the plain soft cross-entropy; above, the
    label's weight :math:`(1 + p_{t,y})^\epsilon - 1` exceeds :math:`p_{t,y}`. There is no factor :math:`T^2`.

    Args:
        student_logits: (batch, classes), any range, of the student or of one of its exits.
        teacher_logits: (batch, classes), no gradient flows into it.
        labels: class indices (batch), or soft labels (batch, classes) of which the largest is taken.
        power: the paper's epsilon, above 0.
        temperature: T above 0.

    Returns:
        A scalar; not 0 where both sides agree.

    Raises:
        ValueError: if the power or T is not positive or the shapes differ.

    Source: Hao et al., *One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation*,
    NeurIPS 2023, arXiv 2310.19444.
    """
    check_temperature(temperature)
    check_same_shape(student_logits, teacher_logits, "compare logits of one batch over the same classes")
    if not power > 0:
        raise ValueError(f"power must be above 0, got {power}: 1 leaves the teacher's probabilities as they are")
    target = labels.argmax(dim=1) if labels.ndim == 2 else labels.long()
    label = F.one_hot(target, student_logits.shape[1]).to(student_logits.dtype)
    probabilities = torch.softmax(teacher_logits.detach() / temperature, dim=1)
    weights = (probabilities + label) ** power - label
    return -(weights * F.log_softmax(student_logits / temperature, dim=1)).sum(dim=1).mean()

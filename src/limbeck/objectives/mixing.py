"""Matching of sequence mixers layer by layer: their matrices over the tokens, and what comes out of them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from limbeck.objectives.operands import check_same_shape, full_precision

Matrices = Float[Tensor, "batch heads length length"]
Mask = Bool[Tensor, "batch length"]


@full_precision
def matrix_distance(student: Matrices, teacher: Matrices, mask: Mask | None = None) -> Float[Tensor, ""]:
    r"""MOHAWK's first stage: the Frobenius norm of the difference of two mixing matrices.

    .. math:: \frac{1}{BH} \sum_{b,h} \lVert T_{bh} - A_{bh} \rVert_F

    The norm is not squared; its gradient at 0 is 0.

    Args:
        student: row i holds what output i takes from each token.
        teacher: an attention's matrices behind the softmax; no gradient flows into them.
        mask: true at tokens; rows and columns of padding do not count.

    Returns:
        The mean over sequences and heads, 0 where the matrices agree.

    Raises:
        ValueError: if the shapes differ.

    Source: Bick et al., *Transformers to SSMs*, NeurIPS 2024, arXiv 2408.10189, section 4.1.
    """
    check_same_shape(student, teacher, "give the mixer as many heads as the attention has")
    difference = student - teacher.detach()
    if mask is not None:
        difference = difference.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), 0.0)
    return torch.linalg.vector_norm(difference, dim=(-2, -1)).mean()


@full_precision
def output_distance(
    student: Float[Tensor, "batch length width"], teacher: Float[Tensor, "batch length width"], mask: Mask | None = None
) -> Float[Tensor, ""]:
    r"""MOHAWK's second stage: the Euclidean distance of a token's two outputs.

    .. math:: \frac{1}{|M|} \sum_{i \in M} \lVert s_i - t_i \rVert_2

    with :math:`M` the tokens. The norm is not squared; its gradient at 0 is 0.

    Args:
        student: what its mixer, or its block, makes of the teacher's hidden states.
        teacher: what the teacher makes of them; no gradient flows into it.
        mask: true at tokens.

    Returns:
        The mean over tokens, 0 where the outputs agree, and where there are no tokens.

    Raises:
        ValueError: if the shapes differ.

    Source: Bick et al., *Transformers to SSMs*, NeurIPS 2024, arXiv 2408.10189, section 4.2.
    """
    check_same_shape(student, teacher, "the mixer keeps the width of the block that it is part of")
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    distances = torch.linalg.vector_norm(student - teacher.detach(), dim=-1)
    return distances.sum() / max(1, distances.numel())

"""Contrastive representation distillation as pure functions: draw, score, compare, update. The banks live elsewhere."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.objectives.operands import check_temperature, full_precision

NCE_EPS = 1e-7


@full_precision
def crd(
    student_embedding: Float[Tensor, "batch dim"],
    teacher_embedding: Float[Tensor, "batch dim"],
    student_bank: Float[Tensor, "samples dim"],
    teacher_bank: Float[Tensor, "samples dim"],
    indices: Int[Tensor, "batch pairs"],
    *,
    student_normaliser: Float[Tensor, ""],
    teacher_normaliser: Float[Tensor, ""],
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """CRD: tell the other network's memory of the same sample from its memories of other samples, on both sides.

    The sum of :func:`nce` for the student's scores against the teacher's bank and the teacher's against the student's.
    The teacher's embedding is trained too, so it is the caller who detaches the teacher's features before embedding.

    Args:
        student_embedding: (batch, dim), unit length.
        teacher_embedding: (batch, dim), unit length; it does receive a gradient.
        student_bank: (samples, dim), one remembered embedding of each training sample; no gradient.
        teacher_bank: (samples, dim); no gradient.
        indices: (batch, 1 + negatives), rows of the banks, the sample's own first.
        student_normaliser: scalar Z of the student's scores, see :func:`crd_normaliser`.
        teacher_normaliser: scalar Z of the teacher's scores.
        temperature: above 0.

    Returns:
        A scalar, the mean over the batch of both sides' losses.

    Raises:
        ValueError: if the temperature is not positive, the banks differ in shape or there is no negative.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    if student_bank.shape != teacher_bank.shape:
        raise ValueError("the two banks differ in shape: make both with one number of samples and one dimension")
    student = crd_scores(student_embedding, teacher_bank, indices, temperature=temperature) / student_normaliser
    teacher = crd_scores(teacher_embedding, student_bank, indices, temperature=temperature) / teacher_normaliser
    return nce(student, samples=len(teacher_bank)) + nce(teacher, samples=len(student_bank))


@full_precision
def crd_scores(
    embedding: Float[Tensor, "batch dim"],
    bank: Float[Tensor, "samples dim"],
    indices: Int[Tensor, "batch pairs"],
    *,
    temperature: float = 0.07,
) -> Float[Tensor, "batch pairs"]:
    r"""Unnormalised scores of embeddings against remembered embeddings of the other network.

    .. math:: \exp(\langle v_b, m_{i} \rangle / \tau)

    Args:
        embedding: (batch, dim), unit length.
        bank: (samples, dim), the other network's memory; no gradient flows into it.
        indices: (batch, 1 + negatives), rows of the bank.
        temperature: tau, above 0.

    Returns:
        (batch, 1 + negatives), positive; divide by :func:`crd_normaliser` before :func:`nce`.

    Raises:
        ValueError: if the temperature is not positive or the dimensions or batches differ.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    check_temperature(temperature)
    if embedding.shape[1] != bank.shape[1] or len(embedding) != len(indices):
        raise ValueError(
            f"embedding {tuple(embedding.shape)}, bank {tuple(bank.shape)} and indices {tuple(indices.shape)} do not "
            "fit: they must be (batch, dim), (samples, dim) and (batch, 1 + negatives)"
        )
    if len(bank) <= indices.shape[1]:  # fewer rows than pairs: one product with the whole bank, then look-ups
        products = (embedding @ bank.detach().mT).gather(1, indices.long())
    else:
        products = torch.einsum("bd,bpd->bp", embedding, F.embedding(indices, bank.detach()))
    return products.div(temperature).exp()


@full_precision
def crd_normaliser(scores: Float[Tensor, "batch pairs"], *, samples: int) -> Float[Tensor, ""]:
    """The constant Z of a side, estimated on the first batch and kept from then on.

    Args:
        scores: (batch, 1 + negatives), unnormalised scores of the first batch.
        samples: the number of rows of a bank.

    Returns:
        A scalar, mean score times samples, without gradient.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    return scores.detach().mean() * samples


@full_precision
def nce(scores: Float[Tensor, "batch pairs"], *, samples: int) -> Float[Tensor, ""]:
    r"""Noise-contrastive loss of one positive (first column) among K negatives drawn uniformly from n samples.

    .. math:: -\frac1B \sum_b \Bigl( \log \frac{P_0}{P_0 + K/n + \epsilon}
        + \sum_{k \ge 1} \log \frac{K/n}{P_k + K/n + \epsilon} \Bigr)

    Args:
        scores: (batch, 1 + negatives), positive, normalised to be about probabilities of the n samples.
        samples: n, the number of rows of a bank.

    Returns:
        A scalar.

    Raises:
        ValueError: if there is no negative.

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    negatives = scores.shape[1] - 1
    if negatives < 1:
        raise ValueError("nce needs at least one negative: pass scores of shape (batch, 1 + negatives)")
    noise = negatives / samples
    log_total = (scores + noise + NCE_EPS).log()
    return (log_total.sum() - scores[:, 0].log().sum()) / len(scores) - negatives * math.log(noise)


@full_precision
def moved_entries(
    entries: Float[Tensor, "batch dim"],
    embedding: Float[Tensor, "batch dim"],
    *,
    momentum: float = 0.5,
) -> Float[Tensor, "batch dim"]:
    r"""Move remembered embeddings towards new ones: the normalised mean :math:`m\,e + (1 - m)\,v`.

    Args:
        entries: (batch, dim), what the bank holds of these samples.
        embedding: (batch, dim), their new embeddings, of the bank's own side.
        momentum: m in [0, 1]; 0 replaces, 1 keeps.

    Returns:
        (batch, dim), unit length, without gradient.

    Raises:
        ValueError: if the momentum is outside [0, 1].

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}: 0.5 is the paper's")
    return F.normalize(momentum * entries.detach() + (1 - momentum) * embedding.detach(), dim=1)


@full_precision
def update_bank(
    bank: Float[Tensor, "samples dim"],
    embedding: Float[Tensor, "batch dim"],
    sample_indices: Int[Tensor, "batch"],
    *,
    momentum: float = 0.5,
) -> Float[Tensor, "samples dim"]:
    """The bank after a batch: :func:`moved_entries` at the batch's own rows, all others as they were.

    Copies the bank; to update a large one in place, write :func:`moved_entries` with ``index_copy_``.

    Args:
        bank: (samples, dim), left unchanged.
        embedding: (batch, dim), new embeddings of the bank's own side.
        sample_indices: (batch), which rows; no row twice.
        momentum: in [0, 1].

    Returns:
        (samples, dim), without gradient.

    Raises:
        ValueError: if the momentum is outside [0, 1].

    Source: Tian, Krishnan, Isola, *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.
    """
    moved = moved_entries(bank[sample_indices.long()], embedding, momentum=momentum)
    return bank.detach().index_copy(0, sample_indices.long(), moved.to(bank.dtype))

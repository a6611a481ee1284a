"""How alike two representations of the same samples are: centred kernel alignment, exact, debiased, in batches."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from limbeck.objectives.operands import check_same_batch, full_precision


@full_precision
def cka(
    student_gram: Float[Tensor, "samples samples"],
    teacher_gram: Float[Tensor, "samples samples"],
    *,
    debiased: bool = False,
) -> Float[Tensor, ""]:
    r"""Centred kernel alignment of two Gram matrices: the cosine between them after centring.

    .. math:: \langle HKH, HLH \rangle_F / (\|HKH\|_F \|HLH\|_F)

    The debiased form centres without the diagonal, so that few samples of many dimensions do not look alike by chance.

    Args:
        student_gram: (samples, samples), symmetric.
        teacher_gram: (samples, samples), symmetric; no gradient flows into it.
        debiased: use the unbiased estimate of the Hilbert-Schmidt criterion; needs at least four samples.

    Returns:
        A scalar in [0, 1], in [-1, 1] if debiased; 1 for proportional kernels. Meaningless but finite where a side is
        constant: 0, or what rounding leaves.

    Raises:
        ValueError: if the numbers of samples differ or are too few.

    Source: Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019, arXiv 1905.00414.
    """
    _check(student_gram, teacher_gram, debiased)
    centre = _centre_without_diagonal if debiased else _centre
    student, teacher = centre(student_gram).flatten(), centre(teacher_gram.detach()).flatten()
    return (_unit(student) * _unit(teacher)).sum()


@full_precision
def linear_cka(
    student_features: Float[Tensor, "samples student_dim"],
    teacher_features: Float[Tensor, "samples teacher_dim"],
    *,
    debiased: bool = False,
) -> Float[Tensor, ""]:
    r"""Centred kernel alignment of linear kernels: how far one set of features is a rotation of the other.

    .. math:: \|X^T Y\|_F^2 / (\|X^T X\|_F \|Y^T Y\|_F)

    with X and Y centred over the samples. Unchanged by rotations, shifts and a common scale of either side.

    Args:
        student_features: (samples, dim).
        teacher_features: (samples, dim), may have another dim; no gradient flows into it.
        debiased: see :func:`cka`.

    Returns:
        A scalar, see :func:`cka`.

    Raises:
        ValueError: if the numbers of samples differ or are too few.

    Source: Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019, arXiv 1905.00414.
    """
    _check(student_features, teacher_features, debiased)
    student, teacher = _centre_samples(student_features), _centre_samples(teacher_features.detach())
    if debiased or max(student.shape[1], teacher.shape[1]) > len(student):
        return cka(student @ student.mT, teacher @ teacher.mT, debiased=debiased)
    student, teacher = _scale(student), _scale(teacher)  # keeps the fourth powers below within range
    norms = (student.mT @ student).norm() * (teacher.mT @ teacher).norm()
    return (student.mT @ teacher).square().sum() / norms.clamp_min(torch.finfo(norms.dtype).tiny)


@full_precision
def rbf_cka(
    student_features: Float[Tensor, "samples student_dim"],
    teacher_features: Float[Tensor, "samples teacher_dim"],
    *,
    threshold: float | None = None,
    debiased: bool = False,
) -> Float[Tensor, ""]:
    r"""Centred kernel alignment of Gaussian kernels, which look at neighbourhoods rather than at main directions.

    .. math:: K_{ij} = \exp(-d_{ij}^2 / (2 \sigma^2))

    with the width of each side from its own distances, held constant in the gradient.

    Args:
        student_features: (samples, dim).
        teacher_features: (samples, dim), may have another dim; no gradient flows into it.
        threshold: if given, :math:`\sigma^2` is its square times the median of all squared distances, the zeros of the
            diagonal counted; without it, the median of the squared distances that are not zero.
        debiased: see :func:`cka`.

    Returns:
        A scalar, see :func:`cka`.

    Raises:
        ValueError: if the numbers of samples differ or are too few, or the threshold is not positive.

    Source: Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019, arXiv 1905.00414.
    """
    _check(student_features, teacher_features, debiased)
    if threshold is not None and not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}: leave it out for the median of the distances")
    student, teacher = _gaussian_gram(student_features, threshold), _gaussian_gram(teacher_features.detach(), threshold)
    return cka(student, teacher, debiased=debiased)


class MinibatchCKA:
    """Linear CKA of representations too many to hold at once, from batches of at least four samples.

    Every batch adds its unbiased estimates of the three Hilbert-Schmidt terms; the division comes at the end, so the
    result does not depend on the batch size but for noise.

    Source: Nguyen, Raghu, Kornblith, *Do Wide and Deep Networks Learn the Same Things? Uncovering How Neural Network
    Representations Vary with Width and Depth*, ICLR 2021, arXiv 2010.15327.
    """

    def __init__(self) -> None:
        self._terms: Tensor | None = None  # sums of HSIC (student, teacher), (student, student), (teacher, teacher)

    @torch.no_grad()
    @full_precision
    def update(
        self,
        student_features: Float[Tensor, "samples student_dim"],
        teacher_features: Float[Tensor, "samples teacher_dim"],
    ) -> None:
        """Add a batch.

        Args:
            student_features: (samples, dim), at least four samples.
            teacher_features: (samples, dim) of the same samples, may have another dim.

        Raises:
            ValueError: if the numbers of samples differ or are below four.
        """
        _check(student_features, teacher_features, debiased=True)
        samples = len(student_features)
        rows = (_centre_samples(features) for features in (student_features, teacher_features))
        student, teacher = (_centre_without_diagonal(features @ features.mT) for features in rows)
        pairs = ((student, teacher), (student, student), (teacher, teacher))
        terms = torch.stack([(first * second).sum() for first, second in pairs]) / (samples * (samples - 3))
        self._terms = terms if self._terms is None else self._terms + terms

    def compute(self) -> Float[Tensor, ""]:
        """The alignment over all batches so far.

        Returns:
            A scalar in [-1, 1]; 1 for features that are rotations of each other.

        Raises:
            ValueError: if there was no batch yet.
        """
        if self._terms is None:
            raise ValueError("no batch yet: call update with the features of at least one batch first")
        cross, student, teacher = self._terms
        return cross / (student.sqrt() * teacher.sqrt()).clamp_min(torch.finfo(cross.dtype).tiny)


def _check(student: Tensor, teacher: Tensor, debiased: bool) -> None:
    check_same_batch(student, teacher, at_least=4 if debiased else 2)


def _centre_samples(features: Tensor) -> Tensor:
    return features - features.mean(dim=0)


def _centre(gram: Tensor) -> Tensor:
    return gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()


def _centre_without_diagonal(gram: Tensor) -> Tensor:
    """U-centring: the inner product of two results, over n (n - 3), is the unbiased Hilbert-Schmidt estimate."""
    samples = len(gram)
    diagonal = torch.eye(samples, dtype=torch.bool, device=gram.device)
    gram = gram.masked_fill(diagonal, 0)
    sums = gram.sum(dim=0) / (samples - 2)
    centred = gram - sums - sums[:, None] + gram.sum() / ((samples - 1) * (samples - 2))
    return centred.masked_fill(diagonal, 0)


def _scale(values: Tensor) -> Tensor:
    largest = values.detach().abs().amax()
    return values / torch.where(largest > 0, largest, 1.0)


def _unit(values: Tensor) -> Tensor:
    return F.normalize(_scale(values), dim=0)


def _gaussian_gram(features: Tensor, threshold: float | None) -> Tensor:
    features = _centre_samples(features)  # distances stay, cancellation shrinks
    products = features @ features.mT
    squared = (products.diagonal() + products.diagonal()[:, None] - 2 * products).clamp_min(0)
    squared = squared.masked_fill(torch.eye(len(features), dtype=torch.bool, device=features.device), 0)
    # Minus 1, which centring would take away anyhow: keeps the digits of kernels close to 1.
    return (-squared / (2 * _variance(squared.detach(), threshold))).expm1()


def _variance(squared: Tensor, threshold: float | None) -> Tensor:
    values = squared.flatten() if threshold is not None else squared[squared > 0]
    if not len(values):
        return squared.new_ones(())  # all samples coincide: any width gives the constant kernel
    variance = (threshold or 1.0) ** 2 * _median(values)
    return torch.where(variance > 0, variance, 1.0)


def _median(values: Tensor) -> Tensor:
    """Mean of the two middle values; torch.median takes the lower one, torch.quantile refuses large inputs."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

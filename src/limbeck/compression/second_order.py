"""The second-order solver: zeros and rounding column by column, the columns to come making up for each error."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from limbeck.compression.masks import Pattern, keep_but, keep_pattern
from limbeck.compression.saliency import damped

Rounding = Callable[[Tensor, int], Tensor]
"""(column (outputs,), its number) -> the column with rounded values; zeros stay zeros. See `symmetric`."""


class Solved(NamedTuple):
    """A layer's matrix after the solver.

    Attributes:
        weight: (outputs, inputs), zero where nothing is kept.
        keep: (outputs, inputs), True where a weight may differ from zero.
    """

    weight: Float[Tensor, "outputs inputs"]
    keep: Bool[Tensor, "outputs inputs"]


class _Rules(NamedTuple):
    """What happens to the columns: how many go, in which pattern, among which, and how the rest is rounded."""

    sparsity: float
    pattern: Pattern | None
    by_row: bool
    rounding: Rounding | None


@torch.no_grad()
def solve(
    weight: Float[Tensor, "outputs inputs"],
    products: Float[Tensor, "inputs inputs"],
    *,
    sparsity: float = 0.0,
    pattern: Pattern | None = None,
    keep: Bool[Tensor, "outputs inputs"] | None = None,
    by_row: bool = False,
    rounding: Rounding | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Solved:
    r"""Prunes and rounds a matrix so that its outputs on the inputs X change as little as they must.

    .. math:: \delta_{i,j:} = - \frac{w_{ij} - \hat w_{ij}}{[H^{-1}]_{jj}} [H^{-1}]_{j,j:}, \qquad H = X X^T + \lambda I

    Columns are settled from left to right, and with :math:`H^{-1}` that of the columns from j on. In each block of
    columns the weights with the smallest :math:`w^2 / [H^{-1}]_{jj}` become zero; the columns to come make up for
    what a zero, or a rounded value, does to the outputs. Nothing is ever revised: with these zeros least squares could
    do better still, and at three quarters of zeros or more on strongly correlated inputs magnitude alone may do so.

    Args:
        weight: W, any floating-point type.
        products: X X^T, the sum over samples.
        sparsity: share of zeros in the end, those of `keep` included, in [0, 1]; the pattern's if there is one.
        pattern: at most so many in each run of inputs.
        keep: False where the weight has to be zero, whatever its saliency; all may stay if absent.
        by_row: choose the zeros of each block in each output by itself.
        rounding: what a column becomes once its zeros are settled; its error is made up for too.
        block: columns whose zeros are chosen together, rounded up to whole runs.
        damping: lambda as a share of the mean of the diagonal of X X^T.

    Returns:
        The matrix in the weight's type, and what is kept. Inputs that were never seen get zero weights where anything
        is pruned.

    Raises:
        ValueError: a sparsity that is no share, inputs that are no whole number of runs, or products without inverse.

    Source: Frantar, Alistarh, *SparseGPT*, 2023, arXiv 2301.00774; rounding as in Frantar et al., *GPTQ*, 2022, arXiv
    2210.17323.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity lies in [0, 1], not {sparsity}")
    rules = _Rules(sparsity, pattern, by_row, rounding)
    factor = inverse_factor(products, damping)
    precise = torch.promote_types(weight.dtype, torch.float32)
    left, factor = weight.to(precise, copy=True), factor.to(precise)
    allowed = torch.ones_like(left, dtype=torch.bool) if keep is None else keep.clone()
    if sparsity or pattern:
        allowed &= products.diagonal() != 0
    if pattern is not None:
        block = -(-block // pattern.run) * pattern.run
    inputs = left.shape[1]
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        columns, inside = left[:, start:stop], factor[start:stop, start:stop]
        if pattern is None:
            quota = round(sparsity * stop) - round(sparsity * start) if by_row else _quota(left, sparsity, start, stop)
            allowed[:, start:stop] &= _keep(columns, inside.diagonal(), allowed[:, start:stop], quota, by_row)
        errors = _settle(columns, inside, allowed[:, start:stop], rules, start)
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return Solved(left.to(weight.dtype), allowed)


def inverse_factor(products: Float[Tensor, "inputs inputs"], damping: float = 0.01) -> Float[Tensor, "inputs inputs"]:
    """Upper triangular U with U^T U = H^-1, in float64; row j of it is what removing column j does to those behind.

    Row j over its diagonal entry is the first row, over its first entry, of the inverse of H from column j on.

    Raises:
        ValueError: even a thousandfold damping gives no inverse.
    """
    for factor in (1, 10, 100, 1000):
        lower, failed = torch.linalg.cholesky_ex(damped(products, damping * factor))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError("the inputs' products have no inverse: are there values that are not finite among the inputs?")


def _settle(columns: Tensor, inside: Tensor, allowed: Tensor, rules: _Rules, start: int) -> Tensor:
    """Settles the columns of one block in place; returns what each lost, in units of its factor's diagonal."""
    errors, pattern = torch.zeros_like(columns), rules.pattern
    for j in range(columns.shape[1]):
        if pattern is not None and j % pattern.run == 0:
            run = slice(j, j + pattern.run)
            scores = _scores(columns[:, run], inside.diagonal()[run], allowed[:, run])
            allowed[:, run] &= keep_pattern(scores[None], pattern)[0]
        column = columns[:, j].clone()
        new = column if rules.rounding is None else rules.rounding(column, start + j)
        new = torch.where(allowed[:, j], new, torch.zeros_like(new))
        errors[:, j] = (column - new) / inside[j, j]
        columns[:, j + 1 :] -= errors[:, j : j + 1] * inside[j, j + 1 :]
        columns[:, j] = new
    return errors


def _scores(columns: Tensor, diagonal: Tensor, allowed: Tensor) -> Tensor:
    """w^2 / [H^-1]_jj; what is not allowed comes before everything else."""
    return torch.where(allowed, (columns / diagonal).square(), -torch.ones_like(columns))


def _keep(columns: Tensor, diagonal: Tensor, allowed: Tensor, quota: int, by_row: bool) -> Tensor:
    scores = _scores(columns, diagonal, allowed)
    return keep_but(scores if by_row else scores.reshape(1, -1), quota).view_as(columns)


def _quota(weight: Tensor, sparsity: float, start: int, stop: int) -> int:
    """Zeros of the columns start to stop; over all blocks they add up to the rounded share of the whole."""
    rows = weight.shape[0]
    return round(sparsity * rows * stop) - round(sparsity * rows * start)

"""How much a layer's output would miss each weight: magnitude, Wanda, OBS."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Criterion = Literal["magnitude", "wanda", "obs"]


def saliency(
    criterion: Criterion,
    weight: Float[Tensor, "groups outputs inputs"],
    products: Tensor | None = None,
    *,
    damping: float = 0.01,
) -> Float[Tensor, "groups outputs inputs"]:
    r"""A score for each weight, the smallest of which goes first.

    .. math:: |w_{ij}|, \qquad |w_{ij}| \, \|x_j\|_2, \qquad w_{ij}^2 / [H^{-1}]_{jj}, \quad H = X X^T + \lambda I

    Args:
        criterion: "magnitude" knows the weights alone; "wanda" (Sun et al., 2023, arXiv 2306.11695) the size of each
            input; "obs" (Hassibi, Stork, 1993) what the other weights can make up for.
        weight: a layer's matrices.
        products: sums of x x^T over samples (groups, inputs, inputs); for "wanda" the squares (groups, inputs) will do;
            not needed for "magnitude".
        damping: lambda as a share of the mean of the diagonal of X X^T, above 0 (obs).

    Returns:
        Scores of at least 0, in float32 or better.

    Raises:
        ValueError: the criterion needs products that are missing.
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"no criterion '{criterion}': {', '.join(get_args(Criterion))}")
    size = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).abs()
    if criterion == "magnitude":
        return size
    if products is None or (criterion == "obs" and products.ndim != 3):
        raise ValueError(f"'{criterion}' needs what comes into the layer: give the inputs' products")
    if criterion == "wanda":
        squares = products.diagonal(dim1=-2, dim2=-1) if products.ndim == 3 else products
        return size * squares.clamp_min(0).sqrt().unsqueeze(1).to(size.dtype)
    inverse = torch.linalg.inv(damped(products, damping))
    return size.square() / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(1).to(size.dtype)


def damped(products: Float[Tensor, "*groups inputs inputs"], share: float) -> Float[Tensor, "*groups inputs inputs"]:
    """X X^T in float64 with a share of the mean of its diagonal added to the diagonal; inputs never seen get 1 there.

    Raises:
        ValueError: the share is not above 0.
    """
    if not share > 0:
        raise ValueError(f"damping must be above 0, got {share}: 0.01 is usual")
    matrix = products.double().clone()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.copy_(torch.where(diagonal == 0, torch.where(mean == 0, 1.0, mean), diagonal) + share * mean)
    return matrix

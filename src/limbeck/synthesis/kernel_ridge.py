"""Kernel ridge regression: the linear head that fits features best, in closed form, with gradients through the fit."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional


def ridge_head(
    features: Float[Tensor, "items dims"],
    targets: Float[Tensor, "items outputs"],
    ridge: Float[Tensor, ""] | float,
    precision: torch.dtype = torch.float64,
) -> Float[Tensor, "dims outputs"]:
    r"""The weights that ridge regression gives a linear head.

    .. math:: W = F^\top (F F^\top + \lambda I)^{-1} Y = (F^\top F + \lambda I)^{-1} F^\top Y

    Whichever of the two matrices is smaller is factorised (Cholesky). Gradients reach features and targets.

    Args:
        features: F, of the items that are fitted.
        targets: Y, what the head should say of them.
        ridge: lambda, not below 0; 0 only where the smaller matrix has full rank.
        precision: of the computation. Small ridges need float64; float32 is for devices that have nothing better.

    Returns:
        W in the precision of the features, float32 at least.

    Raises:
        ValueError: the matrix is not positive definite at this ridge and precision.
    """
    rows, wanted = features.to(precision), targets.to(precision)
    dual = len(rows) <= rows.shape[1]
    gram = rows @ rows.T if dual else rows.T @ rows
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=precision, device=gram.device))
    if failed:
        raise ValueError("the features' Gram matrix cannot be inverted: raise the ridge, or compute in float64")
    weights = rows.T @ torch.cholesky_solve(wanted, factor) if dual else torch.cholesky_solve(rows.T @ wanted, factor)
    return weights.to(torch.promote_types(features.dtype, torch.float32))


def relative_ridge(features: Float[Tensor, "items dims"], share: float = 1e-6) -> Float[Tensor, ""]:
    r"""A ridge in units of the features, :math:`\lambda = s \operatorname{tr}(F F^\top)`, in float64, without a graph.

    Args:
        features: F, with the column for the bias if there is one.
        share: s, above 0.
    """
    return share * features.detach().double().square().sum()


def with_bias(features: Float[Tensor, "items dims"]) -> Float[Tensor, "items _"]:
    """Features with a last column of ones, whose weight is the bias, penalised as every other."""
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def kernel_ridge_loss(
    features: Float[Tensor, "items dims"],
    targets: Float[Tensor, "items outputs"],
    seen: Float[Tensor, "seen dims"],
    wanted: Float[Tensor, "seen outputs"],
    share: float = 1e-6,
    precision: torch.dtype = torch.float64,
) -> Float[Tensor, ""]:
    r"""Mean squared error, on other items, of the head that a few items give in closed form.

    .. math:: L = \mathrm{mean}\bigl(K_{ts} (K_{ss} + \lambda I)^{-1} Y_s - Y_t\bigr)^2, \qquad
        K_{ab} = [F_a, 1] [F_b, 1]^\top, \quad \lambda = s \operatorname{tr} K_{ss}

    Args:
        features: :math:`F_s`, a network's of the synthetic images; gradients flow to them.
        targets: :math:`Y_s`, the synthetic images' targets; likewise.
        seen: :math:`F_t`, the network's features of real images; no gradient flows to them.
        wanted: :math:`Y_t`, what a target network says of these; likewise.
        share: s; no gradient flows to lambda.
        precision: see `ridge_head`.

    Returns:
        A scalar, not below 0.

    Source: Lee et al., *Self-Supervised Dataset Distillation for Transfer Learning*, 2023, arXiv 2310.06511.
    """
    own = with_bias(features)
    head = ridge_head(own.to(precision), targets.to(precision), relative_ridge(own, share), precision)
    said = with_bias(seen.detach().to(precision)) @ head
    loss = (said - wanted.detach().to(precision)).square().mean()
    return loss.to(torch.promote_types(features.dtype, torch.float32))


class KernelRidge:
    """A linear head with a bias that is fitted in closed form: to see what features are worth, without training.

    Args:
        share: the ridge, as a share of the trace of the Gram matrix; above 0.
    """

    def __init__(self, share: float = 1e-6) -> None:
        self.share = share
        self._head: Tensor | None = None

    def fit(
        self,
        features: Float[Tensor, "items dims"],
        targets: Float[Tensor, "items outputs"] | Int64[Tensor, " items"],
    ) -> "KernelRidge":
        """Fits the head; classes as targets become vectors with a one, as many as the highest asks for.

        Raises:
            ValueError: see `ridge_head`.
        """
        vectors = targets if targets.is_floating_point() else functional.one_hot(targets).to(features.dtype)
        own = with_bias(features)
        self._head = ridge_head(own, vectors, relative_ridge(own, self.share))
        return self

    def predict(self, features: Float[Tensor, "items dims"]) -> Float[Tensor, "items outputs"]:
        """What the head says of each item; of classes a score each, the highest for the class that is meant.

        Raises:
            ValueError: nothing was fitted yet.
        """
        if self._head is None:
            raise ValueError("fit the head before it predicts")
        return with_bias(features).to(self._head.dtype) @ self._head

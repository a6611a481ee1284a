"""Orthogonal maps that are trained without ever ceasing to be orthogonal, and the principal axes they start from."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


def cayley(free: Float[Tensor, "*maps size size"]) -> Float[Tensor, "*maps size size"]:
    r"""The rotation of a free matrix, in float32 or better: orthogonal with determinant 1 whatever the entries.

    .. math:: U = (I - A/2)^{-1} (I + A/2), \qquad A = X - X^T

    Args:
        free: X.
    """
    with torch.autocast(free.device.type, enabled=False):
        free = free.to(torch.promote_types(free.dtype, torch.float32))
        half = (free - free.mT) / 2
        one = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
        return torch.linalg.solve(one - half, one + half)


def inverse_cayley(rotation: Float[Tensor, "*maps size size"]) -> Float[Tensor, "*maps size size"]:
    r"""The strictly lower triangular X whose `cayley` is a given rotation.

    .. math:: A = 2 (U - I)(I + U)^{-1}

    Args:
        rotation: U, orthogonal, with determinant 1 and no eigenvalue near -1; see `in_chart`.

    Raises:
        ValueError: it is not orthogonal, or no `cayley` of anything: it reflects, or turns a plane by half a turn.
    """
    rotation = rotation.to(torch.promote_types(rotation.dtype, torch.float32))
    precise = rotation.double()
    one = torch.eye(rotation.shape[-1], dtype=torch.float64, device=rotation.device)
    if not torch.allclose(precise.mT @ precise, one.expand_as(precise), atol=1e-3):
        raise ValueError("the matrix is not orthogonal")
    if float(torch.linalg.svdvals(one + precise).amin()) < 1e-4:
        raise ValueError("the matrix has an eigenvalue of -1: change signs of columns first, with in_chart")
    skew = 2 * torch.linalg.solve(one + precise, precise - one, left=False)
    return skew.tril(-1).to(rotation.dtype)


def in_chart(basis: Float[Tensor, "*maps size size"], least: float = 1e-2) -> Float[Tensor, "*maps size size"]:
    """The same axes as a rotation that `inverse_cayley` takes: columns change their signs where that is needed.

    The first column is turned where the determinant is -1. Where an eigenvalue then comes near -1, each column whose
    diagonal entry is negative is turned, and pairs of columns as long as that helps.

    Args:
        basis: orthogonal; its columns are the axes.
        least: how near to -1 an eigenvalue may come, as the smallest singular value of I + U.

    Raises:
        ValueError: no choice of signs that was tried will do.
    """
    flat = basis.reshape(-1, *basis.shape[-2:])
    return torch.stack([_turned(one, least) for one in flat]).view_as(basis)


class Orthogonal(nn.Module):
    """Trainable rotations, by Cayley's map, kept in float32.

    Args:
        start: orthogonal matrices (*maps, size, size) to begin with; their columns' signs may change, see `in_chart`.

    Attributes:
        free: the trained X; only what is below its diagonal starts unlike 0, and X - X^T is what counts.
    """

    def __init__(self, start: Float[Tensor, "*maps size size"]) -> None:
        super().__init__()
        self.free = nn.Parameter(inverse_cayley(in_chart(start)).float())

    @classmethod
    def identity(cls, size: int, *maps: int) -> "Orthogonal":
        """Maps that change nothing at first."""
        return cls(torch.eye(size).expand(*maps, size, size))

    def forward(self) -> Float[Tensor, "*maps size size"]:
        """The rotations; their first r columns span what a map of rank r keeps, each rank within the next."""
        return cayley(self.free)


def project(
    x: Float[Tensor, "*items samples size"], rotation: Float[Tensor, "*maps size size"], rank: int
) -> Float[Tensor, "*items samples rank"]:
    """The first `rank` coordinates along a rotation's columns; those of a smaller rank are the first of these.

    Args:
        x: vectors, (..., *maps, samples, size).
        rotation: one for each map.
        rank: in [1, size].
    """
    return x @ rotation[..., :rank].to(x.dtype)


def restore(
    coordinates: Float[Tensor, "*items samples rank"], rotation: Float[Tensor, "*maps size size"]
) -> Float[Tensor, "*items samples size"]:
    """What `project` kept, back among the vectors it came from; all of them where the rank is the size."""
    return coordinates @ rotation[..., : coordinates.shape[-1]].mT.to(coordinates.dtype)


class PrincipalAxes(NamedTuple):
    """Axes by falling variance.

    Attributes:
        basis: (*maps, size, size), the axes as columns.
        variances: (*maps, size), falling; in the units of the samples, squared.
        mean: (*maps, size).
    """

    basis: Float[Tensor, "*maps size size"]
    variances: Float[Tensor, "*maps size"]
    mean: Float[Tensor, "*maps size"]


class Moments(nn.Module):
    """Running first and second moments of vectors, in float64.

    Args:
        size: of a vector.
        maps: further dimensions, as layers and heads, each with moments of its own.
    """

    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, size: int, *maps: int) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(*maps, size, dtype=torch.float64))
        self.register_buffer("second", torch.zeros(*maps, size, size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, samples: Float[Tensor, "*maps samples size"]) -> None:
        """Takes more vectors in, equally many for each map."""
        samples = samples.to(self.first)
        self.first += samples.sum(-2)
        self.second += samples.mT @ samples
        self.count += samples.shape[-2]

    def principal_axes(self) -> PrincipalAxes:
        r"""Eigenvectors of :math:`E[x x^T] - \mu \mu^T` by falling eigenvalue, in float64.

        Raises:
            ValueError: nothing was taken in.
        """
        if not self.count:
            raise ValueError("there are no samples to find axes of")
        mean = self.first / self.count
        covariance = self.second / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        variances, basis = torch.linalg.eigh(covariance)
        return PrincipalAxes(basis.flip(-1), variances.flip(-1).clamp_min(0), mean)


def _distance(basis: Tensor) -> float:
    one = torch.eye(len(basis), dtype=torch.float64, device=basis.device)
    return float(torch.linalg.svdvals(one + basis.double()).amin())


def _turned(basis: Tensor, least: float) -> Tensor:
    basis = basis.clone()
    if torch.linalg.det(basis.double()) < 0:
        basis[:, 0] *= -1
    if _distance(basis) >= least:
        return basis
    signs = torch.where(basis.diagonal() < 0, -1.0, 1.0).to(basis)
    if torch.linalg.det((basis * signs).double()) < 0:  # one sign too many: where it costs least
        signs[basis.diagonal().abs().argmin()] *= -1
    best = basis * signs
    for i in range(len(basis)):
        for j in range(i):
            if _distance(best) >= least:
                return best
            pair = best.clone()
            pair[:, [i, j]] *= -1
            best = pair if _distance(pair) > _distance(best) else best
    if _distance(best) < least:
        raise ValueError("no signs of the columns lead away from an eigenvalue of -1")
    return best

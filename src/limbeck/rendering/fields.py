"""Radiance fields: density and colour at points of a cube, from a voxel grid or from a multiresolution hash grid."""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

_PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True)
class DensityBlob:
    """What is added to the density before its activation, so that training starts from a ball: strength (1 - |x|/r).

    A negative strength hollows the middle out, for scenes seen from within (the paper's scenes: radius 2.5).

    Attributes:
        strength: without unit.
        radius: r, world units, positive.

    Source: Wang et al., *ProlificDreamer*, 2023, arXiv 2305.16213; Lin et al., *Magic3D*, 2022.
    """

    strength: float = 10.0
    radius: float = 0.5

    def __call__(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points"]:
        return self.strength * (1 - points.norm(dim=-1) / self.radius)


class RadianceField(nn.Module):
    """Density and view-independent colour within the cube [-bound, bound]^3; empty outside.

    A subclass defines `raw`. Density is softplus or exp of raw channel 0 plus the blob; colour is the sigmoid of the
    other three.

    Args:
        bound: half the side of the cube, world units.
        blob: initial shape, or None.
        activation: "softplus", or "exp" (its exponent is cut at 15).
        difference: half the step of the differences that give normals, world units.
    """

    def __init__(self, bound: float, blob: DensityBlob | None, activation: str, difference: float) -> None:
        super().__init__()
        if activation not in ("softplus", "exp"):
            raise ValueError(f"activation must be 'softplus' or 'exp', got '{activation}'")
        self.bound, self.blob, self.activation, self.difference = bound, blob, activation, difference

    def raw(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points 4"]:
        """Density and colour before their activations."""
        raise NotImplementedError

    def forward(self, points: Float[Tensor, "points 3"]) -> tuple[Float[Tensor, "points"], Float[Tensor, "points 3"]]:
        """Density (per world unit, not negative) and colour in [0, 1]."""
        raw = self.raw(points)
        return self._activate(raw[:, 0], points), torch.sigmoid(raw[:, 1:])

    def density(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points"]:
        """Density alone, per world unit."""
        return self._activate(self.raw(points)[:, 0], points)

    def normals(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
        """Unit vectors against the gradient of the density before activation, by central differences.

        Differences need no second derivative of the field, so that losses on normals train it.
        """
        steps = self.difference * torch.eye(3, device=points.device, dtype=points.dtype)
        around = (points[:, None] + torch.cat((steps, -steps))).flatten(0, 1)
        level = self._level(self.raw(around)[:, 0], around).unflatten(0, (-1, 6))
        return functional.normalize(level[:, 3:] - level[:, :3], dim=-1, eps=1e-6)

    def _level(self, raw: Tensor, points: Tensor) -> Tensor:
        return raw if self.blob is None else raw + self.blob(points)

    def _activate(self, raw: Tensor, points: Tensor) -> Tensor:
        level = self._level(raw, points)
        value = functional.softplus(level) if self.activation == "softplus" else level.clamp(max=15).exp()
        return torch.where((points.abs() <= self.bound).all(-1), value, torch.zeros_like(value))


class VoxelField(RadianceField):
    """A grid of densities and colours, interpolated linearly. Cost: 32 numbers read a point, whatever the grid.

    Args:
        resolution: values along each side, at least 2.
        bound, blob, activation: see `RadianceField`.

    Attributes:
        grid: (1, 4, z, y, x) raw values, zero to begin with: the blob's density in gray.
    """

    def __init__(
        self,
        resolution: int = 32,
        bound: float = 1.0,
        blob: DensityBlob | None = None,
        activation: str = "softplus",
    ) -> None:
        super().__init__(bound, blob, activation, difference=bound / (resolution - 1))
        self.grid = nn.Parameter(torch.zeros(1, 4, resolution, resolution, resolution))

    def raw(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points 4"]:
        where = (points / self.bound)[None, None, None]
        found = functional.grid_sample(self.grid, where, align_corners=True, padding_mode="border")
        return found[0, :, 0, 0].T


class HashField(RadianceField):
    """Feature grids of growing resolution, the fine ones folded into tables by a hash, and a small network.

    Cost: 8 features x levels numbers read a point, then the network.

    Args:
        levels: number of grids.
        features: numbers kept at each corner.
        table: log2 of the entries of each grid's table.
        base: resolution of the coarsest grid.
        growth: ratio of the resolutions of successive grids.
        width: hidden units of the network.
        bound, blob, activation: see `RadianceField`.

    Source: Müller et al., *Instant Neural Graphics Primitives*, 2022, arXiv 2201.05989.
    """

    def __init__(
        self,
        levels: int = 8,
        features: int = 2,
        table: int = 15,
        base: int = 16,
        growth: float = 1.447,
        width: int = 32,
        bound: float = 1.0,
        blob: DensityBlob | None = None,
        activation: str = "softplus",
    ) -> None:
        super().__init__(bound, blob, activation, difference=0.01 * bound)
        self.entries = 2**table
        self.sides = tuple(int(base * growth**level) for level in range(levels))
        self.tables = nn.Parameter(torch.empty(levels, self.entries, features).uniform_(-1e-4, 1e-4))
        self.network = nn.Sequential(nn.Linear(levels * features, width), nn.ReLU(), nn.Linear(width, 4))

    def raw(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points 4"]:
        return self.network(self.encode(points))

    def encode(self, points: Float[Tensor, "points 3"]) -> Float[Tensor, "points encoding"]:
        """The features of all grids at points, interpolated linearly."""
        unit = (points / self.bound).clamp(-1, 1).add(1).div(2).T
        grids = zip(self.tables, self.sides, strict=True)
        return torch.cat([self._interpolate(table, side, unit) for table, side in grids], -1)

    def _interpolate(
        self, table: Float[Tensor, "entries features"], side: int, unit: Float[Tensor, "3 points"]
    ) -> Float[Tensor, "points features"]:
        """One grid of `side` cells at points of the unit cube."""
        scaled = unit * side
        lower = scaled.detach().floor().clamp_max(side - 1)
        low, offset = lower.long(), scaled - lower
        counted = (side + 1) ** 3 <= self.entries  # the grid fits its table: corners are counted through, not hashed
        strides = (1, side + 1, (side + 1) ** 2) if counted else _PRIMES
        terms = [(axis * stride, (axis + 1) * stride) for axis, stride in zip(low, strides, strict=True)]
        shares = [(1 - part, part) for part in offset]
        rows, weights = [], []
        for i, j, k in itertools.product((0, 1), repeat=3):
            x, y, z = terms[0][i], terms[1][j], terms[2][k]
            rows.append(x + y + z if counted else (x ^ y ^ z) & (self.entries - 1))
            weights.append(shares[0][i] * shares[1][j] * shares[2][k])
        # gather's backward pass adds in place; that of an embedding is five times slower on a CPU.
        found = table.gather(0, torch.cat(rows)[:, None].expand(-1, table.shape[1]))
        return (torch.cat(weights)[:, None] * found).unflatten(0, (8, -1)).sum(0)

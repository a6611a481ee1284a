"""Layers of low rank: a matrix as the product of two thin ones, and back."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Factors(NamedTuple):
    """A matrix of low rank.

    Attributes:
        up: (outputs, rank).
        down: (rank, inputs).
    """

    up: Float[Tensor, "outputs rank"]
    down: Float[Tensor, "rank inputs"]


@torch.no_grad()
def factorise(
    weight: Float[Tensor, "outputs inputs"],
    rank: int | None = None,
    *,
    energy: float | None = None,
    moment: Float[Tensor, "inputs inputs"] | None = None,
) -> Factors:
    r"""The best two factors of a rank: for the weights themselves, or for what they make of inputs X.

    .. math:: \min_{\mathrm{rank}\, \hat W \le r} \| (W - \hat W) S \|_F^2, \qquad S S^T = E[x x^T]

    The minimum drops the smallest singular values of W S; without a moment S is the identity.

    Args:
        weight: W, any floating-point type.
        rank: r, at least 1; give this or `energy`.
        energy: the smallest rank that keeps this share, in (0, 1], of the sum of squared singular values of W S.
        moment: second moment of the inputs, E[x x^T] or any multiple; directions without inputs cost nothing.

    Returns:
        The factors in the weight's type, the square root of each singular value on both sides where there is no moment.

    Raises:
        ValueError: neither or both of rank and energy, or one out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either a rank or a share of the energy")
    precise = weight.double()
    root, inverse = (None, None) if moment is None else _roots(moment)
    left, values, right = torch.linalg.svd(precise if root is None else precise @ root, full_matrices=False)
    chosen = rank_for_energy(values, energy) if energy is not None else rank
    assert chosen is not None
    if not 1 <= chosen <= len(values):
        raise ValueError(f"a rank lies between 1 and {len(values)}, not {chosen}")
    scale = values[:chosen].sqrt()
    down = scale.unsqueeze(1) * right[:chosen]
    return Factors(
        (left[:, :chosen] * scale).to(weight.dtype), (down if inverse is None else down @ inverse).to(weight)
    )


def rank_for_energy(values: Float[Tensor, "count"], share: float) -> int:
    """The smallest rank whose singular values hold this share of the sum of all squares.

    Args:
        values: singular values, falling.
        share: in (0, 1].

    Raises:
        ValueError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the energy lies in (0, 1], not {share}")
    held = values.double().square().cumsum(0)
    enough = held >= share * held[-1] * (1 - 1e-12)
    return int(enough.to(torch.int64).argmax()) + 1


class LowRankLinear(nn.Module):
    """A linear layer as two thin ones in a row; rank (inputs + outputs) weights in place of inputs x outputs.

    Args:
        factors: of the weight.
        bias: (outputs,), or None.
    """

    def __init__(self, factors: Factors, bias: Tensor | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(factors.down.detach().clone())
        self.up = nn.Parameter(factors.up.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, layer: nn.Linear, rank: int | None = None, **how: Any) -> "LowRankLinear":
        """The best of its rank; see `factorise`."""
        return cls(factorise(layer.weight.detach(), rank, **how), layer.bias)

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.down.shape[0]

    def forward(self, x: Float[Tensor, "*items inputs"]) -> Float[Tensor, "*items outputs"]:
        """Two products; the full weight never exists."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """One linear layer that does the same."""
        outputs, inputs = len(self.up), self.down.shape[1]
        like: Any = {"device": self.up.device, "dtype": self.up.dtype}
        layer = nn.Linear(inputs, outputs, bias=self.bias is not None, **like)
        layer.weight.copy_(self.up @ self.down)
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer


class LowRankConv2d(nn.Module):
    """A convolution as one with few channels and the same kernel, and a 1x1 convolution behind it.

    Args:
        layer: the convolution whose stride, padding and dilation it has; not a grouped one.
        factors: of the weight as (outputs, channels x height x width).

    Raises:
        ValueError: the convolution is grouped.
    """

    def __init__(self, layer: nn.Conv2d, factors: Factors) -> None:
        super().__init__()
        if layer.groups != 1:
            raise ValueError("a grouped convolution has no single matrix to factorise")
        shape: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        like: Any = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        size: Any = layer.kernel_size
        rank = len(factors.down)
        self.down = nn.Conv2d(
            layer.in_channels, rank, size, **shape, padding_mode=layer.padding_mode, bias=False, **like
        )
        self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None, **like)
        with torch.no_grad():
            self.down.weight.copy_(factors.down.view_as(self.down.weight))
            self.up.weight.copy_(factors.up.view_as(self.up.weight))
            if layer.bias is not None and self.up.bias is not None:
                self.up.bias.copy_(layer.bias)

    @classmethod
    def of(cls, layer: nn.Conv2d, rank: int | None = None, **how: Any) -> "LowRankConv2d":
        """The best of its rank; see `factorise`. A moment is that of (channels x height x width) patches."""
        return cls(layer, factorise(layer.weight.detach().flatten(1), rank, **how))

    @property
    def rank(self) -> int:
        """Channels between the two."""
        return self.down.out_channels

    def forward(self, x: Float[Tensor, "items channels *size"]) -> Float[Tensor, "items outputs *smaller"]:
        """Both convolutions."""
        return self.up(self.down(x))

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """One convolution that does the same."""
        down, up = self.down, self.up
        shape: Any = {"stride": down.stride, "padding": down.padding, "dilation": down.dilation}
        like: Any = {"device": up.weight.device, "dtype": up.weight.dtype}
        size: Any = down.kernel_size
        mode = down.padding_mode
        layer = nn.Conv2d(
            down.in_channels, up.out_channels, size, **shape, padding_mode=mode, bias=up.bias is not None, **like
        )
        layer.weight.copy_((up.weight.flatten(1) @ down.weight.flatten(1)).view_as(layer.weight))
        if up.bias is not None and layer.bias is not None:
            layer.bias.copy_(up.bias)
        return layer


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """S with S S^T = moment, symmetric, and its pseudo-inverse."""
    values, basis = torch.linalg.eigh(moment.double())
    floor = values.amax().clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    seen = values > floor
    roots = torch.where(seen, values.clamp_min(0).sqrt(), torch.zeros_like(values))
    inverses = torch.where(seen, 1 / roots.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(values))
    return (basis * roots) @ basis.T, (basis * inverses) @ basis.T

"""Integer quantisation of matrices by rows or groups of inputs, as language models are quantised."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from limbeck.compression.quantizers import straight_through

Mode = Literal["symmetric", "asymmetric"]


@dataclass(frozen=True)
class GroupedIntegers:
    """A matrix as integers with a scale a group: w = scale (code - zero).

    Attributes:
        codes: whole numbers, (rows, groups, size), with the zeros that fill up a row's last group.
        scale: (rows, groups, 1), above 0.
        zero: code of the weight 0, (rows, groups, 1).
    """

    codes: Float[Tensor, "rows groups size"]
    scale: Float[Tensor, "rows groups 1"]
    zero: Float[Tensor, "rows groups 1"]

    def dequantize(self) -> Float[Tensor, "rows groups size"]:
        """The weights, padding included."""
        return (self.codes - self.zero) * self.scale


@dataclass(frozen=True)
class FakeQuant:
    """Rounds weights to `bits`-bit integers with a scale for each group, and lets their gradient pass as it is.

    A weight of 0 stays exactly 0 in both modes, so that pruned weights stay pruned. The error of a weight is at most
    half a step (symmetric), or one step where the zero point had to be rounded as well (asymmetric). About eight
    passes over the weights.

    Attributes:
        bits: of a code: 2 to 16 (symmetric) or 1 to 16 (asymmetric).
        group: weights that share a scale, along the inputs of one output: a number of them, None for all of them (one
            scale an output channel), or "tensor" for one scale in all.
        mode: "symmetric": codes from -(2^(bits-1) - 1) to its opposite. "asymmetric": from 0 to 2^bits - 1, over the
            range of the group's weights.

    Raises:
        ValueError: bits or group out of range.
    """

    bits: int
    group: int | Literal["tensor"] | None = None
    mode: Mode = "symmetric"

    def __post_init__(self) -> None:
        if not (2 if self.mode == "symmetric" else 1) <= self.bits <= 16:
            raise ValueError(f"{self.bits} bits are out of range for {self.mode} quantisation")
        if isinstance(self.group, int) and self.group < 1:
            raise ValueError(f"a group needs at least one weight, not {self.group}")

    def __call__(self, weights: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weights as they are after rounding; the straight-through gradient belongs to `weights`."""
        rows = self._rows(weights)
        values = self.quantize(weights).dequantize().flatten(1)[:, : rows.shape[1]]
        return straight_through(weights, values.reshape(weights.shape).to(weights.dtype))

    @torch.no_grad()
    def quantize(self, weights: Float[Tensor, "*shape"]) -> GroupedIntegers:
        """Codes, scales and zero points; the first dimension of `weights` runs over the outputs."""
        groups = self._groups(self._rows(weights))
        if self.mode == "symmetric":
            most = 2 ** (self.bits - 1) - 1
            scale = _at_least(groups.abs().amax(-1, keepdim=True) / most)
            return GroupedIntegers((groups / scale).round_().clamp_(-most, most), scale, torch.zeros_like(scale))
        most = 2**self.bits - 1
        least, largest = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = _at_least((largest - least) / most)
        zero = (-least / scale).round_()
        return GroupedIntegers((groups / scale).round_().add_(zero).clamp_(0, most), scale, zero)

    def _rows(self, weights: Tensor) -> Tensor:
        precise = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
        return precise.reshape(1, -1) if weights.ndim < 2 or self.group == "tensor" else precise.flatten(1)

    def _groups(self, rows: Tensor) -> Tensor:
        size = self.group if isinstance(self.group, int) else rows.shape[1]
        return functional.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))


def _at_least(scale: Tensor) -> Tensor:
    """A group of zeros has any scale."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)

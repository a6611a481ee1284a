"""Rounding to evenly spaced values around zero, by output or group of inputs, as a rule for the second-order solver."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.compression.quantized import QuantizedTensor, even_points, indices_of


@dataclass(frozen=True)
class SymmetricGrid:
    """The values s k / m of each output, or of each group of its inputs, for whole k from -m to m; zeros stay zeros.

    Called on (column (outputs,), its number) it is a `second_order.Rounding`.

    Attributes:
        scale: s, the largest weight there, (outputs, groups), float32 or better.
        most: m.
        size: inputs a group; the last may be shorter.
    """

    scale: Float[Tensor, "outputs groups"]
    most: int
    size: int

    @classmethod
    def of(cls, weight: Float[Tensor, "outputs inputs"], bits: int, group: int | None = None) -> "SymmetricGrid":
        """The grid of 2^bits - 1 values that a matrix's own weights are measured by.

        Args:
            weight: what the scales are measured on.
            bits: at least 2.
            group: inputs that share a scale; all of an output's if absent.

        Raises:
            ValueError: fewer than two bits, or a group below 1.
        """
        if bits < 2 or (group is not None and group < 1):
            raise ValueError(f"symmetric rounding takes at least 2 bits and groups of at least 1, not {bits}, {group}")
        precise = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        size = min(group or precise.shape[1], precise.shape[1])
        scale = torch.stack([part.abs().amax(1) for part in precise.split(size, dim=1)], 1)
        return cls(torch.where(scale == 0, torch.ones_like(scale), scale), 2 ** (bits - 1) - 1, size)

    def __call__(self, column: Float[Tensor, " outputs"], number: int) -> Float[Tensor, " outputs"]:
        """The nearest values, to the bit those that `quantized` stands for."""
        scale = self.scale[:, number // self.size].to(column.dtype)
        place = (column.abs() / scale * self.most).round_().clamp_(max=self.most)
        size = even_points(self.most + 1, column.dtype).to(column.device)[place.long()] * scale
        return torch.where(column < 0, -size, size)

    def quantized(self, weight: Tensor) -> QuantizedTensor | None:
        """A parameter on the grid as magnitudes and signs; None where these cannot hold it.

        They can where the rows of the matrix follow each other in memory (not in GPT-2's Conv1D), groups divide them
        evenly, and magnitudes are at most 255: up to 9 bits with the sign.

        Args:
            weight: of any shape with outputs x inputs numbers, already rounded.
        """
        outputs, groups = self.scale.shape
        if self.most > 255 or weight.numel() != outputs * groups * self.size:
            return None
        rows = weight.detach().to(self.scale.dtype).reshape(outputs, groups, self.size)
        places = (rows.abs() / self.scale[:, :, None] * self.most).round_().clamp_(max=self.most)
        found = QuantizedTensor(
            indices=indices_of(places).flatten(),
            alpha=self.scale.flatten(),
            beta=None,
            negative=(rows < 0).flatten(),
            points=None,
            levels=self.most + 1,
            bucket=self.size,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )
        return found if torch.equal(found.dequantize(), weight.detach()) else None

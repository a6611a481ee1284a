"""Quantised tensors: level indices, scales and points, and the weights that they stand for."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Num, UInt8
from torch import Tensor, nn

from limbeck.compression.buckets import bucket_count, unscale

_ATTRIBUTE = "limbeck_quantization"


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor whose weights take few values: alpha p[index] + beta, or sign alpha p[index], by bucket.

    Attributes:
        indices: level of each weight, (weights,), below `levels`.
        alpha: scale of each bucket, (buckets,).
        beta: offset of each bucket, (buckets,); None where signs are kept aside.
        negative: which weights are below 0, (weights,); None for linear scaling.
        points: the levels in the scaled domain, ascending, (levels,); None for evenly spaced ones in [0, 1].
        levels: how many levels there are, 1 to 256.
        bucket: weights a bucket; None for the whole tensor.
        shape: of the tensor.
        dtype: of the tensor.
    """

    indices: UInt8[Tensor, " weights"]
    alpha: Float[Tensor, " buckets"]
    beta: Float[Tensor, " buckets"] | None
    negative: Bool[Tensor, " weights"] | None
    points: Float[Tensor, " levels"] | None
    levels: int
    bucket: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bits of an index."""
        return (self.levels - 1).bit_length()

    def dequantize(self) -> Float[Tensor, "..."]:
        """The tensor, equal to the bit on every device; four passes over the weights."""
        table = even_points(self.levels, self.alpha.dtype) if self.points is None else self.points
        values = table.to(self.alpha.device).index_select(0, self.indices.int())  # far faster than indexing
        rows, size = bucket_count(self.count, self.bucket), min(self.bucket or self.count, self.count)
        missing = rows * size - self.count
        negative = self.negative
        if missing:  # any value will do: it is dropped again
            values = nn.functional.pad(values, (0, missing))
            negative = None if negative is None else nn.functional.pad(negative, (0, missing))
        negative = None if negative is None else negative.view(rows, size)
        flat = unscale(values.view(rows, size), self.alpha, self.beta, negative, self.count)
        return flat.view(self.shape).to(self.dtype)


def even_points(levels: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, " levels"]:
    """Evenly spaced points 0, 1/(levels-1), …, 1, made on the CPU so that every device sees the same bits."""
    return torch.arange(levels, dtype=dtype) / max(levels - 1, 1)


class QuantizedStateDict(Mapping[str, QuantizedTensor]):
    """Quantised parameters of a model by name.

    Args:
        tensors: by parameter name.
    """

    def __init__(self, tensors: Mapping[str, QuantizedTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @torch.no_grad()
    def fill(self, model: nn.Module) -> nn.Module:
        """Writes the weights into a model's parameters and notes itself on the model, which is returned.

        Raises:
            KeyError: the model lacks one of the parameters.
            ValueError: one has another shape.
        """
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, quantized in self.items():
            if own[name].shape != quantized.shape:
                raise ValueError(f"'{name}' is {tuple(own[name].shape)}, and {quantized.shape} when quantised")
            own[name].copy_(quantized.dequantize())
        return note_quantization(model, self)

    def describes(self, model: nn.Module) -> bool:
        """Whether these are the model's very weights, to the bit."""
        own = dict(model.named_parameters(remove_duplicate=False))
        return all(name in own and _equal(own[name].detach(), quantized) for name, quantized in self.items())


def note_quantization(model: nn.Module, state: QuantizedStateDict) -> nn.Module:
    """Notes on a model how its weights are quantised; saved with it and found by `quantization_of`."""
    setattr(model, _ATTRIBUTE, state)
    return model


def quantization_of(model: nn.Module) -> QuantizedStateDict | None:
    """How a model's weights are quantised; None where nothing is noted, or the weights have moved since."""
    noted = getattr(model, _ATTRIBUTE, None)
    return noted if noted is not None and noted.describes(model) else None


def indices_of(levels: Num[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """Levels that are whole numbers from 0 to 255 as bytes."""
    return levels.to(torch.uint8)


def pooled_histogram(tensors: Iterable[QuantizedTensor]) -> list[int]:
    """How often each level index occurs in all tensors together, padding excluded."""
    total = torch.zeros(256, dtype=torch.int64)
    for tensor in tensors:
        total += torch.bincount(tensor.indices.int(), minlength=256).cpu()
    return total.tolist()


def _equal(weights: Tensor, quantized: QuantizedTensor) -> bool:
    if weights.shape != quantized.shape:
        return False
    return torch.equal(weights, quantized.dequantize().to(weights))  # in another precision they are still the same

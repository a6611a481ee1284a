"""The compact form of a quantised model: bit-packed indices, scales, points, and what is left in floating point."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compression.buckets import bucket_count
from limbeck.compression.huffman import mean_code_length
from limbeck.compression.packing import pack, packed_bytes, unpack
from limbeck.compression.quantized import QuantizedStateDict, QuantizedTensor, pooled_histogram

PLAIN = "plain/"
"""What names of tensors that are not quantised begin with."""

_PIECE = 1 << 20
"""Indices packed at a time, a multiple of eight: each then begins on a whole byte."""

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


def compact(state: QuantizedStateDict, plain: nn.Module | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that holds a quantised model.

    Indices take `QuantizedTensor.width` bits each, signs one. Tensors of one kind are joined, since each name costs
    some hundred bytes in a file's header.

    Args:
        state: the quantised parameters.
        plain: the model that they belong to, for its other parameters and buffers; None leaves these out.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("indices", "alpha", "beta", "negative", "points")}
    for tensor in state.values():
        parts["indices"].append(_packed(tensor.indices, tensor.width))
        if tensor.negative is not None:
            parts["negative"].append(_packed(tensor.negative, 1))
        parts["alpha"].append(tensor.alpha)
        parts["beta"] += [] if tensor.beta is None else [tensor.beta]
        parts["points"] += [] if tensor.points is None else [tensor.points]
    tensors = {name: torch.cat([piece.cpu() for piece in pieces]) for name, pieces in parts.items() if pieces}
    others, aliases = ({}, {}) if plain is None else _others(plain, state)
    tensors |= {PLAIN + name: tensor for name, tensor in others.items()}
    described = {"tensors": [_entry(name, tensor) for name, tensor in state.items()], "aliases": aliases}
    content = json.dumps(described, separators=(",", ":"))
    return tensors, {"quantized": content, "sha256": digest(content, tensors)}


def expand(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> tuple[QuantizedStateDict, dict[str, Tensor]]:
    """The inverse of `compact`: the quantised parameters, and a whole state dict where the file holds one.

    Args:
        tensors: of the file.
        content: the metadata's entry "quantized", read as JSON.

    Raises:
        ValueError, KeyError, TypeError: the parts do not go together.
    """
    reader = _Reader(tensors)
    state = QuantizedStateDict({str(entry["name"]): reader.tensor(entry) for entry in content["tensors"]})
    reader.finish()
    weights = {name.removeprefix(PLAIN): value for name, value in tensors.items() if name.startswith(PLAIN)}
    weights |= {name: quantized.dequantize() for name, quantized in state.items()}
    weights |= {alias: weights[name] for alias, name in content["aliases"].items()}
    return state, weights


def digest(content: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of description and tensors, so that a single altered bit is seen."""
    total = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def code_sizes(state: QuantizedStateDict) -> dict[str, int | float]:
    """What the quantised parameters cost: numbers of bits, by name.

    `nominal_bits`: the logarithm of the number of levels, a mean over the weights. `huffman_bits`: mean bits of an
    index in one Huffman code for all tensors. `bits_per_weight`: that, plus scales, signs and points at 32, 1 and 32
    bits each, shared out over the weights: the size that the paper counts, its points included.
    """
    tensors, weights = list(state.values()), sum(tensor.count for tensor in state.values())
    huffman = mean_code_length(pooled_histogram(tensors))
    extra = sum(32 * (_numel([t.alpha, t.beta, t.points])) + _numel([t.negative]) for t in tensors)
    return {
        "quantized_weights": weights,
        "nominal_bits": sum(tensor.count * math.log2(tensor.levels) for tensor in tensors) / weights,
        "huffman_bits": huffman,
        "bits_per_weight": huffman + extra / weights,
    }


def _numel(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _entry(name: str, tensor: QuantizedTensor) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bucket": tensor.bucket,
        "levels": tensor.levels,
        "learned": tensor.points is not None,
        "signed": tensor.negative is not None,
    }


def _others(model: nn.Module, state: QuantizedStateDict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that are not quantised, and the further names of those that have several."""
    others, aliases, seen = {}, {}, dict[tuple[object, ...], str]()
    stored = model.state_dict()
    for name in (*state, *(name for name in stored if name not in state)):
        tensor = stored[name]
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if (first := seen.setdefault(place, name)) != name:
            aliases[name] = first
        elif name not in state:
            others[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return others, aliases


def _packed(values: Tensor, width: int) -> Tensor:
    """Fields of one width, one after the other, as bytes."""
    pieces = values.split(_PIECE) if len(values) else [values]
    return torch.cat([pack(piece[None], width)[0] for piece in pieces])


class _Reader:
    """Cuts joined tensors into those that were joined."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.places = tensors, dict.fromkeys(tensors, 0)

    def tensor(self, entry: Mapping[str, Any]) -> QuantizedTensor:
        shape, levels, bucket = tuple(map(int, entry["shape"])), int(entry["levels"]), entry["bucket"]
        if (
            not 1 <= levels <= 256
            or not all(0 < side < 1 << 48 for side in shape)
            or (bucket is not None and bucket < 1)
        ):
            raise ValueError(f"'{entry['name']}' cannot have {levels} levels in a shape of {shape}")
        dtype, count = _DTYPES[entry["dtype"]], math.prod(shape)
        precise, buckets = torch.promote_types(dtype, torch.float32), bucket_count(count, bucket)
        indices = self._unpacked("indices", count, (levels - 1).bit_length())
        if int(indices.max()) >= levels:
            raise ValueError(f"'{entry['name']}' has a level that is not there")
        return QuantizedTensor(
            indices=indices.to(torch.uint8),
            alpha=self._take("alpha", buckets).to(precise),
            beta=None if entry["signed"] else self._take("beta", buckets).to(precise),
            negative=self._unpacked("negative", count, 1).bool() if entry["signed"] else None,
            points=self._take("points", levels).to(precise) if entry["learned"] else None,
            levels=levels,
            bucket=bucket,
            shape=shape,
            dtype=dtype,
        )

    def finish(self) -> None:
        """Refuses what nothing is said about."""
        for name, place in self.places.items():
            if not name.startswith(PLAIN) and place != len(self.tensors[name]):
                raise ValueError(f"'{name}' holds more than is described")

    def _take(self, name: str, count: int) -> Tensor:
        start = self.places[name]
        self.places[name] = start + count
        if self.places[name] > len(self.tensors[name]):
            raise ValueError(f"'{name}' holds less than is described")
        return self.tensors[name][start : start + count]

    def _unpacked(self, name: str, count: int, width: int) -> Tensor:
        taken = self._take(name, packed_bytes(count, width))
        sizes = [min(_PIECE, count - start) for start in range(0, count, _PIECE)]
        pieces = taken.split([packed_bytes(size, width) for size in sizes])
        return torch.cat([unpack(p[None], size, width)[0] for p, size in zip(pieces, sizes, strict=True)])

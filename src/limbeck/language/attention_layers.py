"""Where the attentions of a decoder are, what they are made of, and which blocks they stand in: told by structure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compression.matrices import is_transposed
from limbeck.core.errors import IncompatibleError

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
_KNOWN = "q_proj, k_proj and v_proj, or a fused qkv_proj or c_attn, with o_proj, out_proj, dense or c_proj"


@dataclass(frozen=True)
class Projections:
    """An attention's four linear maps as layers of their own.

    Attributes:
        queries: (width -> heads x size).
        keys: (width -> key heads x size).
        values: (width -> key heads x size).
        out: (heads x size -> width).
        heads: number of heads that attend; grouped heads share keys and values.
        size: of a head.
    """

    queries: nn.Linear
    keys: nn.Linear
    values: nn.Linear
    out: nn.Linear
    heads: int
    size: int


def attention_layers(model: nn.Module) -> list[str]:
    """Module paths of a decoder's attentions, first block first.

    Raises:
        IncompatibleError: the model is no plain decoder, or its attentions are built in a way that is not known here.
    """
    found = [path for path, module in model.named_modules() if _is_attention(module)]
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(config, "is_encoder_decoder", False):
        raise IncompatibleError(f"a {type(model).__name__} has an encoder", "decoders alone can be converted")
    expected = getattr(config, "num_hidden_layers", len(found))
    if not found or len(found) != expected:
        raise IncompatibleError(
            f"a {type(model).__name__} has {expected} layers, and {len(found)} attentions of a known kind",
            f"known are decoders whose attentions have {_KNOWN}, one a layer",
        )
    return found


def block_of(path: str) -> str:
    """Path of the block that an attention is part of."""
    return path.rpartition(".")[0]


def mlp_parameters(model: nn.Module, attention: str) -> Iterator[nn.Parameter]:
    """Parameters of whatever stands beside an attention in its block and holds matrices; norms do not."""
    block = model.get_submodule(block_of(attention))
    for name, child in block.named_children():
        if name != attention.rpartition(".")[2] and any(weight.ndim > 1 for weight in child.parameters()):
            yield from child.parameters()


def projections(attention: nn.Module) -> Projections:
    """The linear maps of an attention, whichever way it holds them; weights are copied where they are fused.

    Raises:
        IncompatibleError: their sizes are not those of a plain attention (gates among the queries, say).
    """
    parts: Any = attention
    out = _linear(next(getattr(parts, name) for name in _OUTPUTS if hasattr(parts, name)))
    size = getattr(parts, "head_dim", None)
    if not isinstance(size, int) or out.in_features % size:
        raise IncompatibleError(f"a {type(attention).__name__} does not say how large its heads are (head_dim)")
    wide = out.in_features
    if hasattr(parts, "q_proj"):
        queries, keys, values = (_linear(getattr(parts, f"{name}_proj")) for name in ("q", "k", "v"))
    else:
        fused = _linear(parts.c_attn if hasattr(parts, "c_attn") else parts.qkv_proj)
        narrow = (fused.out_features - wide) // 2
        queries, keys, values = _split(fused, [wide, narrow, narrow])
    if queries.out_features != wide or keys.out_features != values.out_features or wide % values.out_features:
        raise IncompatibleError(f"a {type(attention).__name__} is no plain attention: its projections differ in size")
    return Projections(queries, keys, values, out, wide // size, size)


def _is_attention(module: nn.Module) -> bool:
    separate = all(isinstance(getattr(module, f"{name}_proj", None), nn.Linear) for name in ("q", "k", "v"))
    fused = any(hasattr(module, name) for name in ("qkv_proj", "c_attn"))
    crossed = hasattr(module, "q_attn")  # GPT-2's cross-attention
    return (separate or fused) and not crossed and any(hasattr(module, name) for name in _OUTPUTS)


def _linear(layer: Any) -> nn.Linear:
    """The layer itself, or the same map as a linear layer where it is a Conv1D of transformers (weight transposed)."""
    if isinstance(layer, nn.Linear):
        return layer
    if not is_transposed(layer):
        raise IncompatibleError(f"a projection is a {type(layer).__name__}, not a linear layer")
    return _layer(layer.weight.T, layer.bias)


def _split(fused: nn.Linear, sizes: list[int]) -> list[nn.Linear]:
    biases = [None] * len(sizes) if fused.bias is None else fused.bias.split(sizes)
    return [_layer(weight, bias) for weight, bias in zip(fused.weight.split(sizes), biases, strict=True)]


@torch.no_grad()
def _layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made

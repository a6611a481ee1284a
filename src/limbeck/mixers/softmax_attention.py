"""Softmax attention: what the others are measured against, and what hybrids keep."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from limbeck.mixers.attention import ProjectedMixer
from limbeck.mixers.mixer import precise


@dataclass(frozen=True)
class SoftmaxAttentionState:
    """All keys and values so far: it grows with the length."""

    keys: Float[Tensor, "batch seen heads size"]
    values: Float[Tensor, "batch seen heads size"]
    valid: Bool[Tensor, "batch seen"] | None
    """False at padding; absent where there was none."""
    count: Int[Tensor, " batch"]
    """Tokens so far, padding not counted: the next token's position."""


class SoftmaxAttention(ProjectedMixer):
    r"""Each token's average of the values, by the softmax of its query on the keys (Vaswani et al., 2017).

    .. math:: y_i = \sum_j \text{softmax}_j\!\left(q_i^\top k_j / \sqrt{d}\right) v_j

    Time is quadratic in the length, 4 length^2 width FLOPs beyond the projections; the matrix is not held.

    Args:
        width, heads, kv_heads, bias, out_bias: see `ProjectedMixer`.
        causal: whether a token sees none after it.
        rotary: base of rotary positions (Su et al., 2021), in the halves' order of transformers; none if absent.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        causal: bool = True,
        rotary: float | None = None,
        bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(width, heads, kv_heads, bias=bias, out_bias=out_bias)
        self.causal, self.rotary = causal, rotary

    def prefill(
        self,
        hidden: Float[Tensor, "batch length width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        state: SoftmaxAttentionState | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], SoftmaxAttentionState]:
        if state is not None:
            self._needs_order()
        queries, after = self._project(hidden, mask, state)
        grouped = self.kv_heads != self.heads
        q, k, v = (x.transpose(1, 2) for x in (queries, after.keys, after.values))
        few, seen = q.shape[2], k.shape[2]
        whole = after.valid is None and (few in (1, seen) or not self.causal)
        allowed = None if whole else self._allowed(few, after)
        y = functional.scaled_dot_product_attention(
            q, k, v, allowed, is_causal=whole and self.causal and few > 1, enable_gqa=grouped
        )
        out = self.o_proj(y.transpose(1, 2).flatten(2))
        return (out if mask is None else out * mask[..., None]), after

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SoftmaxAttentionState:
        self._needs_order()
        device, dtype = self._place(device, dtype)
        none = torch.zeros(batch, 0, self.kv_heads, self.size, device=device, dtype=dtype)
        return SoftmaxAttentionState(none, none, None, torch.zeros(batch, dtype=torch.long, device=device))

    def materialize(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch heads length length"]:
        queries, state = self._project(hidden, mask, None)
        with torch.autocast(hidden.device.type, enabled=False):
            q, k = precise(queries).transpose(1, 2), precise(self._per_head(state.keys)).permute(0, 2, 3, 1)
            scores = q @ k * self.size**-0.5
            matrix = scores.masked_fill(~self._allowed(len(q[0, 0]), state), -torch.inf).softmax(-1)
        return matrix if mask is None else matrix * (mask[:, None, :, None] & mask[:, None, None, :])

    def _project(
        self, hidden: Tensor, mask: Tensor | None, state: SoftmaxAttentionState | None
    ) -> tuple[Tensor, SoftmaxAttentionState]:
        """Queries, and the state that the given tokens join."""
        batch, length = hidden.shape[:2]
        q, k, v = (self._split(layer(hidden)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        here = hidden.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
        count = here.new_zeros(batch, dtype=torch.long) if state is None else state.count
        if self.rotary is not None:
            positions = count[:, None] + here.cumsum(1) - 1
            q, k = rotate(q, positions, self.rotary), rotate(k, positions, self.rotary)
        valid = mask
        if state is not None:
            if mask is not None or state.valid is not None:
                before = here.new_ones(batch, state.keys.shape[1]) if state.valid is None else state.valid
                valid = torch.cat([before, here], 1)
            k, v = torch.cat([state.keys.to(k.dtype), k], 1), torch.cat([state.values.to(v.dtype), v], 1)
        return q, SoftmaxAttentionState(k, v, valid, count + here.sum(1))

    def _allowed(self, few: int, state: SoftmaxAttentionState) -> Tensor:
        """Which of the tokens seen each of the last `few` may look at; padding at itself, so that no row is empty."""
        seen, device = state.keys.shape[1], state.keys.device
        own = torch.eye(seen, dtype=torch.bool, device=device)[seen - few :]
        allowed = torch.ones(few, seen, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed.tril(seen - few)
        return allowed[None, None] if state.valid is None else (allowed & state.valid[:, None] | own)[:, None]


def rotate(
    x: Float[Tensor, "batch length heads size"], positions: Int[Tensor, "batch length"], base: float
) -> Float[Tensor, "batch length heads size"]:
    """Rotary positions: entries j and j + size/2 are turned by position x base^(-2j / size); angles in float32."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (positions[..., None].float() * rates)[:, :, None]
    first, second = precise(x).split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

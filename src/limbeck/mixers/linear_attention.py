"""Linear attention: the softmax's kernel replaced by a product of features, so that sums can be shared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from limbeck.mixers.attention import ProjectedMixer
from limbeck.mixers.mixer import in_pieces, longest_piece, precise
from limbeck.mixers.state_space import BLOCK, mixing_matrix, ssd

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: functional.elu(x) + 1,
    "relu": functional.relu,
    "softplus": functional.softplus,
    "softmax": lambda x: x.softmax(-1),
    "identity": lambda x: x,
}
"""Feature maps, head by head. All but "identity" are at least 0, which dividing by their sum needs."""


@dataclass(frozen=True)
class LinearAttentionState:
    """Sums over the tokens so far, of a size that does not depend on their number; float32 or better."""

    sums: Float[Tensor, "batch heads rows features"]
    """Values times features of keys, and in a last row the features alone where outputs are divided by their sum."""


class LinearAttention(ProjectedMixer):
    r"""Attention with weights that are products of features (Katharopoulos et al., 2020).

    .. math:: y_i = \frac{\sum_j \phi(q_i)^\top \phi(k_j)\, v_j}{\sum_j \phi(q_i)^\top \phi(k_j) + \epsilon}

    The sum runs to i where it is causal (by blocks; see `ssd`), else over all tokens: 4 size width FLOPs a token beyond
    the projections.

    Args:
        width, heads, kv_heads, bias, out_bias: see `ProjectedMixer`.
        causal: whether a token sees none after it.
        feature: one of `FEATURES`.
        normalise: whether to divide by the sum of the weights.
        epsilon: added to that sum.
        block: tokens that are mixed by one matrix where it is causal.

    Raises:
        ValueError: there is no such feature map, or it has both signs and is to be normalised.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        causal: bool = True,
        feature: str = "elu",
        normalise: bool = True,
        epsilon: float = 1e-6,
        bias: bool = False,
        out_bias: bool = False,
        block: int = BLOCK,
    ) -> None:
        super().__init__(width, heads, kv_heads, bias=bias, out_bias=out_bias)
        if feature not in FEATURES:
            raise ValueError(f"no feature map '{feature}': choose one of {', '.join(FEATURES)}")
        if normalise and feature == "identity":
            raise ValueError("weights of both signs may add up to 0: use normalise=False with feature='identity'")
        self.causal, self.feature, self.normalise, self.epsilon, self.block = causal, feature, normalise, epsilon, block

    def prefill(
        self,
        hidden: Float[Tensor, "batch length width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        state: LinearAttentionState | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], LinearAttentionState]:
        if state is not None:
            self._needs_order()
        if self.causal and (piece := longest_piece(hidden)) < hidden.shape[1]:
            return in_pieces(self, hidden, mask, state, piece)
        q, k, v = self._project(hidden, mask)
        sums = None if state is None else state.sums
        if self.normalise:
            v = functional.pad(v, (0, 1), value=1.0)
        if self.causal:
            y, sums = ssd(v, None, k, q, None, self.block, sums)
        else:
            y, sums = summed(q, k, v)
        if self.normalise:
            y = y[..., :-1] / (y[..., -1:] + self.epsilon)
        out = self.o_proj(y.flatten(2).to(hidden.dtype))
        return (out if mask is None else out * mask[..., None]), LinearAttentionState(sums)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LinearAttentionState:
        self._needs_order()
        device, dtype = self._place(device, dtype)
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        rows = self.size + self.normalise
        return LinearAttentionState(torch.zeros(batch, self.heads, rows, self.size, device=device, dtype=dtype))

    def materialize(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch heads length length"]:
        q, k, _ = self._project(hidden, mask)
        matrix = mixing_matrix(None, k, q) if self.causal else q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        if self.normalise:
            matrix = matrix / (matrix.sum(-1, keepdim=True) + self.epsilon)
        return matrix if mask is None else matrix * mask[:, None, :, None]

    def _project(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys (0 at padding), and values, in float32 or better."""
        phi = FEATURES[self.feature]
        q, k, v = (precise(self._split(layer(hidden))) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = phi(q), phi(k)
        if mask is not None:
            k = k * mask[..., None, None]
        return q, self._per_head(k), self._per_head(v)


def summed(
    q: Float[Tensor, "batch length heads features"],
    k: Float[Tensor, "batch length heads features"],
    v: Float[Tensor, "batch length heads rows"],
) -> tuple[Float[Tensor, "batch length heads rows"], Float[Tensor, "batch heads rows features"]]:
    """What every query takes from the sum over all tokens of value times key, and that sum."""
    with torch.autocast(q.device.type, enabled=False):
        sums = v.permute(0, 2, 3, 1) @ k.transpose(1, 2)
        return (q.transpose(1, 2) @ sums.transpose(-1, -2)).transpose(1, 2), sums

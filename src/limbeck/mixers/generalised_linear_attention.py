"""The attention over pixels of LinFusion: linear, in both directions, normalised, with deeper features."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from limbeck.mixers.attention import ProjectedMixer
from limbeck.mixers.linear_attention import summed
from limbeck.mixers.mixer import precise


class GeneralisedLinearAttention(ProjectedMixer):
    r"""Normalised linear attention over all tokens (Liu et al., LinFusion, 2024).

    .. math::
        q = W_q (x + \psi_q(x)), \quad k = W_k (x + \psi_k(x)), \quad v = W_v x, \quad \phi(u) = \text{elu}(u) + 1

        y_i = \frac{\phi(q_i)^\top \frac{1}{N} \sum_j \phi(k_j) v_j^\top}
                   {\phi(q_i)^\top \frac{1}{N} \sum_j \phi(k_j) + \epsilon}

    Means instead of sums, so that a model trained on few pixels works on many. Per token 4 size width FLOPs beyond the
    projections, and 8 width x middle for both psi.

    Args:
        width, heads, bias, out_bias: see `ProjectedMixer`; attentions of diffusers have out_bias.
        middle: width inside psi, a linear map, a layer norm, a leaky ReLU and a linear map; the width if absent, and
            psi(x) = x with -1.
        epsilon: added to the denominator.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        middle: int | None = None,
        epsilon: float = 1e-4,
        bias: bool = False,
        out_bias: bool = True,
    ) -> None:
        super().__init__(width, heads, bias=bias, out_bias=out_bias)
        self.epsilon = epsilon
        self.psi_q, self.psi_k = _psi(width, middle), _psi(width, middle)

    def prefill(
        self,
        hidden: Float[Tensor, "batch length width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        state: None = None,
    ) -> tuple[Float[Tensor, "batch length width"], None]:
        if state is not None:
            self._needs_order()
        q, k, v = self._project(hidden, mask)
        y, _ = summed(q, k, functional.pad(v, (0, 1), value=1.0))
        y = y[..., :-1] / (y[..., -1:] + self.epsilon)
        out = self.o_proj(y.flatten(2).to(hidden.dtype))
        return (out if mask is None else out * mask[..., None]), None

    def step(self, hidden: Tensor, state: Any) -> Any:
        """Not possible: every token sees all others.

        Raises:
            ValueError: always.
        """
        self._needs_order()

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """Not possible: every token sees all others.

        Raises:
            ValueError: always.
        """
        self._needs_order()

    def materialize(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch heads length length"]:
        q, k, _ = self._project(hidden, mask)
        matrix = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        matrix = matrix / (matrix.sum(-1, keepdim=True) + self.epsilon)
        return matrix if mask is None else matrix * mask[:, None, :, None]

    def _project(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries, those of keys over the number of tokens, and values, in float32 or better."""
        q = self.q_proj(hidden + self.psi_q(hidden))
        k = self.k_proj(hidden + self.psi_k(hidden))
        q, k, v = (precise(self._split(x)) for x in (q, k, self.v_proj(hidden)))
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        if mask is None:
            return q, k / hidden.shape[1], v
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        return q, k * share[..., None, None].to(k.dtype), v


def _psi(width: int, middle: int | None) -> nn.Module:
    if middle == -1:
        return nn.Identity()
    middle = middle or width
    return nn.Sequential(nn.Linear(width, middle), nn.LayerNorm(middle), nn.LeakyReLU(), nn.Linear(middle, width))

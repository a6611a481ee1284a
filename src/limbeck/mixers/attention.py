"""What attentions have in common: projections to queries, keys and values by head, and one back."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.mixers.mixer import Mixer


class ProjectedMixer(Mixer):
    """A mixer with W_q, W_k, W_v and W_o, of the names that transformers gives them.

    Args:
        width: of the hidden states.
        heads: of the queries.
        kv_heads: of keys and values; each serves heads / kv_heads of the queries' (grouped heads). `heads` if absent.
        bias: whether W_q, W_k and W_v have biases.
        out_bias: whether W_o has one.

    Attributes:
        causal: whether a token sees none after it.

    Raises:
        ValueError: heads do not divide the width, or kv_heads the heads.
    """

    causal: bool = False

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, *, bias: bool = False, out_bias: bool = False
    ) -> None:
        super().__init__()
        self.width, self.heads, self.kv_heads = width, heads, kv_heads or heads
        if width % heads or heads % self.kv_heads:
            raise ValueError(f"{heads} heads must divide the width {width}, and {self.kv_heads} shared ones the heads")
        self.size = width // heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=out_bias)

    @torch.no_grad()
    def take_projections(self, queries: nn.Linear, keys: nn.Linear, values: nn.Linear, out: nn.Linear) -> None:
        """Copies an attention's projections.

        Raises:
            RuntimeError: shapes differ, or one side has a bias.
        """
        for mine, given in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, values), (self.o_proj, out)):
            mine.load_state_dict(given.state_dict())

    def _split(self, projected: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch length heads size"]:
        return projected.unflatten(-1, (-1, self.size))

    def _per_head(self, x: Float[Tensor, "batch length kv size"]) -> Float[Tensor, "batch length heads size"]:
        """Shared keys or values once for each head that uses them."""
        return x if x.shape[2] == self.heads else x.repeat_interleave(self.heads // x.shape[2], 2)

    def _needs_order(self) -> None:
        if not self.causal:
            raise ValueError("attention in both directions has no state: take a causal mixer to go step by step")

"""The mixer of MOHAWK: Mamba-2 with a discrete decay, gated, behind a short convolution."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from limbeck.mixers.convolution import causal_convolution
from limbeck.mixers.mixer import Mixer, in_pieces, longest_piece, precise
from limbeck.mixers.state_space import BLOCK, mixing_matrix, ssd, ssd_step

OPEN_GATE = 1.27846
"""Where SiLU is 1."""


@dataclass(frozen=True)
class DiscreteMamba2State:
    """What is remembered, of a size that does not depend on the length."""

    window: Float[Tensor, "batch before channels"]
    """The last inputs of the convolution."""
    ssm: Float[Tensor, "batch heads size state"]
    """The state of each head; float32 or better."""


class DiscreteMamba2(Mixer):
    r"""A state-space model whose decay is a function of the token (Bick et al., MOHAWK, 2024).

    .. math::
        [x, B, C \mid z \mid a] = W_{in} u, \quad (x, B, C) \leftarrow \text{conv}(x, B, C), \quad
        \lambda_t = \sigma(-a_t)

        S_t = \lambda_t S_{t-1} + x_t B_t^\top, \quad y_t = S_t C_t + D x_t, \quad
        \text{out} = W_{out}\,(y \odot \text{SiLU}(z + b_z))

    Args:
        width: d, of the hidden states.
        heads: h; each has queries, keys and values of its own.
        state: size n of B and C.
        expand: heads are width x expand / heads wide.
        taps: of the convolution, which has no activation.
        out_bias: whether W_out has a bias, as the output of some attentions has.
        block: tokens that are mixed by one matrix; see `ssd`.

    Raises:
        ValueError: the heads do not divide the inner width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        state: int = 64,
        *,
        expand: float = 1.0,
        taps: int = 4,
        out_bias: bool = False,
        block: int = BLOCK,
    ) -> None:
        super().__init__()
        inner = round(width * expand)
        if inner % heads:
            raise ValueError(f"{heads} heads do not divide the inner width {inner}")
        self.width, self.heads, self.state, self.block = width, heads, state, block
        self.inner, self.size, self.taps = inner, inner // heads, taps
        self.channels = inner + 2 * heads * state
        self.in_proj = nn.Linear(width, self.channels + inner + heads, bias=False)
        self.conv = nn.Conv1d(self.channels, self.channels, taps, groups=self.channels)
        self.D = nn.Parameter(torch.ones(heads))
        self.z_bias = nn.Parameter(torch.zeros(inner))
        self.out_proj = nn.Linear(inner, width, bias=out_bias)

    def prefill(
        self,
        hidden: Float[Tensor, "batch length width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        state: DiscreteMamba2State | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], DiscreteMamba2State]:
        if (piece := longest_piece(hidden)) < hidden.shape[1]:
            return in_pieces(self, hidden, mask, state, piece)
        x, b, c, z, log_decay, window = self._project(hidden, mask, state)
        ssm = None if state is None else state.ssm
        if hidden.shape[1] == 1 and ssm is not None:
            y, ssm = ssd_step(x[:, 0], log_decay[:, 0], b[:, 0], c[:, 0], self.D, ssm)
            y = y[:, None].to(z.dtype)
        else:
            y, ssm = ssd(x, log_decay, b, c, self.D, self.block, ssm)
        out = self.out_proj(y.flatten(2) * functional.silu(z + self.z_bias))
        return (out if mask is None else out * mask[..., None]), DiscreteMamba2State(window, ssm)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DiscreteMamba2State:
        device, dtype = self._place(device, dtype)
        window = torch.zeros(batch, self.taps - 1, self.channels, device=device, dtype=dtype)
        return DiscreteMamba2State(window, precise(window).new_zeros(batch, self.heads, self.size, self.state))

    def materialize(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch heads length length"]:
        _, b, c, _, log_decay, _ = self._project(hidden, mask, None)
        matrix = mixing_matrix(log_decay, b, c, self.D)
        return matrix if mask is None else matrix * (mask[:, None, :, None] & mask[:, None, None, :])

    def values(
        self, hidden: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length heads size"]:
        """What the matrix mixes: x behind the convolution."""
        return self._project(hidden, mask, None)[0]

    @torch.no_grad()
    def open_gate(self) -> None:
        """Makes SiLU(z + b_z) 1 for every input, so that the output is W_out of what was mixed."""
        self._rows("z").zero_()
        self.z_bias.fill_(OPEN_GATE)

    @torch.no_grad()
    def identity_convolution(self) -> None:
        """Makes the convolution pass its input on."""
        self.conv.weight.zero_()
        self.conv.weight[..., -1] = 1.0
        assert self.conv.bias is not None
        self.conv.bias.zero_()

    @torch.no_grad()
    def take_projections(
        self,
        queries: nn.Linear | None = None,
        keys: nn.Linear | None = None,
        values: nn.Linear | None = None,
        out: nn.Linear | None = None,
    ) -> None:
        """Copies an attention's projections: queries to C, keys to B, values to x, out to the output.

        Heads that share keys and values (grouped heads) are repeated. Biases of the first three become biases of the
        convolution, which is exact where that is the identity: call `identity_convolution` before this. A state larger
        than the attention's head keeps C . B as it is: further rows of C become 0, and those of B stay.

        Raises:
            ValueError: sizes do not fit, or `out` has a bias and this was built without `out_bias`.
        """
        for name, layer, size in (("C", queries, self.state), ("B", keys, self.state), ("x", values, self.size)):
            if layer is not None:
                self._take(name, layer, size)
        if out is None:
            return
        if out.weight.shape != self.out_proj.weight.shape:
            raise ValueError(f"output of {tuple(out.weight.shape)} into {tuple(self.out_proj.weight.shape)}")
        if (out.bias is None) != (self.out_proj.bias is None):
            raise ValueError("one of both outputs has a bias: build DiscreteMamba2 with out_bias as the attention has")
        self.out_proj.load_state_dict(out.state_dict())

    def _take(self, name: str, layer: nn.Linear, size: int) -> None:
        """Rows of a layer, head by head, into those of x, B or C."""
        rows = self._rows(name).unflatten(0, (self.heads, size))
        first, count = self._places()[name]
        assert self.conv.bias is not None
        biases = self.conv.bias[first : first + count].unflatten(0, (self.heads, size))
        given = self._head_size(layer, name, size)
        weight = layer.weight.unflatten(0, (-1, given))
        repeats = self.heads // len(weight)
        rows[:, :given] = weight.repeat_interleave(repeats, 0).to(rows.dtype)
        biases[:, :given] = 0.0
        if layer.bias is not None:
            biases[:, :given] = layer.bias.unflatten(0, (-1, given)).repeat_interleave(repeats, 0).to(biases.dtype)
        if name == "C":
            rows[:, given:] = 0.0
            biases[:, given:] = 0.0

    def _head_size(self, layer: nn.Linear, name: str, size: int) -> int:
        """The size of the attention's heads; for queries and keys it may be below the state's."""
        given = self.size if name != "C" else layer.out_features // self.heads
        if given > size or layer.out_features % given or self.heads % (layer.out_features // given):
            raise ValueError(f"{layer.out_features} rows do not make {self.heads} heads of at most {size} for {name}")
        return given

    def _places(self) -> dict[str, tuple[int, int]]:
        """First row and number of rows of each part of the projection."""
        counts = {"x": self.inner, "B": self.heads * self.state, "C": self.heads * self.state}
        counts |= {"z": self.inner, "a": self.heads}
        firsts = torch.tensor([0, *counts.values()]).cumsum(0).tolist()
        return {name: (first, count) for (name, count), first in zip(counts.items(), firsts, strict=False)}

    def _rows(self, name: str) -> Tensor:
        first, count = self._places()[name]
        return self.in_proj.weight[first : first + count]

    def _project(self, hidden: Tensor, mask: Tensor | None, state: DiscreteMamba2State | None) -> tuple[Any, ...]:
        """x, B, C by head, z, the log decay by head, and the convolution's window."""
        joined, z, a = self.in_proj(hidden).split([self.channels, self.inner, self.heads], -1)
        window = None if state is None else state.window
        joined, window = causal_convolution(joined, self.conv.weight[:, 0], self.conv.bias, window, mask)
        log_decay = -functional.softplus(precise(a))
        if mask is not None:
            log_decay = log_decay * mask[..., None]  # nothing is written at padding (0 there), and nothing forgotten
        counts = [self.inner, self.heads * self.state, self.heads * self.state]
        x, b, c = (part.unflatten(-1, (self.heads, -1)) for part in joined.split(counts, -1))
        return x, b, c, z, log_decay, window

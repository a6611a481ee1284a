"""State-space models with one scalar decay a head and token (Dao and Gu, *Transformers are SSMs*, 2024).

Of each head the state S (size x state) follows S_t = exp(l_t) S_{t-1} + x_t B_t^T and gives y_t = S_t C_t + D x_t. All
of it at once is y = T x with T_ij = (C_i . B_j) exp(l_{j+1} + ... + l_i) for j <= i. Log decays l are at most 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.mixers import kernels
from limbeck.mixers.mixer import precise
from limbeck.objectives.operands import full_precision

BLOCK = 64
"""Tokens in a block; near size x state / (size + state) the work within blocks equals that between them."""


def ssd(
    X: Float[Tensor, "batch length heads size"],
    log_decay: Float[Tensor, "batch length heads"] | None,
    B: Float[Tensor, "batch length heads state"],
    C: Float[Tensor, "batch length heads state"],
    D: Float[Tensor, " heads"] | None = None,
    block: int = BLOCK,
    initial_state: Float[Tensor, "batch heads size state"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch length heads size"], Float[Tensor, "batch heads size state"]]:
    """T X by blocks of tokens: matrices within a block, states from block to block.

    A token and head take 2 block (state + size) FLOPs within its block and 4 size x state for the states; held are
    2 block + 2 size x state / block numbers each, so that time and memory are linear in the length. In torch it is
    float32 or better inside. Kernels multiply in X's precision, float32 on tensor cores at less than that, and add in
    float32; so "auto" leaves float32 to torch.

    Args:
        X: what is mixed.
        log_decay: log of the decay before each token; at most 0. Sums are never exponentiated where they are positive.
            Absent where nothing decays (causal linear attention).
        B: what writes into the state.
        C: what reads from the state.
        D: a head's own weight of the token itself.
        block: tokens in a block; the result does not depend on it. The length need not be a multiple.
        initial_state: before the first token; zeros if absent.
        backend: "torch", "fla", "mamba_ssm", or "auto": see `kernels.Backend`.

    Returns:
        Outputs in X's dtype, and the state after the last token in float32 or better.
    """
    wide = min(X.shape[-1], B.shape[-1]) >= 16  # what a tensor core multiplies at least
    supported = wide and X.dtype != torch.float64 and (backend != "auto" or X.dtype != torch.float32)
    able = {"fla": supported, "mamba_ssm": supported and log_decay is not None}
    chosen = kernels.choose(backend, X.device, able)
    if chosen == "fla":
        y, last = kernels.fla_ssd(X, log_decay, B, C, initial_state)
    elif chosen == "mamba_ssm":
        assert log_decay is not None
        y, last = kernels.mamba_ssd(X, log_decay, B, C, block, initial_state)
    else:
        y, last = _by_blocks(X, log_decay, B, C, max(1, min(block, X.shape[1])), initial_state)
    if D is not None:
        y = y + precise(D)[:, None] * X
    return y.to(X.dtype), last


@full_precision
def ssd_step(
    x: Float[Tensor, "batch heads size"],
    log_decay: Float[Tensor, "batch heads"],
    B: Float[Tensor, "batch heads state"],
    C: Float[Tensor, "batch heads state"],
    D: Float[Tensor, " heads"] | None,
    state: Float[Tensor, "batch heads size state"],
) -> tuple[Float[Tensor, "batch heads size"], Float[Tensor, "batch heads size state"]]:
    """One token of `ssd`: output and the state after it, both in float32 or better; 6 size x state FLOPs a head."""
    state = log_decay.exp()[..., None, None] * state + x[..., None] * B[..., None, :]
    y = (state @ C[..., None]).squeeze(-1)
    return (y if D is None else y + D[:, None] * x), state


def ssd_loop(
    X: Float[Tensor, "batch length heads size"],
    log_decay: Float[Tensor, "batch length heads"],
    B: Float[Tensor, "batch length heads state"],
    C: Float[Tensor, "batch length heads state"],
    D: Float[Tensor, " heads"] | None = None,
    initial_state: Float[Tensor, "batch heads size state"] | None = None,
) -> tuple[Float[Tensor, "batch length heads size"], Float[Tensor, "batch heads size state"]]:
    """The same as `ssd`, token by token: what the others are tested against."""
    state = initial_state
    if state is None:
        state = precise(X).new_zeros(X.shape[0], X.shape[2], X.shape[3], B.shape[3])
    outputs = []
    for t in range(X.shape[1]):
        y, state = ssd_step(X[:, t], log_decay[:, t], B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, 1).to(X.dtype), state


@full_precision
def mixing_matrix(
    log_decay: Float[Tensor, "batch length heads"] | None,
    B: Float[Tensor, "batch length heads state"],
    C: Float[Tensor, "batch length heads state"],
    D: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads length length"]:
    """T, with D on its diagonal; 2 length^2 state FLOPs a head, float32 or better."""
    matrix = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)
    matrix = matrix.tril() if log_decay is None else matrix * segment_sums(log_decay.transpose(1, 2)).exp()
    return matrix if D is None else matrix + torch.diag_embed(D[:, None].expand(-1, matrix.shape[-1]))


def segment_sums(x: Float[Tensor, "*shape length"]) -> Float[Tensor, "*shape length length"]:
    """Sums x_{j+1} + ... + x_i in row i, column j: 0 on the diagonal, minus infinity above.

    They are differences of running sums, which are taken in float64: after a strong decay (-1000) the difference of
    two float32 sums would know a weak one (-0.01) to two digits only.
    """
    total = x.double().cumsum(-1)
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).to(x.dtype).masked_fill(later, -torch.inf)


@full_precision
def _by_blocks(
    X: Tensor, log_decay: Tensor | None, B: Tensor, C: Tensor, block: int, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    length = X.shape[1]
    x, b, c = (_blocks(tensor, block) for tensor in (X, B, C))
    within = c @ b.transpose(-1, -2)
    if log_decay is None:
        within, kept = within.tril(), None
    else:
        decay = _blocks(log_decay[..., None], block).squeeze(-1)
        sums = segment_sums(decay)
        within = within * sums.exp()
        # The last row of the sums reaches from each token to the block's end, their first column, with the first
        # token's own decay, from the block's start to each token.
        from_start = (sums[..., 0] + decay[..., :1]).exp()
        b, c, kept = b * sums[..., -1, :, None].exp(), c * from_start[..., None], from_start[..., -1]
    entering, last = _carry(x.transpose(-1, -2) @ b, kept, state)
    y = within @ x + c @ entering.transpose(-1, -2)
    return y.flatten(2, 3).transpose(1, 2)[:, :length], last


def _blocks(x: Tensor, block: int) -> Tensor:
    """(batch, length, heads, n) as (batch, heads, blocks, block, n), the last block filled with zeros."""
    rest = -x.shape[1] % block
    if rest:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, rest))
    return x.transpose(1, 2).unflatten(2, (-1, block)).contiguous()  # once, not in each product that follows


def _carry(written: Tensor, kept: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states with which blocks begin, and the last: one after the other, so linear in the number of blocks."""
    state = torch.zeros_like(written[:, :, 0]) if state is None else state.to(written.dtype)
    entering = []
    for block, added in enumerate(written.unbind(2)):
        entering.append(state)
        state = added + (state if kept is None else kept[:, :, block, None, None] * state)
    return torch.stack(entering, 2), state

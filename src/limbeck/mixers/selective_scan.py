"""The selective scan of Mamba: a decay for every channel and state (Gu and Dao, *Mamba*, 2023).

For channel d and state n: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = sum_n C_t h_t + D u_t, times silu(z).
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from limbeck.mixers import kernels
from limbeck.mixers.mixer import precise

STEPS = 16
"""Tokens one after the other within a lane."""
ENTRIES = {"cpu": 2**15, "cuda": 2**21}
"""States (of all lanes) to be moved by one operation: enough to hide its start, few enough for the cache."""


def selective_scan(
    u: Float[Tensor, "batch channels length"],
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state length"],
    C: Float[Tensor, "batch *groups state length"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch channels length"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "batch channels state"] | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Any:
    """The scan over a whole sequence, in float32 or better.

    In torch it goes segment by segment; a segment's lanes are scanned side by side, and each then gets what the one
    before it handed on. Only products of decays occur, never a quotient, so that nothing overflows. About 9 FLOPs a
    channel, state and token forward (one of them an exponential) and 25 backward. The states of one segment at a time
    are in memory; kept for the gradient are the inputs and one state a segment. Gradients are computed once, not twice.

    Args:
        u: inputs.
        delta: step sizes, at least 0 (after bias and softplus).
        A: rates, at most 0.
        B: what writes; (batch, groups, state, length), where channel d is of group d // (channels / groups), or
            without the groups' axis for a single group.
        C: what reads; shaped as B may be.
        D: weight of the input in the output.
        z: gate.
        delta_bias: added to delta.
        delta_softplus: whether delta passes through a softplus.
        initial_state: before the first token; zeros if absent.
        return_last_state: whether to return the state after the last token as well.
        backend: "torch", "mamba_ssm", or "auto": see `kernels.Backend`. mamba_ssm neither takes an initial state nor
            passes a gradient through the last.

    Returns:
        Outputs like u in shape and dtype; with `return_last_state` also the state, in float32 or better.
    """
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, delta, A, B, C))
    fits = initial_state is None and u.dtype != torch.float64 and not (return_last_state and learns)
    if kernels.choose(backend, u.device, {"mamba_ssm": fits}) == "mamba_ssm":
        y, last = kernels.mamba_selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (y, last) if return_last_state else y
    values, steps = precise(u), _steps(delta, delta_bias, delta_softplus)
    B, C = (precise(t if t.dim() == 4 else t[:, None]) for t in (B, C))
    rates = precise(A).unflatten(0, (B.shape[1], -1))  # (groups, each, state)
    state = values.new_zeros(len(u), *rates.shape)
    if initial_state is not None:
        state = state + precise(initial_state).unflatten(1, rates.shape[:2])
    lanes = _lanes(state, u.shape[2])
    by_group = (t.unflatten(1, rates.shape[:2]) for t in (values, steps))
    y, last = _Scan.apply(*(_laned(t, lanes) for t in by_group), rates, _laned(B, lanes), _laned(C, lanes), state)
    y = y.transpose(1, 2).flatten(0, 2)[: u.shape[2]].permute(1, 2, 3, 0).flatten(1, 2)
    y = _finish(y, values, D, z).to(u.dtype)
    return (y, last.flatten(1, 2)) if return_last_state else y


def selective_scan_loop(
    u: Float[Tensor, "batch channels length"],
    delta: Float[Tensor, "batch channels length"],
    A: Float[Tensor, "channels state"],
    B: Float[Tensor, "batch *groups state length"],
    C: Float[Tensor, "batch *groups state length"],
    D: Float[Tensor, " channels"] | None = None,
    z: Float[Tensor, "batch channels length"] | None = None,
    delta_bias: Float[Tensor, " channels"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "batch channels state"] | None = None,
) -> tuple[Float[Tensor, "batch channels length"], Float[Tensor, "batch channels state"]]:
    """The same, token by token: what the scan is tested and measured against. Returns outputs and the last state."""
    values, steps = precise(u), _steps(delta, delta_bias, delta_softplus)
    B, C = (precise(t if t.dim() == 4 else t[:, None]) for t in (B, C))
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (B, C))
    h = values.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else precise(initial_state)
    outputs = []
    for value, step, b, c in zip(*(t.unbind(-1) for t in (values, steps, B, C)), strict=True):
        h = (step[..., None] * precise(A)).exp() * h + (step * value)[..., None] * b
        outputs.append((h * c).sum(-1))
    return _finish(torch.stack(outputs, 2), values, D, z).to(u.dtype), h


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    delta = precise(delta)
    if bias is not None:
        delta = delta + precise(bias)[:, None]
    return functional.softplus(delta) if softplus else delta


def _finish(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + precise(D)[:, None] * u
    return y if z is None else y * functional.silu(precise(z))


def _lanes(state: Tensor, length: int) -> int:
    """As many as make an operation worth its start; then fewer, so that as little as possible is filled up."""
    most = max(1, min(ENTRIES.get(state.device.type, 2**18) // max(state.numel(), 1), math.ceil(length / STEPS)))
    segments = math.ceil(length / (STEPS * most))
    return math.ceil(length / (STEPS * segments))


def _laned(x: Tensor, lanes: int) -> Tensor:
    """(batch, ..., length) as (segments, steps, lanes, batch, ...), filled up with zeros, which change no state."""
    x = functional.pad(x, (0, -x.shape[-1] % (STEPS * lanes)))
    return x.movedim(-1, 0).unflatten(0, (-1, lanes, STEPS)).transpose(1, 2).contiguous()


class _Scan(torch.autograd.Function):
    """The scan of u and delta (segments, steps, lanes, batch, groups, each) with B and C, which end in (groups, state).

    Its gradient goes through the segments backwards and computes their states again, from the one each began with.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        entering, outputs = [], []
        with torch.autocast(u.device.type, enabled=False):
            for segment in range(len(u)):
                entering.append(state)
                h, _, _ = _states(u[segment], delta[segment], A, B[segment], state)
                outputs.append((h @ C[segment][..., None]).squeeze(-1))
                state = h[-1, -1].clone()
        ctx.save_for_backward(u, delta, A, B, C, torch.stack(entering))
        return torch.stack(outputs), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, entering = ctx.saved_tensors
        du, ddelta, dA, dB, dC = (torch.zeros_like(t) for t in (u, delta, A, B, C))
        with torch.autocast(u.device.type, enabled=False):
            for s in reversed(range(len(u))):
                h, decay, before = _states(u[s], delta[s], A, B[s], entering[s], keep_decay=True)
                dC[s] = (dy[s][..., None, :] @ h).squeeze(-2)
                h = torch.cat([before[None], h[:-1]])  # now what each token found
                g = _adjoint(dy[s][..., None] * C[s][..., None, :], decay, dstate)
                dstate = decay[0, 0] * g[0, 0]
                dB[s] = ((delta[s] * u[s])[..., None, :] @ g).squeeze(-2)
                written = (g @ B[s][..., None]).squeeze(-1)
                exponent = decay.mul_(g).mul_(h)  # gradient of delta A
                du[s] = delta[s] * written
                ddelta[s] = u[s] * written + (exponent * A).sum(-1)
                dA += torch.einsum("slbgen,slbge->gen", exponent, delta[s])
        return du, ddelta, dA, dB, dC, dstate


def _states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor, keep_decay: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The states of one segment (steps, lanes, ...), the decays, and the state before each lane.

    Without `keep_decay` the decays are replaced by their products from a lane's start.
    """
    decay = (delta[..., None] * A).exp_()
    h = (delta * u)[..., None] * B[..., None, :]
    before = state[None].repeat(h.shape[1], *[1] * state.dim())
    if h.shape[1] == 1:
        h[0].addcmul_(decay[0], before)
        for now, kept, last in zip(h[1:], decay[1:], h, strict=False):
            now.addcmul_(kept, last)
        return h, decay, before
    reach = decay.clone() if keep_decay else decay
    for t in range(1, len(h)):
        h[t].addcmul_(decay[t], h[t - 1])
        reach[t].mul_(reach[t - 1])
    for lane in range(1, len(before)):
        torch.addcmul(h[-1, lane - 1], reach[-1, lane - 1], before[lane - 1], out=before[lane])
    return h.addcmul_(reach, before), decay, before


def _adjoint(g: Tensor, decay: Tensor, after: Tensor) -> Tensor:
    """The gradient of every state of a segment, from that of its output, `g`, and of what comes after the segment."""
    if g.shape[1] == 1:
        g[-1] += after
        for t in reversed(range(len(g) - 1)):
            g[t].addcmul_(decay[t + 1], g[t + 1])
        return g
    ahead = torch.ones_like(decay)  # products of the decays up to a lane's end
    for t in reversed(range(len(g) - 1)):
        g[t].addcmul_(decay[t + 1], g[t + 1])
        torch.mul(decay[t + 1], ahead[t + 1], out=ahead[t])
    handed = after[None].repeat(g.shape[1], *[1] * after.dim())
    for lane in reversed(range(1, len(handed))):
        torch.addcmul(g[0, lane], ahead[0, lane], handed[lane], out=handed[lane - 1]).mul_(decay[0, lane])
    return g.addcmul_(ahead, handed)

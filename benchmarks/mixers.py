"""Sequence mixers: the scans against plain loops and whole matrices, and how a layer's cost grows with the length.

Softmax attention is torch's fused kernel, which holds no matrix. Its step joins the new key to the others, as a growing
cache does, and reads them all. Everything runs in float32.

Run: python benchmarks/mixers.py [--csv benchmarks/results.csv]
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from consistency import peak
from limbeck.mixers.discrete_mamba2 import DiscreteMamba2
from limbeck.mixers.generalised_linear_attention import GeneralisedLinearAttention
from limbeck.mixers.linear_attention import LinearAttention
from limbeck.mixers.mixer import Mixer, state_bytes
from limbeck.mixers.selective_scan import selective_scan, selective_scan_loop
from limbeck.mixers.softmax_attention import SoftmaxAttention, SoftmaxAttentionState
from limbeck.mixers.state_space import mixing_matrix, ssd, ssd_loop
from results import append_row, machine
from trainer import compare

WIDTH, HEADS, STATE = 256, 4, 64
PIXEL_WIDTH, PIXEL_HEADS = 64, 2
CHANNELS, CHANNEL_STATE = 128, 16
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SHORT = (256, 512, 1024, 2048)
PIXELS = (32**2, 64**2, 96**2, 128**2)
WORK = 2**13
"""Tokens that a block of measurements moves about: short sequences are repeated."""

Row = Callable[..., None]


def scans(row: Row) -> None:
    """The selective scan and the state-space model by blocks, against loops over tokens and the whole matrix."""
    for length in SHORT:
        given = scan_inputs(length)
        mine, loop = (no_grad(partial(function, *given)) for function in (selective_scan, selective_scan_loop))
        case = f"segments against a loop, {length} tokens"
        row("selective-scan", case, "ms forward", time(mine, loop, length))
        mine, loop = (learning(function, given) for function in (selective_scan, selective_scan_loop))
        row("selective-scan-training", case, "ms forward and backward", time(mine, loop, length))
        given = ssd_inputs(length)
        mine, loop, matrix = (no_grad(partial(function, *given)) for function in (ssd, ssd_loop, by_matrix))
        row("ssd", f"blocks against a loop, {length} tokens", "ms forward", time(mine, loop, length))
        row("ssd-matrix", f"blocks against the whole matrix, {length} tokens", "ms forward", time(mine, matrix, length))


def layers(row: Row) -> None:
    """Time and memory of one layer of a language model, and of its next token."""
    softmax = SoftmaxAttention(WIDTH, HEADS)
    mixers = {"DiscreteMamba2": DiscreteMamba2(WIDTH, HEADS, STATE), "linear attention": LinearAttention(WIDTH, HEADS)}
    for name, mixer in mixers.items():
        # The second does not name its peer, which the first has in the table (and in the drawing) already.
        called = f"{name} against softmax attention" if name == "DiscreteMamba2" else name
        times = []
        for length in LENGTHS:
            hidden = torch.randn(1, length, WIDTH)
            times.append(time(no_grad(partial(mixer, hidden)), no_grad(partial(softmax, hidden)), length))
            row("mixer-time", f"{called}, {length} tokens", "ms a layer, peer softmax attention", times[-1])
            held = [peak(partial(forward_backward, net, hidden)) for net in (mixer, softmax)]
            unit = "MiB beyond weights, forward and backward, peer softmax attention"
            row("mixer-memory", f"{called}, {length} tokens", unit, (*held, held[1] / held[0]))
        grows, peer_grows = (growth(LENGTHS, [pair[side] for pair in times]) for side in (0, 1))
        unit = "power of the length, peer softmax attention"
        row("mixer-time", f"{name}, growth of the time", unit, (grows, peer_grows, peer_grows / grows))
    mamba = mixers["DiscreteMamba2"]
    for length in LENGTHS:
        new, before, cache = torch.randn(1, 1, WIDTH), mamba.initial_state(1), full_cache(length)
        case = f"DiscreteMamba2 against softmax attention, {length} tokens"
        ours, peer = (no_grad(partial(net.step, new, state)) for net, state in ((mamba, before), (softmax, cache)))
        row("mixer-step", case, "ms for the next token", time(ours, peer, 64))
        sizes = [state_bytes(state) / 2**10 for state in (before, cache)]
        row("mixer-state", case, "KiB remembered", (*sizes, sizes[1] / sizes[0]))


def pixels(row: Row) -> None:
    """The attention over pixels of a UNet."""
    softmax = SoftmaxAttention(PIXEL_WIDTH, PIXEL_HEADS, causal=False, out_bias=True)
    linear = GeneralisedLinearAttention(PIXEL_WIDTH, PIXEL_HEADS)
    for count in PIXELS:
        hidden = torch.randn(1, count, PIXEL_WIDTH)
        case = f"generalised linear attention against softmax attention, {count} pixels"
        pair = time(no_grad(partial(linear, hidden)), no_grad(partial(softmax, hidden)), count)
        row("pixel-attention", case, "ms a layer", pair)


def scan_inputs(length: int) -> tuple[Tensor, ...]:
    """u, delta, A, B, C of a Mamba layer for one sequence."""
    u, delta = torch.randn(1, CHANNELS, length), torch.rand(1, CHANNELS, length) * 0.1
    rates = -torch.arange(1.0, CHANNEL_STATE + 1).expand(CHANNELS, -1)
    b, c = torch.randn(2, 1, CHANNEL_STATE, length)
    return u, delta, rates, b, c


def ssd_inputs(length: int) -> tuple[Tensor, ...]:
    """X, log decay, B, C of a Mamba-2 layer for one sequence."""
    x = torch.randn(1, length, HEADS, WIDTH // HEADS)
    b, c = torch.randn(2, 1, length, HEADS, STATE)
    return x, -functional.softplus(torch.randn(1, length, HEADS)), b, c


def by_matrix(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The state-space model by its whole matrix."""
    return mixing_matrix(log_decay, b, c) @ x.transpose(1, 2)


def full_cache(length: int) -> SoftmaxAttentionState:
    """Keys and values of that many tokens."""
    keys, values = torch.randn(2, 1, length, HEADS, WIDTH // HEADS)
    return SoftmaxAttentionState(keys, values, None, torch.tensor([length]))


def forward_backward(mixer: Mixer, hidden: Tensor) -> None:
    """What a training step does with a layer."""
    mixer(hidden).sum().backward()
    mixer.zero_grad(set_to_none=True)


def learning(function: Callable[..., Any], given: Sequence[Tensor]) -> Callable[[], None]:
    """A function of tensors with its gradients in all of them."""
    leaves = [tensor.clone().requires_grad_() for tensor in given]

    def run() -> None:
        y = function(*leaves)
        torch.autograd.grad((y[0] if isinstance(y, tuple) else y).sum(), leaves)

    return run


def no_grad(function: Callable[[], Any]) -> Callable[[], None]:
    """The function without a record for gradients."""

    def run() -> None:
        with torch.no_grad():
            function()

    return run


def time(mine: Callable[[], None], peer: Callable[[], None], length: int) -> tuple[float, float, float]:
    """Milliseconds of both, and their ratio."""
    ours, theirs, ratio = compare(mine, peer, block=max(1, WORK // length // 4), rounds=5)
    return ours * 1e3, theirs * 1e3, ratio


def growth(lengths: Sequence[int], times: Sequence[float]) -> float:
    """The power of the length that fits the times of the longer half best."""
    half = len(lengths) // 2
    x, y = ([math.log(value) for value in values[half:]] for values in (lengths, times))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def main() -> None:
    """Prints what was measured and appends it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def row(benchmark: str, case: str, unit: str, measured: tuple[float, float, float]) -> None:
        ours, theirs, ratio = measured
        print(f"{benchmark}: {case}: {ours:.4g} against {theirs:.4g} {unit}, {ratio:.2f} times as good", flush=True)
        append_row(arguments.csv, benchmark, case, ours, theirs, ratio, unit)

    for part in (scans, layers, pixels):
        part(row)
    print(machine())


if __name__ == "__main__":
    main()

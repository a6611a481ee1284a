"""Peak memory and time of the fused head beside naive torch, Liger-kernel's chunked loss and TRL's GKD loss.

    python benchmarks/fused_head.py [--csv benchmarks/results.csv]

One loss is head and divergence, forward and backward, from hidden states of both models, by default with half of the
tokens masked. Peak memory is in units of one float32 logit tensor (tokens x vocabulary). Peers that cannot be
imported are left out; they are no dependency of limbeck.
"""

import argparse
import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.metrics.memory import PeakMemory
from limbeck.objectives.divergences import divergence
from limbeck.objectives.fused_head import HiddenTeacher, fused_head_divergence

COLUMNS = ["benchmark", "case", "ours", "peer", "ratio", "unit", "hardware", "date"]


@dataclass
class Inputs:
    """Hidden states and heads of both models; a label of -100 masks a token."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def unit(self) -> int:
        return self.hidden.shape[0] * self.weight.shape[0] * 4


def make_inputs(tokens: int, vocab: int, width: int, masked: float, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocab, width, generator=generator) / width**0.5 for _ in range(2))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[: round(masked * tokens)]] = -100
    moved = [tensor.to(device) for tensor in (hidden, weight, teacher_hidden, teacher_weight, labels)]
    return Inputs(moved[0].requires_grad_(), moved[1].requires_grad_(), *moved[2:])


def ours(inputs: Inputs, beta: float) -> Tensor:
    teacher = HiddenTeacher(inputs.teacher_hidden, inputs.teacher_weight)
    loss = divergence("jsd", beta=beta)
    return fused_head_divergence(inputs.hidden, inputs.weight, teacher, loss, labels=inputs.labels)


def naive(inputs: Inputs, beta: float) -> Tensor:
    log_q = (inputs.hidden @ inputs.weight.t()).log_softmax(-1)
    log_p = (inputs.teacher_hidden @ inputs.teacher_weight.t()).log_softmax(-1)
    if beta == 0:
        values = log_p.exp() * (log_p - log_q)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        values = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return values.sum(-1)[inputs.labels != -100].mean()


def trl(inputs: Inputs, beta: float) -> Tensor:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    logits = [F.linear(inputs.hidden, inputs.weight), F.linear(inputs.teacher_hidden, inputs.teacher_weight)]
    return GKDTrainer.generalized_jsd_loss(*(side[None] for side in logits), labels=inputs.labels[None], beta=beta)


def liger(inputs: Inputs, beta: float, compiled: bool = False) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    return loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels)


def liger_compiled(inputs: Inputs, beta: float) -> Tensor:
    return liger(inputs, beta, compiled=True)


Loss = Callable[[Inputs, float], Tensor]
PEERS: dict[str, Loss] = {"naive": naive, "trl": trl, "liger": liger, "liger-compiled": liger_compiled}


def backward(loss: Loss, inputs: Inputs, beta: float) -> float:
    inputs.hidden.grad = inputs.weight.grad = None
    value = loss(inputs, beta)
    value.backward()
    return value.item()


def peak(loss: Loss, inputs: Inputs, beta: float) -> float:
    backward(loss, inputs, beta)
    inputs.hidden.grad = inputs.weight.grad = None
    with PeakMemory(inputs.hidden.device) as memory:
        backward(loss, inputs, beta)
    return memory.peak_bytes / inputs.unit


def times(losses: dict[str, Loss], inputs: Inputs, beta: float, repeats: int) -> dict[str, float]:
    """Median seconds; the losses take turns, so that a busy moment of the machine hits them all.

    On the CPU these are seconds of processor time, since other programs' work is not ours to report.
    """
    clock = time.process_time if inputs.hidden.device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            start = clock()
            backward(loss, inputs, beta)
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def available(inputs: Inputs, beta: float, skip: list[str]) -> dict[str, Loss]:
    """The peers that run here and give our value."""
    expected, usable = backward(ours, inputs, beta), {}
    for name, loss in PEERS.items():
        if name in skip:
            continue
        try:
            value = backward(loss, inputs, beta)
        except Exception as error:
            print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
            continue
        if abs(value - expected) > 1e-4 * abs(expected):
            raise AssertionError(f"{name} gives {value}, the fused head {expected}")
        usable[name] = loss
    return usable


def measure(inputs: Inputs, beta: float, repeats: int, skip: list[str]) -> Iterator[tuple[str, float, float, str]]:
    peers = available(inputs, beta, skip)
    tokens, vocab = inputs.hidden.shape[0], inputs.weight.shape[0]
    masked = (inputs.labels == -100).float().mean().item()
    case = f"jsd beta={beta:g}, {tokens} tokens ({masked:.0%} masked) x {vocab}, width {inputs.hidden.shape[1]}"
    mine = peak(ours, inputs, beta)
    for name, loss in peers.items():
        if name != "liger-compiled":  # its kernels' memory is invisible to storage tracking
            yield f"{case}: peak, {name}", mine, peak(loss, inputs, beta), "logit tensors"
    seconds = times({"ours": ours, **peers}, inputs, beta, repeats)
    for name in peers:
        yield (
            f"{case}: time, {name}",
            seconds["ours"],
            seconds[name],
            "CPU s" if inputs.hidden.device.type == "cpu" else "s",
        )


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--masked", type=float, default=0.5, help="part of the tokens that do not count")
    parser.add_argument("--beta", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    inputs = make_inputs(arguments.tokens, arguments.vocab, arguments.width, arguments.masked, arguments.device)
    rows, today = [], datetime.date.today().isoformat()
    for beta in arguments.beta:
        for case, mine, theirs, unit in measure(inputs, beta, arguments.repeats, arguments.skip):
            print(f"{case}: ours {mine:.3g}, peer {theirs:.3g} {unit}, ratio {theirs / mine:.2f}")
            figures = [f"{mine:.4g}", f"{theirs:.4g}", f"{theirs / mine:.3g}"]
            rows.append(["fused_head", case, *figures, unit, hardware(arguments.device), today])
    if arguments.csv:
        fresh = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            csv.writer(file).writerows([COLUMNS] * fresh + rows)


if __name__ == "__main__":
    main()

"""A step of consistency distillation against a hand-written loop on the same diffusers UNet: seconds and peak memory.

The algorithm needs six forward-equivalents a step: two of the teacher (Heun's step), one of the target, and three of
the student (a backward pass counts two). The line that is printed gives both loops in units of one teacher pass.

Run: python benchmarks/consistency.py [--csv benchmarks/results.csv]
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.core.method import Method
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.data.source import ArraySource
from limbeck.diffusion.denoiser import Process, Sampling, note_process
from limbeck.diffusion.parameterisations import Preconditioned
from limbeck.diffusion.schedules import EDM
from limbeck.metrics.memory import PeakMemory
from results import append_row, machine
from trainer import compare, stepping

LR, CLIP, BATCH, LEVELS, STEPS = 1e-4, 1.0, 16, 18, 100_000
DATA, LOWEST, HIGHEST, RHO, DECAY = 0.5, 0.002, 80.0, 7.0, 0.95


def unet() -> nn.Module:
    """A class-conditional UNet for CIFAR-10's images, fresh from torch's stream."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=11,
    )


class HandWritten:
    """The loop that one would write for this job alone."""

    def __init__(self, student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(False)
        self.target = copy.deepcopy(student).requires_grad_(False)
        self.images, self.labels = images, labels
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0, fused=True)
        steps = torch.linspace(0, 1, LEVELS)
        self.grid = (LOWEST ** (1 / RHO) + steps * (HIGHEST ** (1 / RHO) - LOWEST ** (1 / RHO))) ** RHO

    def denoised(self, net: nn.Module, x: Tensor, s: Tensor, label: Tensor, lowest: float) -> Tensor:
        """The preconditioned network's x0."""
        column = s.view(-1, 1, 1, 1)
        out = net(x * (column**2 + DATA**2).rsqrt(), 0.25 * s.log(), class_labels=label).sample
        above = column - lowest
        return DATA**2 / (above**2 + DATA**2) * x + DATA * above * (column**2 + DATA**2).rsqrt() * out

    def train_step(self) -> None:
        """One step."""
        rows = torch.randint(len(self.images), (BATCH,))
        x0, label = self.images[rows], self.labels[rows]
        place = torch.randint(LEVELS - 1, (BATCH,))
        low, high = self.grid[place], self.grid[place + 1]
        lo, hi = low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1)
        x_hi = x0 + hi * torch.randn_like(x0)
        with torch.no_grad():
            first = (x_hi - self.denoised(self.teacher, x_hi, high, label, 0.0)) / hi
            ahead = x_hi + (lo - hi) * first
            second = (ahead - self.denoised(self.teacher, ahead, low, label, 0.0)) / lo
            x_lo = x_hi + (lo - hi) * (first + second) / 2
            target = self.denoised(self.target, x_lo, low, label, LOWEST)
        loss = (self.denoised(self.student, x_hi, high, label, LOWEST) - target).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        if not (loss.isfinite() and norm.isfinite()):
            raise RuntimeError("not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 1 - DECAY)


def ours(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of limbeck's trainer, data included."""
    source = ArraySource((images + 1) / 2, labels, classes=10, normalisation=([0.5] * 3, [0.5] * 3))
    kind = method_class("consistency-distillation")
    note_process(teacher, Process(EDM(), Preconditioned(DATA), Sampling("heun", 18), null_label=10))
    method = kind(kind.Options(target_decay=DECAY), student=student, teacher=LiveTeacher(teacher), data=source.info())
    assert isinstance(method, Method)
    spec = TrainSpec(steps=STEPS, batch_size=BATCH, clip_norm=CLIP, optimizer=OptimizerSpec(lr=LR, schedule="constant"))
    return stepping(method, source, spec)


def teacher_pass(teacher: nn.Module, images: Tensor, repeats: int = 8) -> float:
    """Seconds of one forward pass on a batch."""
    x, time_, label = images[:BATCH], torch.zeros(BATCH), torch.zeros(BATCH, dtype=torch.int64)
    spent = []
    with torch.no_grad():
        for _ in range(repeats):
            begun = time.perf_counter()
            teacher(x, time_, class_labels=label)
            spent.append(time.perf_counter() - begun)
    return sorted(spent)[repeats // 2]


def peak(step: Callable[[], None]) -> float:
    """MiB that a step holds at most, beyond weights and optimizer."""
    step()
    with PeakMemory() as memory:
        step()
    return memory.peak_bytes / 2**20


def main() -> None:
    """Prints what was measured and appends it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.rand(2000, 3, 32, 32) * 2 - 1, torch.randint(10, (2000,))
    student, teacher = unet(), unet()
    step = ours(copy.deepcopy(student), copy.deepcopy(teacher), images, labels)
    hand = HandWritten(student, teacher, images, labels)
    mine, theirs, ratio = compare(step, hand.train_step, block=2, rounds=10)
    unit = teacher_pass(teacher, images)
    print(f"step: {mine * 1e3:.1f} ms against {theirs * 1e3:.1f}, {ratio:.3f} as fast; in teacher passes "
          f"{mine / unit:.2f} against {theirs / unit:.2f}, six needed")  # fmt: skip
    label = "ms a step, hand-written loop"
    append_row(arguments.csv, "consistency-step", "diffusers UNet 32x32", mine * 1e3, theirs * 1e3, ratio, label)
    held, theirs_held = peak(step), peak(hand.train_step)
    print(f"peak memory: {held:.1f} MiB against {theirs_held:.1f}")
    append_row(
        arguments.csv,
        "consistency-memory",
        "diffusers UNet 32x32",
        held,
        theirs_held,
        theirs_held / held,
        "MiB beyond weights, hand-written loop",
    )
    print(machine())


if __name__ == "__main__":
    main()

"""Iterations of DMD2 against a hand-written loop on the same diffusers UNets: seconds and peak memory.

Distribution matching alone, guided, the fake score moved in each iteration and the student in every fifth. Five
iterations need 25 forward-equivalents: student 7 (4 forward, and 3 where it learns), fake score 16, teacher 2.

Run: python benchmarks/distribution.py [--csv benchmarks/results.csv]
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from consistency import BATCH, CLIP, LR, STEPS, peak, teacher_pass, unet
from limbeck.core.method import Method
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.data.source import ArraySource
from limbeck.diffusion.denoiser import Process, Sampling, note_process
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import VPDiscrete
from results import append_row, machine
from trainer import compare, stepping

RATIO, SCALE, LAST = 5, 1.75, 999


class HandWritten:
    """The loop that one would write for this job alone."""

    def __init__(self, student: nn.Module, critic: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor):
        self.student, self.critic, self.teacher = student.train(), critic.train(), teacher.eval().requires_grad_(False)
        self.images, self.labels, self.iteration = images, labels, 0
        nets = (student, critic)
        self.optimizers = [torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True) for net in nets]
        signal = VPDiscrete.named().alphas_cumprod.float()
        self.alpha, self.sigma = signal.sqrt().view(-1, 1, 1, 1), (1 - signal).sqrt().view(-1, 1, 1, 1)

    def denoised(self, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 behind a predicted noise."""
        return (x - self.sigma[t] * eps) / self.alpha[t]

    def train_step(self) -> None:
        """One iteration."""
        rows = torch.randint(len(self.images), (BATCH,))
        label, is_turn = self.labels[rows], self.iteration % RATIO == 0
        last = torch.full((BATCH,), LAST)
        with torch.set_grad_enabled(is_turn):
            noise = torch.randn(BATCH, *self.images.shape[1:])
            x = self.denoised(self.student(noise, last, class_labels=label).sample, noise, last)
        if is_turn:
            t, noise = torch.randint(20, 980, (BATCH,)), torch.randn_like(x)
            with torch.no_grad():
                x_t = self.alpha[t] * x + self.sigma[t] * noise
                both = self.teacher(
                    x_t.repeat(2, 1, 1, 1), t.repeat(2), class_labels=torch.cat([label, label * 0 + 10])
                )
                with_label, without = both.sample.chunk(2)
                real = self.denoised(without + SCALE * (with_label - without), x_t, t)
                fake = self.denoised(self.critic(x_t, t, class_labels=label).sample, x_t, t)
                direction = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
            self._move(0, 0.5 * (x - (x - direction).detach()).square().mean())
        x, t, noise = x.detach(), torch.randint(0, 1000, (BATCH,)), torch.randn_like(x)
        said = self.critic(self.alpha[t] * x + self.sigma[t] * noise, t, class_labels=label).sample
        self._move(1, (said - noise).square().mean())
        self.iteration += 1

    def _move(self, place: int, loss: Tensor) -> None:
        loss.backward()
        norm = nn.utils.clip_grad_norm_((self.student, self.critic)[place].parameters(), CLIP)
        if not (loss.isfinite() and norm.isfinite()):
            raise RuntimeError("not finite")
        self.optimizers[place].step()
        self.optimizers[place].zero_grad(set_to_none=True)


def ours(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One iteration of limbeck's trainer, data included."""
    source = ArraySource((images + 1) / 2, labels, classes=10, normalisation=([0.5] * 3, [0.5] * 3))
    for net in (student, teacher):
        note_process(net, Process(VPDiscrete.named(), Direct("eps"), Sampling(), null_label=10))
    kind = method_class("dmd2")
    options = kind.Options(guidance=SCALE, gan_weight=0.0, critic_updates=RATIO)
    method = kind(options, student=student, teacher=LiveTeacher(teacher), data=source.info())
    assert isinstance(method, Method)
    spec = TrainSpec(steps=STEPS, batch_size=BATCH, clip_norm=CLIP, optimizer=OptimizerSpec(lr=LR, schedule="constant"))
    return stepping(method, source, spec)


def five(step: Callable[[], None]) -> Callable[[], None]:
    """A whole round of the two time-scale rule."""

    def steps() -> None:
        for _ in range(RATIO):
            step()

    return steps


def main() -> None:
    """Prints what was measured and appends it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.rand(2000, 3, 32, 32) * 2 - 1, torch.randint(10, (2000,))
    student, teacher = unet(), unet()
    mine = five(ours(copy.deepcopy(student), copy.deepcopy(teacher), images, labels))
    hand = five(HandWritten(student, copy.deepcopy(teacher), teacher, images, labels).train_step)
    ours_s, theirs_s, ratio = compare(mine, hand, block=1, rounds=6)
    unit = teacher_pass(teacher, images)
    print(f"five iterations: {ours_s * 1e3:.0f} ms against {theirs_s * 1e3:.0f}, {ratio:.3f} as fast")
    print(f"in teacher passes {ours_s / unit:.1f} against {theirs_s / unit:.1f}, 25 needed")
    case = "diffusers UNet 32x32, five iterations"
    append_row(arguments.csv, "dmd2-step", case, ours_s * 1e3, theirs_s * 1e3, ratio, "ms, hand-written loop")
    held, theirs_held = peak(mine), peak(hand)
    print(f"peak memory: {held:.1f} MiB against {theirs_held:.1f}")
    label = "MiB beyond weights, hand-written loop"
    append_row(arguments.csv, "dmd2-memory", case, held, theirs_held, theirs_held / held, label)
    print(machine())


if __name__ == "__main__":
    main()

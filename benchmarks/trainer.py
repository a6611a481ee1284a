"""The trainer against a hand-written loop that does the same work: cross-entropy plus Hinton's term, clipping, AdamW,
cosine schedule, a finite check before each step, a row of metrics every ten steps.

Run: python benchmarks/trainer.py [--csv benchmarks/results.csv] [--data-dir DIR]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.method import Method
from limbeck.core.specs import DataSpec, ModelSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.open import open_data
from limbeck.data.source import ArraySource, Source
from limbeck.methods.classic.kd import KnowledgeDistillation
from limbeck.models.build import build_model
from results import append_row, machine

LR, CLIP, BATCH, STEPS = 1e-3, 1.0, 64, 100_000


class HandWritten:
    """The loop that one would write for this job alone."""

    def __init__(self, student: nn.Module, teacher: nn.Module, source: Source) -> None:
        self.student, self.teacher, self.source = student.train(), teacher.eval().requires_grad_(False), source
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0, fused=True)
        self.step, self.losses = 0, []
        self.draws = torch.Generator().manual_seed(0)
        self.order = torch.randperm(len(source), generator=self.draws)

    def train_step(self) -> None:
        start = self.step * BATCH % (len(self.source) - BATCH)
        if start < BATCH:
            self.order = torch.randperm(len(self.source), generator=self.draws)
        batch: Batch = self.source.fetch(self.order[start : start + BATCH])
        with torch.no_grad():
            target = self.teacher(batch.image)
        logits = self.student(batch.image)
        hard = F.cross_entropy(logits, batch.label)
        student, teacher = ((side / 4).log_softmax(-1) for side in (logits, target))
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = 0.1 * hard + 0.9 * 16 * soft
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        if not (loss.isfinite() and norm.isfinite()):
            raise RuntimeError("not finite")
        for group in self.optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * self.step / STEPS))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        self.step += 1
        if self.step % 10 == 0:
            torch.stack(self.losses).mean().item()
            self.losses.clear()


def ours(student: nn.Module, teacher: nn.Module, source: Source) -> Callable[[], None]:
    """One step of limbeck's trainer, data and logging included."""
    method = KnowledgeDistillation(
        KnowledgeDistillation.Options(), student=student, teacher=LiveTeacher(teacher), data=source.info()
    )
    spec = TrainSpec(steps=STEPS, batch_size=BATCH, clip_norm=CLIP, optimizer=OptimizerSpec(lr=LR))
    loader = Loader(source, BATCH, seed=0)
    trainer = Trainer(method, loader, spec, steps=STEPS, items=len(source), seed=0)
    trainer.method.train()
    batches = loader.steps(0, STEPS)

    def step() -> None:
        trainer.train_step([batch.to(trainer.world.device) for batch in next(batches)])
        trainer.step += 1
        if trainer.step % spec.log_every == 0:
            trainer._log()
        trainer._pause()

    return step


def stepping(method: Method, source: Source, spec: TrainSpec) -> Callable[[], None]:
    """One step of limbeck's trainer at a time, data included."""
    loader = Loader(source, spec.batch_size, seed=0)
    trainer = Trainer(method, loader, spec, steps=STEPS, items=len(source), seed=0)
    trainer.method.train()
    batches = loader.steps(0, STEPS)

    def step() -> None:
        trainer.train_step([batch.to(trainer.world.device) for batch in next(batches)])
        trainer.step += 1

    return step


def compare(one: Callable[[], None], other: Callable[[], None], block: int, rounds: int) -> tuple[float, float, float]:
    """Median seconds a step of both, measured in turns in one run, and how many times as fast the first is."""
    times: tuple[list[float], list[float]] = ([], [])
    pairs = [(one, times[0]), (other, times[1])]
    for turn in range(rounds + 1):
        pairs.reverse()  # neither is always the first of its round
        for step, spent in pairs:
            start = time.perf_counter()
            for _ in range(block):
                step()
            if turn:  # the first round warms up
                spent.append((time.perf_counter() - start) / block)
    mine, theirs = map(statistics.median, times)
    return mine, theirs, theirs / mine


def cases(data_dir: Path | None) -> dict[str, tuple[Source, str, dict, int, int]]:
    """Source, model name, arguments of student, block length and rounds of each case."""
    digits = open_data(DataSpec()).train
    found: dict[str, tuple[Source, str, dict, int, int]] = {}
    found["digits-convnet"] = (digits, "convnet", {"width": 16}, 50, 24)
    if data_dir is not None:
        cifar = open_data(DataSpec(name=f"parquet:{data_dir / 'cifar10'}", limit=2000)).train
        images, labels = cifar.images(torch.arange(len(cifar))), cifar.labels
        found["cifar-resnet18"] = (ArraySource(images, labels, classes=10), "timm:resnet18", {}, 2, 8)
    return found


def main() -> None:
    """Prints a line a case and appends it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    for name, (source, model, options, block, rounds) in cases(arguments.data_dir).items():
        nets = [build_model(ModelSpec(name=model, arguments=options), source.info(), seed) for seed in (0, 0, 1, 1)]
        step = ours(nets[0], nets[2], source)
        hand = HandWritten(nets[1], nets[3], source)
        mine, theirs, ratio = compare(step, hand.train_step, block, rounds)
        extra = (mine - theirs) * 1e3
        print(f"{name}: {mine * 1e3:.3f} ms against {theirs * 1e3:.3f} ms a step ({extra:+.3f}), {ratio:.3f} as fast")
        unit = "ms a step, hand-written loop"
        append_row(arguments.csv, "trainer-overhead", name, mine * 1e3, theirs * 1e3, ratio, unit)
    print(machine())


if __name__ == "__main__":
    main()

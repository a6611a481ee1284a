"""Data-set distillation against hand-written loops of the same algorithms: seconds and peak memory.

A step of DataDAM on images of 32 pixels, and an outer step of FTD on images of 16; then the memory of FTD's unrolled
inner loop as it gets longer, whole and in chunks of about the square root of its length, which are recomputed. Losses
and gradients are compared first, on the same draws.

Run: python benchmarks/datasets.py [--csv benchmarks/results.csv]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from consistency import peak
from limbeck.core.method import Clock, Method
from limbeck.core.randomness import derive
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.data.source import ArraySource
from limbeck.synthesis.augmentation import SiameseAugment
from limbeck.synthesis.experts import Trajectories, flatten, unflatten
from limbeck.synthesis.network import PooledConvNet
from limbeck.synthesis.synthetic_set import SyntheticSet
from results import append_row, machine
from trainer import STEPS, compare, stepping

CLASSES, WIDTH, DEPTH = 10, 32, 3
REAL, OWN, WEIGHT, BALANCE = 64, 10, 100.0, 0.01  # DataDAM: real and synthetic images a class, its terms' weights
LENGTHS, LATEST, SEGMENT, DECAY, RATE = (10, 20, 40, 80), 4, 2, 0.9995, 1e-4
AUGMENTATION = ("color", "crop", "cutout", "flip", "scale", "rotate")
HAND = "hand-written loop"


class HandDataDAM:
    """DataDAM as one would write it for this job alone."""

    def __init__(self, images: Tensor, source: ArraySource) -> None:
        self.images, self.source = nn.Parameter(images.clone()), source
        self.augment, self.step = SiameseAugment(AUGMENTATION), 0
        self.optimizer = torch.optim.SGD([self.images], lr=1.0, momentum=0.5)
        self.rows = [(source.labels == label).nonzero().flatten() for label in range(CLASSES)]

    def loss(self, network: PooledConvNet, real: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
        """Class by class augmented with one seed for both kinds, looked at together, compared by their means."""
        own = self.images.split(OWN)
        seen = torch.cat([self.augment(images, seed) for images, seed in zip(real, seeds, strict=True)])
        made = torch.cat([self.augment(images, seed) for images, seed in zip(own, seeds, strict=True)])
        with torch.no_grad():
            looked = self._look(network, seen)
        loss, terms = torch.zeros(()), zip(looked, self._look(network, made), strict=True)
        for layer, (theirs, ours) in enumerate(terms):
            means = torch.stack([part.mean(0) for part in theirs.split([len(images) for images in real])])
            gap = (means - ours.unflatten(0, (CLASSES, OWN)).mean(1)).square().sum()
            loss = loss + WEIGHT * (BALANCE if layer == DEPTH - 1 else 1.0) * gap
        return loss

    def _look(self, network: PooledConvNet, images: Tensor) -> list[Tensor]:
        maps, features = network.maps(images)
        return [*(F.normalize(part.abs().sum(1).flatten(1), dim=1) for part in maps[:-1]), features]

    def train_step(self) -> None:
        """One step."""
        network = PooledConvNet(3, 32, 32, CLASSES, WIDTH, DEPTH).requires_grad_(False)
        chosen = [own[torch.randint(len(own), (REAL,))] for own in self.rows]
        seeds = [derive(self.step, label) for label in range(CLASSES)]
        loss = self.loss(network, [self.source.fetch(rows).image for rows in chosen], seeds)
        loss.backward()
        check(loss, [self.images])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


class HandFTD:
    """FTD's distillation as one would write it for this job alone, with the graph of all steps."""

    def __init__(self, images: Tensor, labels: Tensor, experts: Trajectories, length: int, augment: bool) -> None:
        self.images, self.labels = nn.Parameter(images.clone()), labels
        self.log_lr = nn.Parameter(torch.tensor(0.01).log())
        self.average, self.experts, self.length = images.clone(), experts, length
        self.augment, self.step = SiameseAugment(AUGMENTATION if augment else ""), 0
        groups = [{"params": [self.images]}, {"params": [self.log_lr], "lr": RATE}]
        self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.5)

    def loss(self, start: Tensor, target: Tensor, seeds: Sequence[int]) -> Tensor:
        """How far from the target the steps end that begin at the start; both all weights in a row."""
        network, names = self.experts.network, dict(self.experts.network.named_parameters())
        theta, rate = start.clone().requires_grad_(), self.log_lr.exp()
        for seed in seeds:
            logits = functional_call(network, unflatten(theta, names), (self.augment(self.images, seed),))
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, self.labels), theta, create_graph=True)
            theta = theta - rate * slope
        return (theta - target).square().sum() / (start - target).square().sum()

    def train_step(self) -> None:
        """One outer step."""
        expert, epoch = int(torch.randint(self.experts.count, ())), int(torch.randint(LATEST, ()))
        start, target = (self.experts.snapshots[expert, at] for at in (epoch, epoch + SEGMENT))
        loss = self.loss(start, target, [derive(self.step, place) for place in range(self.length)])
        loss.backward()
        check(loss, [self.images, self.log_lr])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.average.lerp_(self.images, 1 - DECAY)
        self.step += 1


def check(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Stops at what is not finite, as limbeck's trainer does."""
    norm = torch.linalg.vector_norm(torch.stack([parameter.grad.norm() for parameter in parameters]))
    if not (loss.isfinite() and norm.isfinite()):
        raise RuntimeError("not finite")


def same(theirs: Tensor, ours: Tensor, what: str) -> None:
    """Refuses two results that differ by more than rounding."""
    gap = float((theirs - ours).abs().max() / ours.abs().max())
    assert gap < 1e-3, f"{what} differ by {gap:.1e}"


def pictures(side: int, channels: int, items: int) -> ArraySource:
    """Random images, of all classes equally many."""
    return ArraySource(torch.rand(items, channels, side, side), torch.arange(items) % CLASSES, classes=CLASSES)


def datadam(source: ArraySource) -> tuple[Method, HandDataDAM]:
    """DataDAM by limbeck and by hand, after they have been seen to agree."""
    made, kind = SyntheticSet.initialise(source, OWN), method_class("datadam")
    made.augmentation = AUGMENTATION
    method: Any = kind(kind.Options(width=WIDTH, depth=DEPTH, power=1), student=made, data=source.info())
    hand = HandDataDAM(made.images.detach(), source)
    method.clock = Clock(seed=5)
    batch = source.fetch(torch.arange(REAL * CLASSES))
    (update,) = method.step(batch)
    seeds = [derive(5, "augment") + label for label in range(CLASSES)]
    by_class = [batch.image[batch.label == label] for label in range(CLASSES)]
    loss = hand.loss(method.fresh_network(), by_class, seeds)
    _agree(update.loss, loss, [(made.images, hand.images)])
    return method, hand


def ftd(source: ArraySource, experts: Trajectories, length: int, chunk: int = 0, augment: bool = True) -> tuple:
    """FTD by limbeck and by hand, after they have been seen to agree."""
    made, kind = SyntheticSet.initialise(source, 1, lr=0.01), method_class("ftd")
    made.augmentation = AUGMENTATION if augment else ()
    options = kind.Options(steps=length, segment=SEGMENT, latest=LATEST, chunk=chunk, decay=DECAY)
    method: Any = kind(options, student=made, teacher=LiveTeacher(experts), data=source.info())
    hand = HandFTD(made.images.detach(), made.labels, experts, length, augment)
    method.clock = Clock(seed=5)
    with _doubled(method, hand):
        (update,) = method.step(source.fetch(torch.arange(8)))
        start, target = (flatten(weights) for weights in method.draw())
        loss = hand.loss(start, target, [derive(5, "augment", place) for place in range(length)])
        _agree(update.loss, loss, [(made.images, hand.images), (made.log_lr, hand.log_lr)])
    return method, hand


@contextmanager
def _doubled(method: Method, hand: HandFTD) -> Iterator[None]:
    """Both in float64: the rounding of many steps in float32 would hide what is to be compared."""
    tensors = (hand.images, hand.log_lr)
    method.double()
    for tensor in tensors:
        tensor.data = tensor.data.double()
    yield
    method.float()
    for tensor in tensors:
        tensor.data = tensor.data.float()


def _agree(ours: Tensor, theirs: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    same(theirs.detach(), ours.detach(), "losses")
    ours.backward()
    theirs.backward()
    for mine, other in pairs:
        same(other.grad, mine.grad, "gradients")
        mine.grad = other.grad = None


def trained(source: ArraySource) -> Trajectories:
    """Experts that went some way; which one is of no matter to the clock."""
    channels, side, _ = source.info().example["image"].shape[1:]
    experts = Trajectories(PooledConvNet(channels, side, side, CLASSES, WIDTH, DEPTH), 2, LATEST + SEGMENT)
    first = flatten(dict(experts.network.named_parameters())).detach()
    with torch.no_grad():
        for epoch in range(experts.epochs + 1):
            experts.snapshots[:, epoch] = first + 0.01 * epoch * torch.randn(2, len(first))
    return experts


def ours(method: Method, source: ArraySource, batch: int, rates: dict[str, float]) -> Callable[[], None]:
    """One step of limbeck's trainer, data included."""
    optimizer = OptimizerSpec(name="sgd", lr=1.0, momentum=0.5, schedule="constant", lr_multipliers=rates)
    return stepping(method, source, TrainSpec(steps=STEPS, batch_size=batch, optimizer=optimizer))


def report(
    path: Path | None, name: str, case: str, mine: Callable[[], None], hand: Callable[[], None], rounds: int
) -> None:
    """Measures two loops in turns, and what they hold."""
    mine_s, hand_s, ratio = compare(mine, hand, block=1, rounds=rounds)
    held, theirs = peak(mine), peak(hand)
    print(f"{name}, {case}: {mine_s * 1e3:.1f} ms against {hand_s * 1e3:.1f}, {ratio:.3f} as fast; "
          f"{held:.1f} MiB against {theirs:.1f}", flush=True)  # fmt: skip
    append_row(path, f"{name}-step", case, mine_s * 1e3, hand_s * 1e3, ratio, f"ms a step, {HAND}")
    append_row(path, f"{name}-memory", case, held, theirs, theirs / held, f"MiB beyond weights, {HAND}")


def lengths(path: Path | None, source: ArraySource, experts: Trajectories) -> None:
    """What the inner loop holds at several lengths."""
    unit = f"MiB beyond weights, peer {HAND} with the whole graph"
    for length in LENGTHS:
        chunk = max(2, round(length**0.5))
        method, by_hand = ftd(source, experts, length, augment=False)
        in_chunks, _ = ftd(source, experts, length, chunk, augment=False)
        whole, chunked = (peak(ours(one, source, 8, {"log_lr": RATE})) for one in (method, in_chunks))
        hand = peak(by_hand.train_step)
        print(f"{length} steps: {whole:.1f} MiB, in chunks {chunked:.1f}, by hand {hand:.1f}", flush=True)
        append_row(path, "unroll-memory", f"whole, {length} steps", whole, hand, hand / whole, unit)
        append_row(
            path,
            "unroll-memory",
            f"in chunks against hand-written loop, {length} steps",
            chunked,
            hand,
            hand / chunked,
            unit,
        )


def main() -> None:
    """Prints what was measured and appends it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    path = parser.parse_args().csv
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = pictures(32, 3, 2000)
    method, hand = datadam(source)
    case = f"{OWN} images of 32x32 a class, {REAL * CLASSES} real"
    report(path, "datadam", case, ours(method, source, REAL * CLASSES, {}), hand.train_step, rounds=8)
    source = pictures(16, 3, 200)
    experts, length = trained(source), 20
    for chunk, name in ((0, "whole"), (4, "in chunks")):
        method, by_hand = ftd(source, experts, length, chunk)
        mine = ours(method, source, 8, {"log_lr": RATE})
        report(path, "ftd", f"{length} steps on 10 images of 16x16, {name}", mine, by_hand.train_step, rounds=8)
    lengths(path, source, experts)
    print(machine())


if __name__ == "__main__":
    main()

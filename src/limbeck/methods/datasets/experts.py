"""Experts: trajectories of networks on real data, which MTT and its successors match (Cazenavette et al., 2022)."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.card import Card
from limbeck.core.distributed import World
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Procedure, ProcedureContext
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import ItemOrder, derive, reseed
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.data.trajectories import TrajectoryBuffer
from limbeck.search.initialisation import reinitialised
from limbeck.synthesis.augmentation import SiameseAugment
from limbeck.synthesis.experts import Trajectories, train_expert


@register
class Experts(Procedure):
    r"""Trains many networks on the real data and keeps the weights of each before the first epoch and after every one.

    .. math:: \theta \leftarrow \theta - \eta \bigl(g_1 - \alpha g_\perp\bigr), \qquad
        g_1 = \nabla L(\theta + e), \quad e = \rho \frac{\theta^2 g_0}{\lVert |\theta| g_0 \rVert}, \quad
        g_0 = \nabla L(\theta)

    with :math:`g_\perp` the part of :math:`g_0` at right angles to :math:`g_1`; norms are over all weights, and the
    second pass leaves the statistics of batch norms alone. With `rho` 0, the default, this is plain SGD: the experts of
    MTT. With 0.01 and `alpha` 0.4 they are the flat ones of FTD (arXiv 2211.11004). Its other options are FTD's too.

    The student is `experts`, whose arguments name the network, how many and how long; result is the same, filled in:
    the teacher of a later stage `mtt` or `ftd`. Each expert is a function of the seed and its number alone. It is saved
    as soon as it is trained, sealed with checksums, in the stage's folder under `checkpoints`; resuming makes those
    that are missing. `processes` make several at once (a script that asks for them keeps its work under
    `if __name__ == "__main__"`), and each rank of a run makes its share; ranks need a common disk.

    Whitening of the images (ZCA), which the papers use for some of their settings, is `data.whiten: 0.1`.
    """

    card = Card(
        slug="experts",
        title="Dataset Distillation by Matching Training Trajectories",
        arxiv="2203.11932",
        year=2022,
        family="datasets",
        task="classification",
        needs=("student", "labels"),
        use="The first stage of mtt and ftd: networks on real data, with all that they went through.",
        tiny={"batch_size": 8},
    )

    class Options(OptionsBase):
        """How each expert is trained; defaults are MTT's."""

        lr: float = Field(0.01, gt=0, le=100, description="constant learning rate")
        momentum: float = Field(0.0, ge=0, lt=1, description="of SGD; the papers' experts have none")
        weight_decay: float = Field(0.0, ge=0, le=10, description="of SGD")
        batch_size: int = Field(256, ge=1, le=1_000_000, description="items a step")
        rho: float = Field(0.0, ge=0, le=100, description="length of GSAM's step up; 0 is SGD; FTD: 0.01")
        alpha: float = Field(0.4, ge=0, le=100, description="weight of GSAM's part at right angles; 0 is SAM")
        adaptive: bool = Field(True, description="measure the step up in units of the weights")
        augmentation: str = Field(
            "color_crop_cutout_flip_scale_rotate",
            pattern=r"^(none|(flip|color|crop|cutout|scale|rotate)(_(flip|color|crop|cutout|scale|rotate))*)$",
            description="differentiable siamese augmentation, names joined by underscores, or none",
        )
        processes: int = Field(1, ge=1, le=256, description="experts that are trained at once on this machine")

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        if not isinstance(student, Trajectories):
            raise IncompatibleError(f"a {type(student).__name__} keeps no experts", "take the student experts")
        if "image" not in data.example or not data.classes:
            raise IncompatibleError("experts are trained on images with classes", "name data that have both")
        self.world = World()

    def run(self, context: ProcedureContext) -> nn.Module:
        experts = self.student
        assert isinstance(experts, Trajectories)
        about = self.options.model_dump(exclude={"processes"}) | {
            "seed": context.seed,
            "epochs": experts.epochs,
            "items": len(context.source),
            "network": {name: list(p.shape) for name, p in experts.network.named_parameters()},
        }
        buffer = TrajectoryBuffer(context.directory, about)
        job = Job(0, context.seed, experts.network, experts.epochs, context.source, self.options, buffer)
        missing = buffer.missing(experts.count) if self.world.main else []
        self.world.barrier()  # leftovers are cleared before anyone writes
        if not self.world.main:
            missing = [number for number in range(experts.count) if not buffer.is_whole(number)]
        self._make([replace(job, number=n) for n in missing if n % self.world.size == self.world.rank], context)
        self.world.barrier()
        for number in range(experts.count):
            experts.fill(number, buffer.load(number))
        with torch.no_grad():
            for name, weight in experts.network.named_parameters():
                weight.copy_(experts.at(0, experts.epochs)[name])
        return experts

    def _make(self, jobs: list["Job"], context: ProcedureContext) -> None:
        """Trains experts, here or in processes of their own; stops between two of them."""
        for done, figures in enumerate(_here(jobs) if self.options.processes == 1 else self._apart(jobs), 1):
            context.log({"step": done, **figures})
            if done < len(jobs):
                context.pause(f"{done} of {len(jobs)} experts are made")

    def _apart(self, jobs: list["Job"]) -> Iterator[dict[str, float]]:
        threads = max(1, torch.get_num_threads() // self.options.processes)
        pool = ProcessPoolExecutor(
            min(self.options.processes, max(len(jobs), 1)),
            get_context("spawn"),
            initializer=torch.set_num_threads,
            initargs=(threads,),
        )
        try:
            for finished in as_completed([pool.submit(make_expert, job) for job in jobs]):
                yield finished.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Job:
    """One expert to train, with everything it takes, so that another process can.

    Attributes:
        number: which expert.
        seed: seed of the run; the expert is a function of it and its number.
        network: an architecture; its weights are not used.
        epochs: how long.
        source: the real data.
        options: those of `Experts`.
        buffer: where the trajectory goes.
    """

    number: int
    seed: int
    network: nn.Module
    epochs: int
    source: Any
    options: Any
    buffer: TrajectoryBuffer


def make_expert(job: Job) -> dict[str, float]:
    """Trains and stores one expert; returns its number and its accuracy on the last epoch's clean batches."""
    seed, options = derive(job.seed, "expert", job.number), job.options
    device = World().device
    network = reinitialised(job.network, "default", seed).to(device)
    reseed(seed, "training")  # of dropout and its like
    steps = train_expert(
        network,
        _epochs(job, seed, device),
        job.epochs,
        options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        rho=options.rho,
        alpha=options.alpha,
        adaptive=options.adaptive,
    )
    snapshots = [{name: value.cpu() for name, value in weights.items()} for weights in steps]
    way = {name: torch.stack([weights[name] for weights in snapshots]) for name in snapshots[0]}
    job.buffer.save(job.number, way)
    return {"expert": job.number, "accuracy": _accuracy(network, job, device)}


def _here(jobs: list[Job]) -> Iterator[dict[str, float]]:
    for job in jobs:
        yield make_expert(job)


def _rows(job: Job) -> Tensor:
    """Items that have a class."""
    return (job.source.labels >= 0).nonzero().flatten()


def _epochs(job: Job, seed: int, device: torch.device) -> Callable[[int], Iterable[tuple[Tensor, Tensor]]]:
    rows, size = _rows(job), job.options.batch_size
    augment, order = SiameseAugment(job.options.augmentation), ItemOrder(len(rows), len(rows), seed)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for place, chosen in enumerate(rows[order.at(epoch)].split(size)):
            batch = job.source.fetch(chosen, derive(seed, "view", epoch)).to(device)
            yield augment(batch["image"], derive(seed, "augment", epoch, place), each=True), batch["label"]

    return batches


@torch.no_grad()
def _accuracy(network: nn.Module, job: Job, device: torch.device) -> float:
    right, rows = 0, _rows(job)
    for chosen in rows.split(job.options.batch_size):
        batch = job.source.fetch(chosen).to(device)
        right += int((network.eval()(batch["image"]).argmax(1) == batch["label"]).sum())
    return right / len(rows)

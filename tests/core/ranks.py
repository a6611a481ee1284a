"""What one rank of the distributed tests does: trains a toy or a real method and leaves its result in a file."""

import sys
from pathlib import Path

import torch

from limbeck.core.batch import Batch
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.distributed import World
from limbeck.core.method import DataInfo
from limbeck.core.snapshot import module_tensors
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from tests.core import toys

SGD = OptimizerSpec(name="sgd", lr=0.05, momentum=0.9, schedule="constant")


class Unused(toys.MaskedRegression):
    """Uses one of two heads, by the first item of the micro-batch, so that ranks use different parameters."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.student = torch.nn.ModuleList([toys.student() for _ in range(3)])

    def step(self, batch):
        head = self.student[int(batch["index"][0]) % 2]
        self_student, self.student = self.student, head
        update = next(super().step(batch))
        self.student = self_student
        yield update


def toy(name: str, world: World, folder: Path | None, accumulate: int) -> Trainer:
    """A trainer of one of the toy methods."""
    method = {"masked": toys.MaskedRegression, "game": toys.Game, "unused": Unused}[name]
    checkpoints = Checkpoints(folder / "checkpoints") if folder else None
    return toys.build(method, world=world, optimizer=SGD, accumulate=accumulate, steps=6, clip_norm=1.0,
                      checkpoints=checkpoints, checkpoint_every=3)  # fmt: skip


class ClassifierLoader(toys.ToyLoader):
    """The toy inputs with labels, for methods of the classic family."""

    def _batch(self, indices):
        inputs, targets, _ = (tensor[indices] for tensor in self.tensors)
        return Batch({"image": inputs, "label": targets.argmax(-1), "index": indices})


def coupled(slug: str, world: World) -> Trainer:
    """A trainer of a registered method whose loss couples the items of a batch."""
    from limbeck.core.registry import method_class

    kind = method_class(slug)
    loader = ClassifierLoader(8, 1, world.rank, world.size)
    example = next(ClassifierLoader(2).steps(0, 1))[0]
    torch.manual_seed(5)
    teacher = LiveTeacher(torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)).double())
    layers = {} if "features" not in kind.card.needs else {"student_layers": ["1"], "teacher_layers": ["1"]}
    options = kind.Options(**{**kind.card.tiny, **layers})
    torch.manual_seed(6)
    method = kind(
        options,
        student=toys.student(),
        teacher=teacher,
        data=DataInfo(toys.ITEMS, 3, example, labels=loader.tensors[1].argmax(-1)),
    ).double()
    spec = TrainSpec(steps=5, batch_size=8, optimizer=SGD)
    return Trainer(method, loader, spec, steps=5, items=toys.ITEMS, seed=0, world=world)


def main(folder: str, *cases: str) -> None:
    """Trains every case in turn (`name` or `name/accumulate`); the first rank saves whole tensors."""
    torch.set_num_threads(1)
    world = World()
    for case in cases:
        name, _, accumulate = case.partition("/")
        out = Path(folder) / case.replace("/", "-")
        if name.startswith("coupled-"):
            trainer = coupled(name.removeprefix("coupled-"), world)
        else:
            trainer = toy(name, world, out, int(accumulate or 1))
        result = trainer.fit()
        tensors = module_tensors(trainer.method)
        taken_home = {f"student.{key}": value for key, value in result.state_dict().items()}
        assert all(torch.equal(value, tensors[key]) for key, value in taken_home.items())
        if world.main:
            out.mkdir(exist_ok=True, parents=True)
            torch.save(tensors, out / "weights.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

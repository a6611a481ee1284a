"""Small methods and loaders whose right answers are easy to work out."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distributed import World
from limbeck.core.method import DataInfo, Method, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import ItemOrder
from limbeck.core.specs import TrainSpec
from limbeck.core.trainer import Trainer

ITEMS, FEATURES = 48, 6


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (items, features), targets (items, 3) and which entries of the targets count, in float64."""
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ITEMS, FEATURES, generator=draws, dtype=torch.float64)
    targets = torch.randn(ITEMS, 3, generator=draws, dtype=torch.float64)
    valid = torch.rand(ITEMS, 3, generator=draws) < 0.4
    valid[0] = True
    return inputs, targets, valid


class ToyLoader:
    """The problem's items as micro-batches; the same cut of the global batch as the real loader."""

    def __init__(self, batch_size: int = 8, accumulate: int = 1, rank: int = 0, world: int = 1) -> None:
        self.tensors = problem()
        self.order = ItemOrder(ITEMS, batch_size, seed=3)
        self.micro = batch_size // (accumulate * world)
        self.accumulate, self.rank = accumulate, rank

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        for step in range(start, stop):
            indices = self.order.at(step)
            first = self.rank * self.accumulate
            yield [
                self._batch(indices[part * self.micro : (part + 1) * self.micro])
                for part in range(first, first + self.accumulate)
            ]

    def _batch(self, indices: Tensor) -> Batch:
        inputs, targets, valid = (tensor[indices] for tensor in self.tensors)
        return Batch({"image": inputs, "target": targets, "valid": valid, "index": indices})


class MaskedRegression(Method):
    """A mean over valid entries, of which each micro-batch has another number."""

    def step(self, batch: Batch) -> Iterator[Update]:
        error = (self.student(batch["image"]) - batch["target"])[batch["valid"]]
        count = batch["valid"].sum()
        loss = (error**2).sum() / count.clamp_min(1)
        yield Update("student", loss, count, {"absolute": error.abs().sum() / count.clamp_min(1)})


class Game(Method):
    """Two players that see each other's latest weights: a critic that moves twice, and a student that follows it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.critic = nn.Linear(3, 3, dtype=torch.float64)
        self.seen: list[tuple[str, float]] = []

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student, "critic": self.critic}

    def step(self, batch: Batch) -> Iterator[Update]:
        for _ in range(2):
            made = self.student(batch["image"])
            yield Update("critic", ((self.critic(made) - batch["target"]) ** 2).mean(), batch.size)
        yield Update("student", (self.critic(self.student(batch["image"])) ** 2).mean(), batch.size)

    def after_update(self, player: str, logs: dict[str, Tensor]) -> None:
        self.seen.append((player, float(logs["loss"])))


def student(kind: str = "mlp") -> nn.Module:
    """A network in float64 with fixed weights; without batch norm, which would tie the items of a batch together."""
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Linear(FEATURES, 3).double()
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def info() -> DataInfo:
    """What the toy methods are told of the data."""
    return DataInfo(ITEMS, 0, next(ToyLoader(2).steps(0, 1))[0])


def build(
    method: type[Method] = MaskedRegression,
    *,
    steps: int = 6,
    accumulate: int = 1,
    world: World | None = None,
    batch_size: int = 8,
    rows: list | None = None,
    checkpoints=None,
    **spec: object,
) -> Trainer:
    """A trainer of a toy method."""
    world = world or World()
    toy = method(OptionsBase(), student=student(), data=info())
    return Trainer(
        toy,
        ToyLoader(batch_size, accumulate, world.rank, world.size),
        TrainSpec(steps=steps, batch_size=batch_size, accumulate=accumulate, **spec),
        steps=steps,
        items=ITEMS,
        seed=0,
        world=world,
        checkpoints=checkpoints,
        record=(rows if rows is not None else []).append,
    )


def weights(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

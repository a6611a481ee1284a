"""What one rank of the sharded tests of conversions does."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.distributed import World
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import Method
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from tests.methods.language.rig import ITEMS, build, llama, source

GROWING = {"sparsity": 0.7, "begin": 0.0, "end": 0.6, "interval": 1, "criterion": "wanda", "weight": 0.5}
ADAM = OptimizerSpec(name="adam", lr=0.01, weight_decay=0.1, schedule="constant")


def training(slug: str, world: World, **options: Any) -> tuple[Method, Trainer]:
    """A method on two items a rank, and its trainer."""
    method = build(slug, student=llama(seed=4), teacher=llama(), **options)
    loader = Loader(source(), 4, 0, rank=world.rank, world=world.size)
    spec = TrainSpec(steps=5, batch_size=4, optimizer=ADAM)
    return method, Trainer(method, loader, spec, steps=5, items=ITEMS, seed=0, world=world)


def main(folder: str) -> None:
    """SquareHead trains with sharded weights; what cannot be sharded says so."""
    torch.set_num_threads(1)
    world = World()
    method, trainer = training("squarehead", world, **GROWING)
    result = trainer.fit()
    figures = method.figures()
    if world.main:
        torch.save({"weights": result.state_dict(), "masks": method.masks.state_dict()}, Path(folder) / "result.pt")
        torch.save(torch.tensor(figures["sparsity"]), Path(folder) / "sparsity.pt")
    for slug, options in {
        "squarehead": {**GROWING, "mask_gradients": True},
        "mohawk-orientation": {"stage": "orientation", "state_size": 4},
        "mohawk-alignment": {"stage": "alignment", "state_size": 4},
    }.items():
        _, refused = training(slug.partition("-")[0], world, **options)
        with pytest.raises(IncompatibleError, match=r"FSDP|sharded"):
            refused.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Two processes train to the weights that one process reaches with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limbeck.core.distributed import World
from tests.core.ranks import coupled, toy
from tests.core.toys import weights

ROOT = Path(__file__).parents[2]


def launch(*arguments: str, ranks: int = 2, program: str = "tests.core.ranks", **environment: str) -> None:
    """Runs a program as several gloo processes; fails with their output if any fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        variables = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", **environment,
        }  # fmt: skip
        command = [sys.executable, "-m", program, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, **pipes))
    outputs = [process.communicate(timeout=100)[0].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def saved(folder: Path) -> torch.Tensor:
    """The weights that the first rank left."""
    return torch.cat([value.flatten() for value in torch.load(folder / "weights.pt", weights_only=True).values()])


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


REPLICATED = ["masked", "masked/2", "game", "unused"]
SHARDED = ["masked", "masked/2", "game"]
COUPLED = ["rkd", "sp", "pkt", "dist", "crd"]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two processes with whole copies of the weights; one launch for all cases, since imports dominate."""
    folder = tmp_path_factory.mktemp("replicated")
    launch(str(folder), *REPLICATED, *(f"coupled-{slug}" for slug in COUPLED))
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two processes that hold half of the weights each (FSDP2 over gloo)."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(str(folder), *SHARDED, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    return folder


@pytest.mark.parametrize("case", REPLICATED)
def test_two_processes_train_to_the_weights_of_one(case, replicated):
    alone = toy(case.partition("/")[0], World(), None, 2 if case == "unused" else 1)  # whose micro-batches pick heads
    alone.fit()
    assert relative(saved(replicated / case.replace("/", "-")), weights(alone.method)) <= 1e-6


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_parameters_train_to_the_weights_of_one_process(case, sharded):
    alone = toy(case.partition("/")[0], World(), None, 1)
    alone.fit()
    assert relative(saved(sharded / case.replace("/", "-")), weights(alone.method)) <= 1e-6


@pytest.mark.parametrize("slug", COUPLED)
def test_losses_that_couple_items_see_the_global_batch(slug, replicated):
    alone = coupled(slug, World())
    alone.fit()
    everything = torch.cat([value.flatten() for value in alone.method.state_dict().values()])
    assert relative(saved(replicated / f"coupled-{slug}"), everything) <= 1e-6

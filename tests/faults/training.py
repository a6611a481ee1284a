"""The run that the fault tests break: small, with every kind of state, and comparable bit by bit.

Children are forked from the test process, so that they need not import torch again (seconds each).
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from limbeck.core.errors import LimbeckError
from limbeck.core.run import Run

_TRAIN: dict[str, Any] = {
    "steps": 12,
    "batch_size": 16,
    "ema": 0.9,  # an average of the weights
    "log_every": 1,
    "checkpoint_every": 3,
    "evaluate_every": 4,
}
RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "limit": 200, "augment": ["crop"]},  # random numbers
    "stages": [
        {
            "name": "teach",
            "method": "supervised",
            "student": {"name": "convnet", "arguments": {"width": 4, "depth": 2}},  # batch norm: buffers
            "train": _TRAIN,
        },
        {
            "name": "distil",
            "method": "kd",
            "student": {"name": "convnet", "arguments": {"width": 2, "depth": 2}},
            "teacher": "stage:teach",
            "train": {**_TRAIN, "accumulate": 2, "log_every": 2, "clip_norm": 1.0},
        },
    ],
}
"""Two stages with augmentation, batch norm, momentum, an average of weights, accumulation, and rows and checkpoints
that do not always fall together."""


def shortened(steps: int, **train: Any) -> dict[str, Any]:
    """The recipe with fewer steps a stage, and some keys of `train` changed in both stages."""
    stages = [{**stage, "train": {**stage["train"], "steps": steps, **train}} for stage in RECIPE["stages"]]
    return {**RECIPE, "stages": stages}


def run(recipe: dict[str, Any], folder: Path) -> None:
    """Starts or continues the recipe in a folder."""
    import limbeck

    limbeck.run(recipe, folder, resume=True, quiet=True)


def command(recipe: dict[str, Any], folder: Path) -> list[str]:
    """The words of the command line that do the same; the recipe's file is written next to the folder."""
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(yaml.safe_dump(recipe))
    return ["run", str(file), "--out", str(folder), "--resume", "--quiet"]


def fork(work: Callable[[], object]) -> int:
    """A child process that does some work and exits with its value, if that is a number, or as the command would."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        value = work()
        code = value if isinstance(value, int) else 0
    except LimbeckError as error:
        traceback.print_exc()
        code = error.exit_code
    except BaseException:  # nothing may escape into the parent's copy of the test session
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """A child's exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until_rows(folder: Path) -> None:
    """Waits until a run has begun to train."""
    deadline = time.monotonic() + 60
    while not Run(folder).metrics():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def result_of(folder: Path) -> dict[str, Any]:
    """All that has to be the same, bit by bit, whatever happened on the way; times are left out."""
    opened = Run(folder)
    found: dict[str, Any] = {"rows": [_without(row, "seconds") for row in opened.metrics()]}
    found["figures"] = {
        stage: _without(figures, "seconds", "phases", "latency") for stage, figures in opened.results().items()
    }
    found["status"] = opened.status().get("status")
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.name == "meter.safetensors":
            continue  # it shows in the rows; a checkpoint of an interruption may hold what its row did not get yet
        if file.suffix == ".safetensors" or file.name == "config.json":
            found[name] = file.read_bytes()
        elif file.name == "state.json":
            found[name] = _without(json.loads(file.read_bytes()), "seconds", "logged")
        elif file.is_dir() or ".tmp-" in name or ".old-" in name:
            found[name] = "present"
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What of two results differs, by name."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to: what it leaves, and how long it takes in a forked child."""

    recipe: dict[str, Any]
    result: dict[str, Any]
    seconds: float
    folder: Path

    @classmethod
    def of(cls, recipe: dict[str, Any], folder: Path) -> "Undisturbed":
        """Runs it twice: here, for the imports, and in a child, for the time."""
        run(recipe, folder / "here")
        begun = time.perf_counter()
        assert wait(fork(lambda: run(recipe, folder / "child"))) == 0
        seconds = time.perf_counter() - begun
        result = result_of(folder / "here")
        assert not differences(result, result_of(folder / "child"))
        return cls(recipe, result, seconds, folder / "here")

    def changes(self, folder: Path) -> list[str]:
        """What another run of the recipe left that is not the same."""
        return differences(self.result, result_of(folder))


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}

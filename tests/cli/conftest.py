"""What the tests of the command line share: a tiny recipe, a finished run of it, and the command in this process."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from limbeck.cli import main

TINY: dict[str, Any] = {
    "data": {"name": "digits", "limit": 64},
    "stages": [
        {
            "name": "teacher",
            "method": "supervised",
            "student": {"name": "mlp", "arguments": {"width": 16, "depth": 1}},
            "train": {"steps": 4, "batch_size": 16, "log_every": 2},
        },
        {
            "name": "distil",
            "method": "kd",
            "teacher": "stage:teacher",
            "student": {"name": "mlp", "arguments": {"width": 8, "depth": 1}},
            "train": {"steps": 4, "batch_size": 16, "log_every": 2, "evaluate_every": 2},
        },
    ],
}
"""A recipe of two stages that takes a fraction of a second."""


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def limbeck(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A copy of the tiny recipe to change."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the tiny recipe; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write(folder / "tiny.yaml", TINY)
    assert main(["run", str(recipe), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


def write(path: Path, recipe: Any) -> Path:
    """Writes a recipe from plain data."""
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder below a folder, with the files' bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}

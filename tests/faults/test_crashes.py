"""A process that ends at any write, fsync, rename or deletion leaves the old content or the new, and never a third."""

import json
import shutil
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.checkpoint import Checkpoint, Checkpoints
from limbeck.core.durable import commit_folder, remove_leftovers, verify_folder, write_json
from limbeck.core.recipe import check_recipe
from limbeck.core.run import Run
from tests.faults.crashes import CRASHED, HOW, Crash
from tests.faults.training import Undisturbed, differences, fork, result_of, run, shortened, wait


class Change(ABC):
    """Something that replaces content on disk, from version 1 to version 2, and later to version 3."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Leaves version 1; nothing where version 2 is the first."""
        self.write(1)

    @abstractmethod
    def write(self, version: int) -> None:
        """Replaces what is there."""

    @abstractmethod
    def read(self) -> int:
        """Which whole version is there; 0 for none."""


class SavingACheckpoint(Change):
    keep = 2

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "stage", self.keep)

    def write(self, version: int) -> None:
        self.checkpoints.save(self.content(version))

    def read(self) -> int:
        found = self.checkpoints.load()
        if found is None:
            return 0
        expected = self.content(found.step)
        assert found.state == expected.state
        for group, tensors in expected.tensors.items():
            assert tensors.keys() == found.tensors[group].keys()
            assert all(torch.equal(tensors[name], found.tensors[group][name]) for name in tensors)
        return found.step

    @staticmethod
    def content(version: int) -> Checkpoint:
        draws = torch.Generator().manual_seed(version)
        tensors = {group: {"w": torch.randn(300, generator=draws)} for group in ("method", "optimizer-student")}
        return Checkpoint(version, {**tensors, "meter": {}}, {"offset": version})


class SavingTheOnlyCheckpoint(SavingACheckpoint):
    keep = 1


class SavingTheFirstCheckpoint(SavingACheckpoint):
    def prepare(self) -> None:
        self.folder.mkdir(exist_ok=True)


class SavingOverADamagedCheckpoint(SavingACheckpoint):
    def prepare(self) -> None:
        self.write(1)
        self.write(2)
        (self.folder / "stage/step-000000002/method.safetensors").write_bytes(b"damaged")

    def read(self) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the damage is there until the crashed save gets to it
            return super().read()


class WritingJson(Change):
    def write(self, version: int) -> None:
        remove_leftovers(self.folder)
        write_json(self.folder / "value.json", {"version": version, "rest": ["x" * 50] * version})

    def read(self) -> int:
        value = json.loads((self.folder / "value.json").read_bytes())
        assert value["rest"] == ["x" * 50] * value["version"]
        return value["version"]


class ReplacingTheStudent(Change):
    def write(self, version: int) -> None:
        remove_leftovers(self.folder)
        commit_folder(self.folder / "student", lambda folder: self.fill(folder, version))

    def read(self) -> int:
        remove_leftovers(self.folder)  # as every process does that opens the run for writing
        verify_folder(self.folder / "student")
        config = json.loads((self.folder / "student" / "config.json").read_bytes())
        assert (self.folder / "student" / "weights").read_bytes() == bytes([config["version"]]) * 3000
        return config["version"]

    @staticmethod
    def fill(folder: Path, version: int) -> None:
        write_json(folder / "config.json", {"version": version})
        (folder / "weights").write_bytes(bytes([version]) * 3000)


class WritingTheFirstStudent(ReplacingTheStudent):
    def prepare(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def read(self) -> int:
        return super().read() if (self.folder / "student").exists() else 0


class CreatingARun(Change):
    """Versions 2 and 3 are the same run, created and then resumed."""

    def prepare(self) -> None:
        pass

    def write(self, version: int) -> None:
        made = Run.create(self.folder / "run", check_recipe(shortened(2)), resume=version > 2)
        with made.writing():
            made.set_status("running")

    def read(self) -> int:
        if not (self.folder / "run" / "recipe.yaml").exists():
            return 0
        assert Run.open(self.folder / "run").recipe() == check_recipe(shortened(2))
        return 3 if Run(self.folder / "run").status() else 2


class RewritingRows(Change):
    """A rewind makes the rows from step 2 on void."""

    def prepare(self) -> None:
        made = Run.create(self.folder / "run", check_recipe(shortened(2)))
        for step in range(1, 5):
            made.record("teach", {"step": step, "loss": 1.0})

    def write(self, version: int) -> None:
        made = Run.open(self.folder / "run")
        with made.writing():
            made.record("teach", {"step": 2, "loss": float(version)})

    def read(self) -> int:
        rows = [(row["step"], row["loss"]) for row in Run(self.folder / "run").metrics()]
        old = [(step, 1.0) for step in range(1, 5)]
        if rows == old:
            return 1
        assert rows[0] == old[0]
        return int(rows[1][1]) if len(rows) > 1 else 1  # the voided rows are gone, the new one is not there yet


CHANGES: list[type[Change]] = [
    *(SavingACheckpoint, SavingTheOnlyCheckpoint, SavingTheFirstCheckpoint, SavingOverADamagedCheckpoint),
    *(WritingJson, ReplacingTheStudent, WritingTheFirstStudent, CreatingARun, RewritingRows),
]


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_a_crash_at_any_call_leaves_the_old_content_or_the_new(kind, folder, tally, monkeypatch):
    (folder / "counted").mkdir()
    counted = kind(folder / "counted")
    counted.prepare()
    with monkeypatch.context() as patch:
        calls = Crash().install(patch.setattr)
        counted.write(2)
    before = _read_before(kind, folder / "before")
    assert len(calls.calls) >= 4
    for point, how in calls.points():
        place = folder / f"{point}-{how}"
        place.mkdir()
        with tally("crashes survived"):
            _survives(kind(place), Crash(point, how), before)
        shutil.rmtree(place)


def _read_before(kind: type[Change], folder: Path) -> int:
    folder.mkdir()
    change = kind(folder)
    change.prepare()
    return change.read() if any(folder.rglob("*")) else 0


def _survives(change: Change, crash: Crash, before: int) -> None:
    change.prepare()

    def write() -> None:
        crash.install()
        change.write(2)

    assert wait(fork(write)) == CRASHED
    assert change.read() in {before, 2, 3}
    change.write(3)
    assert change.read() == 3
    assert not [path for path in change.folder.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]


def _crash_a_whole_run(folder: Path, tally: Any, stride: int) -> None:
    """Every `stride`-th call of a run of two stages crashes it, in one way or another; a resume mends everything."""
    recipe = shortened(2, checkpoint_every=1)
    undisturbed = Undisturbed.of(recipe, folder / "undisturbed")
    first_call = int.from_bytes(folder.name.encode()) % stride
    point, crashed = first_call, True
    while crashed:
        place = folder / f"{point}"
        crash = Crash(point, HOW[point // stride % len(HOW)])

        def started(crash: Crash = crash, place: Path = place) -> None:
            crash.install()
            run(recipe, place)

        with tally("crashes of a whole run survived"):
            crashed = wait(fork(started)) == CRASHED
            assert wait(fork(lambda place=place: run(recipe, place))) == 0
            assert not undisturbed.changes(place)
        shutil.rmtree(place)
        point += stride


def test_a_run_that_crashed_at_any_call_is_mended_by_resuming(folder, tally):
    _crash_a_whole_run(folder, tally, stride=19)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_crashed_at_each_call_is_mended_by_resuming(folder, tally):
    _crash_a_whole_run(folder, tally, stride=1)


def test_results_are_compared_bit_by_bit(undisturbed, folder):
    """The comparison that all these tests rest on sees one changed bit."""
    shutil.copytree(undisturbed.folder, folder / "copy")
    assert not undisturbed.changes(folder / "copy")
    weights = folder / "copy" / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert differences(undisturbed.result, result_of(folder / "copy")) == ["student/model.safetensors"]

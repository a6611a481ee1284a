"""A full disk: the error says what was needed and what is free, nothing is lost, and the run goes on afterwards."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core import durable
from limbeck.core.checkpoint import Checkpoint, Checkpoints
from limbeck.core.durable import commit_folder, write_json
from limbeck.core.errors import DiskFullError
from limbeck.core.run import Run
from tests.faults.training import RECIPE, fork, run, wait

MIB = 1 << 20
FULL = 28


def run_until_full(folder: Path) -> int:
    """Runs the recipe in a child; exits with a code of its own for this error alone."""
    try:
        run(RECIPE, folder)
    except DiskFullError:
        return FULL
    return 0


def content(step: int, numbers: int = 2000) -> Checkpoint:
    return Checkpoint(step, {name: {"w": torch.full((numbers,), float(step))} for name in ("method", "average")}, {})


def fill_up(call: int) -> Callable[[Path, Callable[[Path], Any]], None]:
    """A `_write` at whose `call`-th call, from 0, the disk is full half-way, and stays full."""
    calls = iter(range(1 << 30))
    write = durable._write

    def full(path: Path, writer: Callable[[Path], Any]) -> None:
        if next(calls) < call:
            write(path, writer)
            return
        if path.is_dir():
            (path / "half.safetensors").write_bytes(b"half")
        else:
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return full


@pytest.mark.parametrize("call", range(3))  # the files of the folder, its manifest, the pointer
def test_a_checkpoint_without_room_leaves_the_previous_one_and_no_litter(call, folder, tally, monkeypatch):
    checkpoints = Checkpoints(folder)
    checkpoints.save(content(1))
    with tally("full disks survived"):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "_write", fill_up(call))
            with pytest.raises(DiskFullError, match=r"disk is full.*bytes are needed.*are free") as caught:
                checkpoints.save(content(2))
        assert caught.value.needed >= (16_000 if call < 2 else 50)
        assert caught.value.free > 0
        assert checkpoints.load().step in ({1} if call < 2 else {1, 2})
        assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]
        checkpoints.save(content(3))
        assert checkpoints.load().step == 3


@pytest.mark.parametrize("call", range(2))
def test_a_student_without_room_leaves_the_previous_one(call, folder, tally, monkeypatch):
    student = folder / "student"
    commit_folder(student, lambda target: (target / "weights").write_bytes(b"old"))
    with tally("full disks survived"):
        with monkeypatch.context() as patch:
            patch.setattr(durable, "_write", fill_up(call))
            with pytest.raises(DiskFullError, match="student"):
                commit_folder(student, lambda target: (target / "weights").write_bytes(b"new"))
        assert (student / "weights").read_bytes() == b"old"
        assert [path.name for path in folder.iterdir()] == ["student"]


def test_other_errors_of_the_disk_are_told_as_they_are(folder, monkeypatch):
    def broken(path: Path, writer: Callable[[Path], Any]) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(durable, "_write", broken)
    with pytest.raises(OSError, match="Input/output"):
        write_json(folder / "value.json", {})


@pytest.mark.parametrize("call", [0, 3, 8, 20, 33])
def test_a_run_that_found_the_disk_full_goes_on_afterwards(call, undisturbed, folder, tally):
    place = folder / "run"

    def hindered() -> int:
        durable._write = fill_up(call)
        return run_until_full(place)

    with tally("full disks survived"):
        assert wait(fork(hindered)) == FULL
        assert wait(fork(lambda: run(RECIPE, place))) == 0
        assert not undisturbed.changes(place)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MIB}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def occupy(disk: Path, leave: int) -> Path:
    """Takes up all room but some bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - leave)))
    return ballast


@pytest.mark.parametrize("leave", [0, 4096, 20_000, 40_000])
def test_a_checkpoint_on_a_really_full_disk(leave, small_disk, tally):
    checkpoints = Checkpoints(small_disk / "stage")
    checkpoints.save(content(1))
    ballast = occupy(small_disk, leave)
    with tally("full disks survived"):
        with pytest.raises(DiskFullError) as caught:
            checkpoints.save(content(2, numbers=10_000))
        assert caught.value.needed >= 80_000 > caught.value.free
        assert checkpoints.load().step == 1
        ballast.unlink()
        checkpoints.save(content(2, numbers=10_000))
        assert checkpoints.load().step == 2


@pytest.mark.parametrize("leave", [0, 30_000, 70_000, 110_000, 150_000])
def test_a_run_on_a_really_full_disk_goes_on_afterwards(leave, small_disk, undisturbed, tally):
    place = small_disk / "run"
    ballast = occupy(small_disk, leave)
    with tally("full disks survived"):
        assert wait(fork(lambda: run_until_full(place))) == FULL
        ballast.unlink()
        assert wait(fork(lambda: run(RECIPE, place))) == 0
        assert not undisturbed.changes(place)


def test_rows_of_metrics_need_room_too(small_disk):
    made = Run(small_disk)
    made.record("distil", {"step": 1})
    ballast = occupy(small_disk, 0)

    def record() -> None:
        for step in range(2, 2000):
            made.record("distil", {"step": step, "note": "x" * 100})

    with pytest.raises(DiskFullError, match="metrics"):
        record()
    ballast.unlink()
    with Run(small_disk).writing():
        rows = Run(small_disk).metrics()
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))

"""One process writes to a run at a time, and no lock outlives its process."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.cli import main
from limbeck.core.errors import RunBusyError
from limbeck.core.run import Run
from tests.faults.training import RECIPE, command, fork, run, shortened, until_rows, wait


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[int]:
    """Another process holds the run; it is killed in the end."""
    ready, told = os.pipe()

    def hold() -> None:
        with Run.open(folder).writing():
            os.write(told, b".")
            time.sleep(60)

    child = fork(hold)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)


def state_of(folder: Path) -> dict[str, Any]:
    """Content and time of the last change of every file."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }


def test_a_second_process_is_refused_and_writes_nothing(undisturbed, folder, tally):
    place = folder / "run"
    assert wait(fork(lambda: run(shortened(2), place))) == 0
    with held_elsewhere(place):
        before = state_of(place)
        with tally("second writers refused"):
            with pytest.raises(RunBusyError, match="another process is writing"):
                limbeck.run(shortened(2), place, resume=True, quiet=True)
            assert state_of(place) == before
        with tally("second writers refused"):
            assert main(command(shortened(2), place)) == 2
            assert state_of(place) == before
        Run.open(place).results()  # reading is free
    with Run.open(place).writing(), pytest.raises(RunBusyError), Run.open(place).writing():
        pass
    with Run.open(place).writing():  # the lock of a process that was killed is gone
        pass


def test_a_killed_run_can_be_resumed_at_once_though_its_loader_s_workers_linger(undisturbed, folder, tally):
    recipe = {**RECIPE, "data": {**RECIPE["data"], "workers": 2}}
    place = folder / "run"
    child = fork(lambda: run(recipe, place))
    until_rows(place)
    workers = _children(child)
    os.kill(child, signal.SIGKILL)
    wait(child)
    with tally("kills survived"):
        assert [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        assert wait(fork(lambda: run(recipe, place))) == 0
        assert not undisturbed.changes(place)


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

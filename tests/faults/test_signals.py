"""SIGTERM and SIGINT in every phase: exit code 3, at most one step lost, and the same bits in the end."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from limbeck.cli import main
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.distributed import World
from limbeck.core.errors import Interrupted
from limbeck.core.interrupt import interruptible, requested
from tests.core.toys import build, weights
from tests.faults.training import RECIPE, command, fork, result_of, run, until_rows, wait

STEPS = 2 * RECIPE["stages"][0]["train"]["steps"]


class Phase(NamedTuple):
    """Where a signal arrives: at the start of the `call`-th call of a function."""

    place: str
    call: int = 1


PHASES = {
    "before anything is written": Phase("limbeck.running:check"),
    "before the first stage": Phase("limbeck.core.run:Run.set_status"),
    "opening the data": Phase("limbeck.experiment:open_data"),
    "building a model": Phase("limbeck.experiment:build_model", 2),
    "loading a batch": Phase("limbeck.data.loader:Loader.at", 5),
    "asking the teacher": Phase("limbeck.core.teacher:LiveTeacher.signal", 9),
    "within a step": Phase("limbeck.core.player:Player.apply", 19),
    "the last step of a stage": Phase("limbeck.core.player:Player.apply", 12),
    "logging": Phase("limbeck.core.run:Run.record", 8),
    "filling a checkpoint": Phase("limbeck.core.checkpoint:_fill", 3),
    "moving the pointer": Phase("limbeck.core.checkpoint:write_json", 2),
    "evaluating": Phase("limbeck.experiment:evaluate_for", 2),
    "evaluating after the last step": Phase("limbeck.experiment:evaluate_for", 3),
    "measuring a result": Phase("limbeck.experiment:Experiment._measure"),
    "storing a result": Phase("limbeck.experiment:save_model"),
    "between two stages": Phase("limbeck.core.run:Run.add_result"),
    "writing the student": Phase("limbeck.experiment:save_model", 3),
}


def _watched(place: str, before: Callable[[int], object]) -> None:
    """From now on calls `before` with the number of the call, from 1, at each call of a function of this process."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def watched(*args: Any, **kwargs: Any) -> Any:
        before(next(calls))
        return original(*args, **kwargs)

    setattr(owner, name, watched)


def _run_and_signal(folder: Path, phase: Phase, *signals: signal.Signals) -> int:
    """Runs the command in a child that sends itself signals in a phase, and returns its exit code."""

    def arrive(call: int) -> None:
        for number in signals if call == phase.call else ():
            os.kill(os.getpid(), number)

    def work() -> int:
        _count_steps(folder)
        _watched(phase.place, arrive)
        return main(command(RECIPE, folder))

    return wait(fork(work))


def _resume(folder: Path) -> int:
    def work() -> int:
        _count_steps(folder)
        return main(command(RECIPE, folder))

    return wait(fork(work))


def _count_steps(folder: Path) -> None:
    """Adds a byte to a file next to the run for every training step of this process."""
    file = folder.with_suffix(".steps")
    file.touch()

    def count(call: int) -> None:
        with file.open("ab") as steps:
            steps.write(b".")

    _watched("limbeck.core.trainer:Trainer.train_step", count)


def _steps_lost(folder: Path) -> int:
    return folder.with_suffix(".steps").stat().st_size - STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_stops_the_command_resumably(phase, number, undisturbed, folder, tally):
    place = folder / "run"
    with tally("signals obeyed"):
        # What is nearly done may be finished instead: then nothing is left to resume.
        assert _run_and_signal(place, PHASES[phase], number) in ({3, 0} if phase == "writing the student" else {3})
        assert _resume(place) == 0
        assert not undisturbed.changes(place)
        assert _steps_lost(place) == 0


@pytest.mark.parametrize("phase", ["loading a batch", "within a step", "filling a checkpoint", "evaluating"])
def test_a_second_signal_stops_at_once_and_loses_nothing_that_was_saved(phase, undisturbed, folder, tally):
    place = folder / "run"
    with tally("second signals obeyed"):
        assert _run_and_signal(place, PHASES[phase], signal.SIGINT, signal.SIGTERM) == 3
        assert _resume(place) == 0
        assert not undisturbed.changes(place)
        assert _steps_lost(place) <= RECIPE["stages"][0]["train"]["checkpoint_every"]


def test_a_signal_while_torch_is_imported_is_not_lost(undisturbed, folder, tally):
    """The only one in a process of its own: a forked child has imported everything already."""
    script = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from limbeck.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    place = folder / "run"
    with tally("signals obeyed"):
        done = subprocess.run([sys.executable, "-c", script, *command(RECIPE, place)], capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        assert "SIGTERM received" in done.stderr
        assert "Traceback" not in done.stderr
        assert _resume(place) == 0
        assert not undisturbed.changes(place)


def test_a_key_press_reaches_loader_workers_too(undisturbed, folder, tally):
    """A terminal sends Ctrl-C to the whole group of processes."""
    recipe = {**RECIPE, "data": {**RECIPE["data"], "workers": 2}}
    place = folder / "run"

    def work() -> int:
        os.setsid()
        return main(command(recipe, place))

    with tally("signals obeyed"):
        child = fork(work)
        until_rows(place)
        os.killpg(child, signal.SIGINT)
        assert wait(child) == 3
        assert wait(fork(lambda: main(command(recipe, place)))) == 0
        assert not undisturbed.changes(place)


def test_signals_are_handled_as_before_once_the_work_is_over():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
    assert not requested()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class ToldByAnotherRank(World):
    """A process that no signal reached, while another one was told to stop."""

    def any(self, flag: bool) -> bool:
        return True


def test_every_rank_stops_when_one_was_told_to(folder):
    rows: list[Any] = []
    trainer = build(world=ToldByAnotherRank(), checkpoints=Checkpoints(folder), rows=rows)
    with pytest.raises(Interrupted):
        trainer.fit()
    assert (trainer.step, trainer.checkpoints.steps()) == (1, [1])


def test_an_interrupted_evaluation_costs_no_row(folder):
    """The signal comes while the result so far is measured: the row of that step is written after the resume."""

    def measure(interrupted: bool) -> Callable[[object], dict[str, float]]:
        def evaluate(result: object) -> dict[str, float]:
            if interrupted:
                raise Interrupted("told to stop")
            return {"weight": float(weights(result).sum())}

        return evaluate

    rows: list[Any] = []
    checkpoints = Checkpoints(folder)
    stopped = build(rows=rows, checkpoints=checkpoints, log_every=3, evaluate_every=3)
    stopped.evaluate = measure(True)
    with pytest.raises(Interrupted):
        stopped.fit()
    assert checkpoints.steps()[-1] == 3
    resumed = build(rows=rows, checkpoints=checkpoints, log_every=3, evaluate_every=3)
    resumed.evaluate = measure(False)
    resumed.fit()
    expected: list[Any] = []
    whole = build(rows=expected, log_every=3, evaluate_every=3)
    whole.evaluate = measure(False)
    whole.fit()
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]


def test_signals_that_come_late_leave_a_finished_run(undisturbed, folder):
    """Resuming a run that is done changes nothing."""
    place = folder / "run"
    for _ in range(2):
        assert wait(fork(lambda: run(RECIPE, place))) == 0
    assert not undisturbed.changes(place)
    assert result_of(place)["status"] == "done"
